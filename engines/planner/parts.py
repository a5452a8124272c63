"""How the decoder's layers are shared out among the plans that TensorRT builds of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count

from llava_deploy.engines.decoder_parts import layer_ranges
from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.names import LARGEST_PART
from llava_deploy.engines.planner.model import GraphWeights, PlannedModel


def decoder_parts(model: PlannedModel, wanted: int | None) -> tuple[int, ...]:
    """How many layers each part has; the largest part, output layer included, is as small as can be.

    Args:
        model: whose decoder it is.
        wanted: parts; ``None``: as few as keep each at :data:`~llava_deploy.engines.names.LARGEST_PART`, where
                layers are not larger themselves.

    Raises:
        OptionError: of ``parts``: fewer than one, or more than the decoder has layers.
    """
    layers = model.decoder.layers
    if wanted is not None and not 1 <= wanted <= layers:
        raise OptionError("parts", f"want 1 to {layers} (layers of the decoder), got {wanted}")
    weights = [part_weights(model, range(i, i + 1)).nbytes for i in range(layers)]
    weights[-1] += model.decoder_bytes - sum(weights)
    if wanted is not None:
        return _shared_out(weights, wanted)
    smallest = (_shared_out(weights, n) for n in count(1))
    return next(parts for parts in smallest if len(parts) == layers or _largest(weights, parts) <= LARGEST_PART)


def part_weights(model: PlannedModel, layers: range) -> GraphWeights:
    """The tensors of some of the decoder's layers; with the last one all that is of no layer.

    Tables that all parts have are counted once, with the last one: they are small.
    """
    prefixes = {f"language_model.layers.{i}" for i in range(model.decoder.layers)}
    mine = {f"language_model.layers.{i}" for i in layers}
    others = layers.stop == model.decoder.layers
    tensors = ((".".join(tensor.name.split(".", 3)[:3]), tensor) for tensor in model.decoder_weights.tensors)
    return GraphWeights(tuple(t for of, t in tensors if of in mine or (others and of not in prefixes)))


def quantized_weights(weights: GraphWeights) -> Counter[int]:
    """How many matrices have 4 bits, how many 8."""
    return Counter(tensor.bits for tensor in weights.quantized)


def _largest(weights: Sequence[int], parts: Sequence[int]) -> int:
    return max(sum(weights[i] for i in layers) for layers in layer_ranges(parts))


def _shared_out(weights: Sequence[int], parts: int) -> tuple[int, ...]:
    """Layers of each part so that the largest is as small as can be; the first ones have as many as that allows."""
    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(weights, parts, middle)) <= parts else (middle + 1, high)
    return _filled(weights, parts, low)


def _filled(weights: Sequence[int], parts: int, most: int) -> tuple[int, ...]:
    """Parts of up to ``most`` bytes, each filled in turn, with a layer left for each of ``parts`` that are to come."""
    counts, room = [0], most
    for i, weight in enumerate(weights):
        left, to_come = len(weights) - i, parts - len(counts)
        if counts[-1] and (weight > room or left <= to_come):
            counts.append(0)
            room = most
        counts[-1] += 1
        room -= weight
    return tuple(counts)
