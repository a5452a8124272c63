"""``llava-deploy bench``: how fast a bundle answers on this machine, through the same calls that its users make."""
