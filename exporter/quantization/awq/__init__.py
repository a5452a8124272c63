"""AWQ: activation-aware weight quantization (Lin et al., MLSys 2024), layer by layer over multimodal prompts."""
