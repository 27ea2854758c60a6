"""What only `--mode export` needs: graphs for other runtimes, files of each format and what paints with them, integers,
the page for the browser with its files in `page/`. It may use `painting`."""
