"""Vision towers, one file each, named as config.json names their model_type."""
