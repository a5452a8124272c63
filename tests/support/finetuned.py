"""Checkpoints whose weights were changed, as a fine-tuning changes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image

from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.sources.tensors import DerivedTensor
from llava_deploy.runtime import Llava

DECODER = ("language_model.", "lm_head.")
PROJECTOR = ("projector.",)


@dataclass(frozen=True)
class Changed(DerivedTensor):
    """A tensor with noise on it, a part of its own size."""

    name: str
    seed: int
    amount: float

    @property
    def dtype(self) -> str:
        return "float32"

    def read(self) -> np.ndarray:
        values = np.asarray(self.source.read()).astype(np.float32)
        noise = np.random.default_rng([self.seed, *self.name.encode()]).standard_normal(values.shape, np.float32)
        return values + noise * np.float32(self.amount * max(float(values.std()), 0.01))


def finetuned(checkpoint: Checkpoint, beginnings: tuple[str, ...], seed: int = 1, amount: float = 0.5) -> Checkpoint:
    """With other values of the tensors whose names begin so."""
    tensors = {
        name: Changed(source, name, seed, amount) if name.startswith(beginnings) else source
        for name, source in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=MappingProxyType(tensors))


def logits_of(llava: Llava) -> np.ndarray:
    """What the model expects along a fixed answer to a fixed question about a picture, ``[tokens, vocab]``."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    along = llava.logits_along(["USER: <image> What is this? ASSISTANT:"], [[picture]], [[5, 6, 7]])
    return np.concatenate([row.copy() for row in along])
