"""The tiny LLaVA that ships with the package: its pictures, questions, training script and checkpoint.

The checkpoint is, byte for byte, what ``train.py`` writes with no other options: 30 minutes on two x86-64 cores that
had other work too, with the pinned versions. Other processors and versions may round otherwise.
"""
