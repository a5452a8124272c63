"""Other people's 4-bit checkpoints, one file a format: their packed tensors become one weight each, value for value."""
