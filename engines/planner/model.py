"""What a plan is made of: the sizes of a model's tensors and activations, and what is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.errors import BundleError, OptionError
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, Manifest
from llava_deploy.engines.names import PREFILL_TOKENS, Precision
from llava_deploy.engines.planner.onnx_header import TensorSize, read_initializers
from llava_deploy.engines.tensorrt_recipe import EngineLimits

_FLOAT_BITS = 16  # or more; quantised values have fewer
_QUANTIZED_PARTS = ("_scale", "_zero_point", "_permutation")
TABLES = ("position_embedding.weight", ".cos", ".sin")
"""Matrices that nothing is multiplied with."""


@dataclass(frozen=True)
class GraphWeights:
    """The tensors of one graph.

    Attributes:
        tensors: everything that is in its external data.
    """

    tensors: tuple[TensorSize, ...]

    @cached_property
    def nbytes(self) -> int:
        """All of them, as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def dense(self) -> tuple[TensorSize, ...]:
        """Matrices of floats that are multiplied with."""
        return tuple(t for t in self.tensors if _is_matrix(t) and t.bits >= _FLOAT_BITS)

    @cached_property
    def quantized(self) -> tuple[TensorSize, ...]:
        """Matrices of few bits, without their scales."""
        return tuple(t for t in self.tensors if _is_matrix(t) and t.bits < _FLOAT_BITS)

    @cached_property
    def quantized_bytes(self) -> int:
        """Of the quantised matrices with their scales, zero points and permutations."""
        parts = sum(t.nbytes for t in self.tensors if t.name.endswith(_QUANTIZED_PARTS))
        return parts + sum(t.nbytes for t in self.quantized)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(t.nbytes for t in self.tensors)


def _is_matrix(tensor: TensorSize) -> bool:
    return len(tensor.shape) == 2 and not tensor.name.endswith((*_QUANTIZED_PARTS, *TABLES))


@dataclass(frozen=True)
class SourceWeights:
    """What an export reads.

    Attributes:
        nbytes: of the checkpoint's tensors, as they are stored.
        largest: the tensor with most values.
        rounded: those that the export rounds.
        is_converted: some are floats of another type than the graphs'.
    """

    nbytes: int
    largest: TensorSize
    rounded: tuple[TensorSize, ...]
    is_converted: bool


@dataclass(frozen=True)
class PlannedModel:
    """A model in one precision.

    Attributes:
        name: for people.
        precision: of the bundle.
        vision: sizes of the vision graph's input and output.
        decoder: sizes of the decoder's.
        vision_weights: what the vision graph holds.
        decoder_weights: what the decoder's graph holds; a tied output layer is in the embedding table, not here.
        is_tied: the output layer is the embedding table.
        tower_heads: attention heads of the vision tower.
        source: what an export reads; ``None`` of a bundle, which is exported already.
    """

    name: str
    precision: Precision
    vision: VisionShape
    decoder: DecoderShape
    vision_weights: GraphWeights
    decoder_weights: GraphWeights
    is_tied: bool
    tower_heads: int
    source: SourceWeights | None

    @property
    def itemsize(self) -> int:
        """Bytes of a float in the graphs."""
        return np.dtype(self.decoder.dtype).itemsize

    @property
    def embedding_bytes(self) -> int:
        """Of the token-embedding table."""
        return self.decoder.vocab_size * self.decoder.hidden_size * self.itemsize

    @property
    def features_bytes(self) -> int:
        """Of one picture's features."""
        return self.vision.patches * self.vision.hidden_size * self.itemsize

    @property
    def bundle_bytes(self) -> int:
        """Of the bundle's weights on the disk."""
        return self.vision_weights.nbytes + self.decoder_weights.nbytes + self.embedding_bytes

    @property
    def decoder_bytes(self) -> int:
        """Of everything that the decoder's graph multiplies with, a tied output layer included."""
        return self.decoder_weights.nbytes + (self.embedding_bytes if self.is_tied else 0)

    @property
    def cache_bytes_per_slot(self) -> int:
        """Of keys and values of one row's token."""
        d = self.decoder
        return 2 * d.layers * d.kv_heads * d.head_dim * self.itemsize

    @cached_property
    def intermediate_size(self) -> int:
        """Widest activation of a decoder layer."""
        return max(max(t.shape) for t in _layer_matrices(self.decoder_weights.tensors, "language_model.layers.0."))

    @cached_property
    def query_size(self) -> int:
        """Heads times their size: width of a layer's queries."""
        names = "language_model.layers.0.self_attn."
        wide = [t for t in _layer_matrices(self.decoder_weights.tensors, names) if t.name.endswith("q_proj.weight")]
        sizes = {max(t.shape) if min(t.shape) == self.decoder.hidden_size else min(t.shape) for t in wide}
        return sizes.pop()

    @cached_property
    def tower_layers(self) -> int:
        """Of the vision tower, up to the one whose features are taken."""
        names = (t.name.partition(".layers.")[2].partition(".")[0] for t in self.vision_weights.tensors)
        return len({name for name in names if name})

    @cached_property
    def tower_sizes(self) -> tuple[int, int]:
        """Hidden and widest size of a tower layer."""
        matrices = _layer_matrices(self.vision_weights.tensors, "vision_tower.encoder.layers.0.")
        sizes = [size for t in matrices for size in t.shape]
        return (min(sizes), max(sizes)) if sizes else (self.vision.hidden_size, self.vision.hidden_size)


def _layer_matrices(tensors: Iterable[TensorSize], prefix: str) -> list[TensorSize]:
    return [t for t in tensors if t.name.startswith(prefix) and _is_matrix(t)]


@dataclass(frozen=True)
class Sizes:
    """What is bound at most.

    Attributes:
        max_batch: rows at once.
        max_len: slots of the KV cache a row.
        max_seq: new tokens of a row in one run.
        max_images: pictures in one run of the vision graph.
    """

    max_batch: int
    max_len: int
    max_seq: int
    max_images: int

    @classmethod
    def of(cls, limits: EngineLimits) -> Sizes:
        """Those of an engine."""
        return cls(limits.max_batch, limits.max_len, limits.max_seq, limits.max_images)

    @classmethod
    def of_run(cls, max_batch: int, max_len: int, max_images: int) -> Sizes:
        """Those of a run whose prompts are read in pieces of :data:`~llava_deploy.engines.names.PREFILL_TOKENS`.

        Raises:
            OptionError: a size below 1.
        """
        for name, value in (("max_batch", max_batch), ("max_len", max_len), ("max_images", max_images)):
            if value < 1:
                raise OptionError(name, f"want 1 or more, got {value}")
        return cls(max_batch, max_len, min(PREFILL_TOKENS, max_len), max_images)


def planned_bundle(bundle: Path, manifest: Manifest) -> PlannedModel:
    """The model of a bundle, from its manifest and the headers of its graphs.

    Raises:
        BundleError: a graph is missing, or holds not what a graph of ours does.
    """
    if manifest.left_out:
        raise BundleError(
            f"{bundle}: was packed without its graphs, whose weights are what is counted here; give the bundle that it "
            "was packed from"
        )
    vision = [t for t in read_initializers(bundle / manifest.entry(VISION_GRAPH).path) if t.values]
    decoder = [t for t in read_initializers(bundle / manifest.entry(DECODER_GRAPH).path) if t.values]
    tied = [t for t in decoder if t.name == EMBED_TOKENS]
    heads = {t.integers[2] for t in vision if len(t.integers) == 4 and t.integers[:2] == (0, 0)}
    if len(heads) > 1 or not any(t.name.startswith("language_model.layers.0.") for t in decoder):
        raise BundleError(f"{bundle}: its graphs are none of llava-deploy's; export the bundle again")
    return PlannedModel(
        name=manifest.model.name,
        precision=manifest.model.precision,
        vision=manifest.vision,
        decoder=manifest.decoder,
        vision_weights=GraphWeights(tuple(vision)),
        decoder_weights=GraphWeights(tuple(t for t in decoder if t.name != EMBED_TOKENS)),
        is_tied=bool(tied),
        tower_heads=heads.pop() if heads else 1,
        source=None,
    )


EMBED_TOKENS = "language_model.embed_tokens.weight"
"""Name of the token-embedding table where a decoder's output layer is tied to it."""
