"""Sizes of a Llama decoder whose weights are drawn. Standard library only: two environments import it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Of the decoder; a head has ``hidden / heads`` values."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return self.hidden // self.heads
