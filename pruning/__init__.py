"""Pruning: how channels respond to pictures, which of them to cut, the cut itself, what it changes, several networks
compared, plots of it.

What only `--mode prune` needs lives here; it may use `painting`.
"""
