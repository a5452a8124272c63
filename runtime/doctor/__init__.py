"""What a machine has, what a bundle could do on it, and what to install for the rest: ``llava-deploy doctor``."""
