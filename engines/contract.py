"""Names, dtypes and shapes of every graph input and output, stated once.

Both sides of the bundle import this module: the exporter declares its graphs with it, the runtime binds its buffers
with it. Standard library and NumPy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.errors import ContractError

IMAGE_TOKEN_INDEX = -200
"""Stands for one picture in a row of token ids (LLaVA, ``llava/constants.py``)."""

IGNORE_INDEX = -100
"""A label that carries no loss (LLaVA, ``llava/constants.py``; PyTorch's ``CrossEntropyLoss.ignore_index``)."""

OPSET_VERSION = 24
"""ONNX opset of the canonical graphs: the first with TensorScatter; Attention and RotaryEmbedding are from 23."""

IR_VERSION = 11
HIDDEN_STATES = "hidden_states."
FLOATS = ("float32", "float16")
"""What the graphs compute in."""

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Dim:
    """A named dimension and the range that engines are built for.

    ``opt`` is the size a backend should tune its kernels for, as in a TensorRT optimisation profile.
    """

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            sizes = (self.min, self.opt, self.max)
            raise ContractError(f"dim {self.name!r}: want 1 <= min <= opt <= max, got {sizes}")


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: ``shape`` holds fixed sizes and the names of :class:`Dim` s."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class GraphSpec:
    """Everything that may be bound to one graph."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...]

    def check(self, feed: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Hold ``feed`` against the inputs and return the size that each named dim has in it.

        Named dims bind across the inputs in the order of the spec.

        Raises:
            ContractError: an input is missing, left over, of another dtype, or of a shape that does not fit.
        """
        missing = [s.name for s in self.inputs if s.name not in feed]
        unknown = sorted(set(feed) - {s.name for s in self.inputs})
        if missing or unknown:
            raise ContractError(f"graph {self.name!r}: missing inputs {missing}, unknown inputs {unknown}")
        bound: dict[str, int] = {}
        for spec in self.inputs:
            self._bind(spec, feed[spec.name], bound)
        return bound

    def _bind(self, spec: TensorSpec, value: np.ndarray, bound: dict[str, int]) -> None:
        fits = value.dtype == np.dtype(spec.dtype) and value.ndim == len(spec.shape)
        sizes: dict[str, int] = {}
        for want, got in zip(spec.shape, value.shape, strict=False):
            size = bound.get(want, sizes.setdefault(want, got)) if isinstance(want, str) else want
            fits = fits and size == got
        ranges = {d.name: d for d in self.dims}
        outside = [
            f"{n} in {ranges[n].min}..{ranges[n].max}"
            for n, s in sizes.items()
            if n in ranges and not ranges[n].min <= s <= ranges[n].max
        ]
        if not fits or outside:
            so_far = ", ".join(f"{n}={s}" for n, s in bound.items())
            got = f"{value.dtype}{list(value.shape)}"
            limits = f" with {', '.join(outside)}" if outside else ""
            known = f" (so far {so_far})" if so_far else ""
            raise ContractError(f"graph {self.name!r}, input {spec.name!r}: want {spec}{limits}, got {got}{known}")
        bound.update(sizes)


def past_name(layer: int, part: str) -> str:
    """Input that holds a decoder layer's cache; ``part`` is ``key`` or ``value``."""
    return f"past.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """Output that is the same cache after the new tokens were written into it."""
    return f"present.{layer}.{part}"


def _require_shape(graph: str, shape: VisionShape | DecoderShape) -> None:
    for name, value in vars(shape).items():
        if name == "dtype" and value not in FLOATS:
            raise ContractError(f"graph {graph!r}, dtype: want {' or '.join(FLOATS)}, got {value!r}")
        if name != "dtype" and not 1 <= value <= _LARGEST:
            raise ContractError(f"graph {graph!r}, {name}: want 1 to {_LARGEST}, got {value!r:.40}")


@dataclass(frozen=True)
class VisionShape:
    """What fixes the vision graph's shapes: pixels, the features of one picture, and the graph's float dtype."""

    dtype: str
    image_height: int
    image_width: int
    patches: int
    hidden_size: int

    def __post_init__(self) -> None:
        _require_shape("vision", self)

    def spec(self, max_images: int = 64) -> GraphSpec:
        """``pixel_values [images, 3, height, width]`` to ``image_features [images, patches, hidden]``."""
        pixels = TensorSpec("pixel_values", self.dtype, ("images", 3, self.image_height, self.image_width))
        features = TensorSpec("image_features", self.dtype, ("images", self.patches, self.hidden_size))
        return GraphSpec("vision", (pixels,), (features,), (Dim("images", 1, 1, max_images),))


@dataclass(frozen=True)
class DecoderShape:
    """What fixes the decoder graph's shapes, and the graph's float dtype; logits are always float32."""

    dtype: str
    hidden_size: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int

    def __post_init__(self) -> None:
        _require_shape("decoder", self)

    def spec(self, max_batch: int = 64) -> GraphSpec:
        """The decoder's contract.

        ``write_indices[b]`` is the slot of the cache that row ``b``'s first new key goes to; ``attention_mask`` is true
        where a new token may look, over the first ``total`` slots after the new keys were written; ``last_index[b]``
        is the new token whose logits are wanted. ``present.*`` are written in place when they are bound to the buffers
        of ``past.*``.
        """
        longest = self.max_positions
        dims = (*self._dims(max_batch, longest), Dim("max_len", 1, longest, longest))
        return self._spec((TensorSpec("write_indices", "int64", ("batch",)),), "max_len", "max_len", dims)

    def growing_spec(self, max_batch: int = 64) -> GraphSpec:
        """The contract of a decoder whose cache grows: ``present`` is ``past`` with the new keys after it.

        Nothing says where a row writes: all rows append at ``past_len``, the mask hides what a shorter row has no use
        for, and ``position_ids`` are the rows' own. ``total`` is ``past_len + seq``. The past has a slot at least, as
        no backend is asked for empty tensors: the first step's is one slot, which the mask hides for good.
        """
        longest = self.max_positions
        past = Dim("past_len", 1, max(1, longest // 4), longest)
        dims = (*self._dims(max_batch, longest + 1), past)
        return self._spec((), "past_len", "total", dims)

    def _dims(self, max_batch: int, slots: int) -> tuple[Dim, ...]:
        total = Dim("total", 1, max(1, self.max_positions // 4), slots)
        return Dim("batch", 1, 1, max_batch), Dim("seq", 1, 1, self.max_positions), total

    def _spec(self, extra: tuple[TensorSpec, ...], past: str, present: str, dims: tuple[Dim, ...]) -> GraphSpec:
        parts = [(i, part) for i in range(self.layers) for part in ("key", "value")]
        before, after = (("batch", self.kv_heads, length, self.head_dim) for length in (past, present))
        inputs = (
            TensorSpec("inputs_embeds", self.dtype, ("batch", "seq", self.hidden_size)),
            TensorSpec("position_ids", "int64", ("batch", "seq")),
            *extra,
            TensorSpec("attention_mask", "bool", ("batch", 1, "seq", "total")),
            TensorSpec("last_index", "int64", ("batch",)),
            *(TensorSpec(past_name(i, part), self.dtype, before) for i, part in parts),
        )
        outputs = (
            TensorSpec("logits", "float32", ("batch", self.vocab_size)),
            *(TensorSpec(present_name(i, part), self.dtype, after) for i, part in parts),
        )
        return GraphSpec("decoder", inputs, outputs, dims)


def hidden_state_name(layers: int) -> str:
    """Name, inside either graph, of the hidden state after ``layers`` layers; ``verify`` looks there."""
    return f"{HIDDEN_STATES}{layers}"
