"""Optimisation profiles: the shapes that may be bound, and those that kernels are chosen for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llava_deploy.engines.contract import DecoderShape, Dim, GraphSpec
from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt_recipe import DECODE_PROFILE, PREFILL_PROFILE, EngineLimits

_ROWS = 2
"""That the decoder's profiles allow at least, though a limit of one keeps the runtime to one.

For a batch that is 1 and no range TensorRT chooses kernels that want a weight's bytes in another order, prefill's not
that of decode's, and the plan holds such weights twice. One layer of LLaVA-1.5-7B's decoder and its output layer, with
TensorRT for RTX 1.7.1: 953 MB in fp16 of 668 MB of weights, with a range 672 MB; the ranges must be in both profiles.
"""

Shape: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class InputRange:
    """Least, usual and largest shape of one input."""

    least: Shape
    usual: Shape
    most: Shape


Profile: TypeAlias = "dict[str, InputRange]"
"""Of a graph's inputs by name, those of fixed shapes left out."""


def vision_profiles(spec: GraphSpec, limits: EngineLimits) -> list[Profile]:
    """The one of the vision graph."""
    return [_profile(spec, [Dim("images", 1, limits.opt_images, limits.max_images)])]


def decoder_spec(shape: DecoderShape, limits: EngineLimits, cache: CacheForm) -> GraphSpec:
    """The contract of the decoder that an engine is built from, whichever way it keeps its cache."""
    return shape.spec(limits.max_batch) if cache == "in-place" else shape.growing_spec(limits.max_batch)


def decoder_profiles(spec: GraphSpec, limits: EngineLimits, cache: CacheForm) -> list[Profile]:
    """Prefill's and decode's, at their places; sizes of dims that are fixed in the engine have no part in them.

    Where the cache grows, ``total`` is ``past_len + seq``. TensorRT holds the profiles' corners against that, so that
    the longest ``total`` of prefill is that of the longest past and the longest piece, beyond what is ever bound.
    """
    batch = Dim("batch", 1, limits.opt_batch, max(_ROWS, limits.max_batch))
    piece, one = Dim("seq", 1, limits.opt_seq, limits.max_seq), Dim("seq", 1, 1, 1)
    if cache == "in-place":
        prefill = [batch, piece, Dim("total", 1, limits.opt_seq, limits.max_len)]
        decode = [batch, one, Dim("total", 1, limits.opt_total, limits.max_len)]
    else:
        prefill = [
            batch,
            piece,
            Dim("past_len", 1, 1, limits.max_len),
            Dim("total", 2, limits.opt_seq + 1, limits.max_len + limits.max_seq),
        ]
        decode = [
            batch,
            one,
            Dim("past_len", 1, limits.opt_total, limits.max_len),
            Dim("total", 2, limits.opt_total + 1, limits.max_len + 1),
        ]
    profiles = {PREFILL_PROFILE: _profile(spec, prefill), DECODE_PROFILE: _profile(spec, decode)}
    return [profiles[index] for index in sorted(profiles)]


def add_profiles(builder: Any, config: Any, profiles: Sequence[Profile]) -> None:
    """Give ``profiles`` to TensorRT, in their order.

    Raises:
        BackendError: it takes none of that kind.
    """
    for index, ranges in enumerate(profiles):
        profile = builder.create_optimization_profile()
        for name, sizes in ranges.items():
            profile.set_shape(name, sizes.least, sizes.usual, sizes.most)
        if config.add_optimization_profile(profile) != index:
            raise BackendError(f"TensorRT refuses optimisation profile {index}: {ranges}")


def _profile(spec: GraphSpec, dims: Sequence[Dim]) -> Profile:
    ranges = {dim.name: dim for dim in dims}

    def at(shape: Sequence[int | str], sizes: Mapping[str, int]) -> Shape:
        return tuple(sizes[size] if isinstance(size, str) else size for size in shape)

    least = {name: dim.min for name, dim in ranges.items()}
    usual = {name: dim.opt for name, dim in ranges.items()}
    most = {name: dim.max for name, dim in ranges.items()}
    return {
        tensor.name: InputRange(at(tensor.shape, least), at(tensor.shape, usual), at(tensor.shape, most))
        for tensor in spec.inputs
        if any(isinstance(size, str) for size in tensor.shape)
    }
