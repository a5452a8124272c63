"""Where a checkpoint's tensors come from: files and shards, adapters, the tower beside; read one at a time."""
