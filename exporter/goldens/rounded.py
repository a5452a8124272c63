"""A checkpoint's weights as a bundle in float16 holds them: what its goldens are recorded with."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.sources.tensors import DerivedTensor, TensorSource


class RoundedTensor(DerivedTensor):
    """A tensor, its values rounded to float16."""

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def dtype(self) -> str:
        """Of what ``read`` gives."""
        return "float16"

    def read(self) -> np.ndarray:
        """The values, of ``shape``."""
        values = self.source.read()
        return values if values.dtype == np.float16 else values.astype(np.float32).astype(np.float16)


def rounded_to_float16(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every weight rounded.

    What rounding weights costs is ``verify``'s and ``eval``'s to say; a golden that had it in it would hide a fault as
    large, or be taken for one.
    """
    tensors: dict[str, TensorSource] = {name: RoundedTensor(source) for name, source in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=MappingProxyType(tensors))
