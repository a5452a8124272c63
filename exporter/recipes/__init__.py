"""Recipes for pictures and prompts, and the tokenizer, from the files that a checkpoint brings along."""
