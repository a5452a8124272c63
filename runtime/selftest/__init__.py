"""``llava-deploy selftest``: the answers that PyTorch gave where a bundle was made, replayed where it runs."""
