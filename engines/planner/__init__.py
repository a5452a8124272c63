"""What a model will take before anything is exported, built or run: memory, the largest sizes that fit, speed."""
