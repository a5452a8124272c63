"""Two 4-bit values in a byte, as ONNX has them. Standard library and NumPy only."""

from __future__ import annotations

import numpy as np


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """``[rows, columns]`` of 0 to 15 to ``[rows, columns / 2]``, the even column in the low half of each byte."""
    packed: np.ndarray = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of :func:`pack_nibbles`."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes
