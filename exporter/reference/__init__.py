"""The PyTorch classes that every graph and the NumPy splice are checked against."""
