"""Goldens: questions with PyTorch's answers, recorded where the checkpoint is, for a bundle to carry."""
