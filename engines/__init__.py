"""Graph contracts, the bundle manifest, and the builders that turn a bundle into an engine for one backend."""
