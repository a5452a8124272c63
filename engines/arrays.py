"""Arrays in NumPy's file format, mapped into memory; nothing in them is unpickled."""

from __future__ import annotations

import tokenize
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from llava_deploy.engines.errors import BundleError


def mapped_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...], *, remedy: str) -> np.ndarray:
    """Map a ``.npy`` file, read only.

    A plain array over the map: a memmap object costs microseconds at every look-up.

    Raises:
        BundleError: it is none, or of another dtype or shape; ``remedy`` ends the message.
    """
    try:
        values = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError, TypeError, OverflowError, RecursionError, tokenize.TokenError) as error:
        raise BundleError(f"{path}: not an array ({error}); {remedy}") from error
    if values.shape != shape or values.dtype != np.dtype(dtype):
        found = f"{values.dtype}{list(values.shape)}"
        raise BundleError(f"{path}: want {np.dtype(dtype)}{list(shape)}, found {found}; {remedy}")
    return values
