"""Training: the loop with its run folder, the step of style transfer, compaction, dead units, the pictures by position,
Muon.

What only `--mode train` and `--mode distill` need lives here; nothing here uses another wing.
"""
