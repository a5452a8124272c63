"""The tiny LLaVA that ships with the package: its pictures, questions, training script and checkpoint.

The checkpoint is what the stages of ``train.py`` wrote with no other options: look and talk in one process, practice in
another, from the file of the talk stage (``--practise``). One process does the same in turn.
"""
