"""Rotary position embedding tables (Su et al., 2021; scaling as in transformers' ``modeling_rope_utils.py``)."""

from __future__ import annotations

import math

import numpy as np

from llava_deploy.exporter.config import RopeConfig


def rope_tables(config: RopeConfig, head_dim: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every position's angles, each float32 ``[positions, head_dim / 2]``.

    Angles are the float32 products that PyTorch computes, not better ones: at position 4,000 the rounding shows.
    """
    frequencies = inverse_frequencies(config, head_dim)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles), np.sin(angles)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Float32 ``[head_dim / 2]``, scaled as ``config`` says."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1.0) / np.float32(config.theta) ** exponents).astype(np.float32)
    if config.rope_type == "default" or config.factor is None:
        return plain
    slowed = plain / np.float32(config.factor)
    low, high, length = config.low_freq_factor, config.high_freq_factor, config.original_max_position_embeddings
    if config.rope_type == "linear" or low is None or high is None or length is None:
        return slowed
    # Llama 3: long wavelengths are slowed by the factor, short ones kept, those between blended.
    wavelengths = 2 * math.pi / plain
    blend = (length / wavelengths - low) / (high - low)
    blended = (1 - blend) * slowed + blend * plain
    scaled = np.where(wavelengths > length / low, slowed, np.where(wavelengths < length / high, plain, blended))
    return scaled.astype(np.float32)
