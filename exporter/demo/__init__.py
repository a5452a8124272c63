"""The tiny LLaVA that ships with the package: its pictures, questions, training script and checkpoint.

The checkpoint was trained with ``train.py`` (seed 0) for 500 ``look`` and 1,000 ``talk`` steps of a schedule of 1,300,
and then for 500 more ``talk`` steps, at a peak rate of 1e-3, in which colours and relations were asked more often. That
second run is not in the script yet, so the script as it stands does not give the shipped file.
"""
