"""The tiny LLaVA that ships with the package: its pictures, questions, training script and checkpoint."""
