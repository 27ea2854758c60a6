"""Exporting: graphs for other runtimes, integers in them, the page for the browser with its files in `page/`.

What only `--mode export` needs lives here; it may use `painting`.
"""
