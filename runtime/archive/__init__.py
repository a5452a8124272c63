"""Bundle to one file and back: a deterministic tar in one zstd frame. ``docs/bundle-format.md`` gives the format."""
