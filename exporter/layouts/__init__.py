"""On-disk layouts of LLaVA checkpoints, one file each: tensor names and config keys become canonical ones."""
