"""Whether a bundle was made from a checkpoint: its sizes, its recipes, its tokenizer and its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from llava_deploy.engines.arrays import mapped_array
from llava_deploy.engines.errors import InputError
from llava_deploy.engines.manifest import (
    DECODER_GRAPH,
    EMBEDDING_TABLE,
    TOKENIZER,
    VISION_GRAPH,
    Manifest,
    SpliceRecipe,
)
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS
from llava_deploy.exporter.graphs import decoder_shape, vision_shape
from llava_deploy.exporter.quantization.stored import stored_tensors

_COMPARED = 4096
"""Values of each weight: enough to tell one model from another, and quick to read in the largest."""


def require_sizes_of(checkpoint: Checkpoint, bundle: Path, manifest: Manifest) -> None:
    """Refuse a bundle of another model's sizes.

    Raises:
        InputError: its graphs take or give other shapes.
    """
    precision = manifest.model.precision
    shapes = (vision_shape(checkpoint.config, precision), decoder_shape(checkpoint.config, precision))
    if shapes != (manifest.vision, manifest.decoder):
        raise InputError(
            f"{bundle}: made from a model of other sizes than {checkpoint.directory} "
            f"({manifest.model.decoder}; {manifest.model.vision}); give the checkpoint that it was "
            "exported from"
        )


def require_made_from(checkpoint: Checkpoint, bundle: Path, manifest: Manifest) -> None:
    """Refuse a bundle that was made from another checkpoint, or with other options that change what it computes.

    Some values of each weight are held against the checkpoint's, but for those of a quantised decoder, which a search
    may have changed.

    Raises:
        InputError: another model's.
        BundleError: the bundle lacks a file that this needs, or one is damaged.
    """
    require_sizes_of(checkpoint, bundle, manifest)
    said = {
        "pictures' recipe": (checkpoint.image, manifest.image),
        "chat recipe": (checkpoint.chat, manifest.chat),
        "longest prompt": (SpliceRecipe(checkpoint.config.tokenizer_model_max_length), manifest.splice),
        "tokenizer": (hashlib.sha256(checkpoint.tokenizer_json).hexdigest(), manifest.entry(TOKENIZER).sha256),
    }
    for what, (wanted, found) in said.items():
        if wanted != found:
            raise _other_model(checkpoint, bundle, f"its {what}")
    dtype = np.dtype(manifest.decoder.dtype)
    for name, stored in _stored_floats(bundle, manifest, set(checkpoint.tensors)).items():
        values = np.asarray(checkpoint.tensors[name].read()).reshape(-1)[:_COMPARED]
        with np.errstate(over="ignore"):
            if not np.array_equal(values.astype(dtype), stored.reshape(-1)[:_COMPARED]):
                raise _other_model(checkpoint, bundle, f"its weight {name!r}")


def _stored_floats(bundle: Path, manifest: Manifest, names: set[str]) -> dict[str, np.ndarray]:
    path, shape = bundle / manifest.entry(EMBEDDING_TABLE).path, manifest.decoder
    size = (shape.vocab_size, shape.hidden_size)
    table = mapped_array(path, shape.dtype, size, remedy="export the bundle again")
    graphs = [VISION_GRAPH] if manifest.quantization is not None else [VISION_GRAPH, DECODER_GRAPH]
    for name in graphs:
        manifest.entry(name)
        manifest.entry(f"{name}.data")
    stored = {EMBED_TOKENS: table}
    for graph in graphs:
        stored |= {name: tensor.read() for name, tensor in stored_tensors(bundle / graph, names).items()}
    return stored


def _other_model(checkpoint: Checkpoint, bundle: Path, what: str) -> InputError:
    return InputError(
        f"{bundle}: {what} is not that of {checkpoint.directory}; "
        "give the checkpoint that it was exported from, with the options that it was exported with"
    )
