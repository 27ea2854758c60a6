"""What only `--mode prune` needs: how channels respond to pictures, which of them to cut, the cut itself, what it
changes in one or several networks, plots of it. It may use `painting`. Every `config` is a PruneConfig."""
