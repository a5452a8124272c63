"""A decoder in parts: consecutive layers each, run one after the other, hidden states handed on from each to the next.

TensorRT builds each part as a plan of its own, so that a build needs the memory of one part and not of the whole.
Standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

from llava_deploy.engines.contract import (
    DecoderShape,
    GraphSpec,
    TensorSpec,
    hidden_state_name,
    past_name,
    present_name,
)

_EMBEDS, _LAST, _LOGITS = "inputs_embeds", "last_index", "logits"


def layer_ranges(parts: Sequence[int]) -> list[range]:
    """Which layers each part has, by how many it has."""
    return [range(stop - count, stop) for count, stop in zip(parts, accumulate(parts), strict=True)]


def boundary_names(parts: Sequence[int]) -> list[str]:
    """Names of the hidden states that parts hand on, ``[batch, seq, hidden]`` in the graph's dtype; one part: none."""
    return [hidden_state_name(layers.stop) for layers in layer_ranges(parts)[:-1]]


def part_spec(spec: GraphSpec, shape: DecoderShape, layers: range) -> GraphSpec:
    """The contract of a part.

    All parts take positions, mask and, where the cache is written in place, ``write_indices``. The first takes
    ``inputs_embeds`` and any other ``hidden_states.{n}`` after the ``n`` layers before it; the last one takes
    ``last_index`` and gives ``logits``, any other the hidden states after its layers.

    Args:
        spec: of the whole decoder.
        shape: likewise.
        layers: of the part; all of them: ``spec`` itself.
    """
    if layers == range(shape.layers):
        return spec
    is_first, is_last = layers.start == 0, layers.stop == shape.layers
    caches = {name(i, part) for i in layers for part in ("key", "value") for name in (past_name, present_name)}

    def hidden(count: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(hidden_state_name(count), shape.dtype, ("batch", "seq", shape.hidden_size)),)

    def kept(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        others = {_EMBEDS: is_first, _LAST: is_last, _LOGITS: is_last}
        is_cache = {t.name: t.name.startswith(("past.", "present.")) for t in tensors}
        return tuple(t for t in tensors if (t.name in caches if is_cache[t.name] else others.get(t.name, True)))

    return dataclasses.replace(
        spec,
        name=f"{spec.name}, layers {layers.start} to {layers.stop - 1}",
        inputs=(() if is_first else hidden(layers.start)) + kept(spec.inputs),
        outputs=(() if is_last else hidden(layers.stop)) + kept(spec.outputs),
    )
