"""What only `--mode train` and `--mode distill` need: the loop with its run folder, the step of style transfer,
compaction, dead units, the pictures by position, Muon. Nothing here uses another wing."""
