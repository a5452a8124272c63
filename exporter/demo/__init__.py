"""The tiny LLaVA that ships with the package: its pictures, questions, training script and checkpoint.

The checkpoint is what ``python -m llava_deploy.exporter.demo.train --out DIRECTORY`` wrote, with no other options.
"""
