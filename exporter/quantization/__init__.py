"""Weights in few bits: the form they have here, round to nearest, AWQ, and other people's formats."""
