"""The engines of a decoder, each with some of its layers, run in turn as if they were one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.contract import DecoderShape, GraphSpec, TensorSpec
from llava_deploy.engines.decoder_parts import boundary_names, layer_ranges, part_spec
from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.tensorrt.buffers import aligned
from llava_deploy.runtime.tensorrt.cuda import Device
from llava_deploy.runtime.tensorrt.engine import Context, Engine, Replay


class DecoderParts:
    """A decoder's engines, held against its contract."""

    def __init__(self, engines: Sequence[Engine], spec: GraphSpec, shape: DecoderShape) -> None:
        """Take them in the order of their layers.

        Args:
            engines: all of one directory, one for each of the parts that its recipe names.
            spec: of the whole decoder, with the cache that they were built for.
            shape: likewise.

        Raises:
            BackendError: they are not of this model.
        """
        recipe = engines[0].recipe
        if len(engines) != len(recipe.parts) or sum(recipe.parts) != shape.layers:
            raise BackendError(
                f"{engines[0].name}: not of this model: want engines of {shape.layers} layers, found {len(engines)} "
                f"where its manifest has parts of {', '.join(map(str, recipe.parts))} layers; build it again with: "
                "llava-deploy build --force"
            )
        self._specs = [part_spec(spec, shape, layers) for layers in layer_ranges(recipe.parts)]
        self._engines = engines
        for engine, part in zip(engines, self._specs, strict=True):
            engine.require(part)

    def context(self, profile: int, replay: Replay) -> PartContexts:
        """New contexts that run one optimisation profile.

        Raises:
            DeviceMemoryError: the GPU has no room for them.
            BackendError: TensorRT refuses.
        """
        return PartContexts(
            [
                _Part(engine.context(profile, replay), _names(spec.inputs), _names(spec.outputs))
                for engine, spec in zip(self._engines, self._specs, strict=True)
            ]
        )


class PartContexts:
    """Contexts of all parts; see :class:`~llava_deploy.runtime.tensorrt.engine.Context`.

    What is bound goes to each part that has it: hidden states are an output of one and an input of the next.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def bind(self, name: str, address: int) -> None:
        """Say where an input or output lies.

        Raises:
            BackendError: TensorRT refuses.
        """
        for part in self._parts:
            if name in part.inputs or name in part.outputs:
                part.context.bind(name, address)

    def reshape(self, name: str, shape: tuple[int, ...]) -> None:
        """Say an input's shape.

        Raises:
            BackendError: outside the profile.
        """
        for part in self._parts:
            if name in part.inputs:
                part.context.reshape(name, shape)

    def run(self) -> None:
        """Queue a run of each, in order; nobody waits between them.

        Raises:
            DeviceMemoryError: the GPU has no memory for one.
            BackendError: TensorRT refuses.
        """
        for part in self._parts:
            part.context.run()


class HiddenStates:
    """What parts hand on, ``[batch, seq, hidden]`` in the graph's dtype: in two buffers, which take turns.

    A part reads one and writes the other. Where there is one part there is nothing.
    """

    def __init__(self, device: Device, shape: DecoderShape, parts: Sequence[int], tokens: int) -> None:
        """Allocate the buffers.

        Args:
            device: where they are.
            shape: of the decoder.
            parts: layers of each.
            tokens: of all rows, at most.

        Raises:
            DeviceMemoryError: there is no room.
        """
        names = boundary_names(parts)
        size = aligned(tokens * shape.hidden_size * np.dtype(shape.dtype).itemsize)
        buffers = [device.allocate(size, "hidden states between the parts of the decoder") for _ in names[:2]]
        self._buffers = buffers
        self.addresses = {name: buffers[i % 2].address for i, name in enumerate(names)}
        """By the name that both parts have for it."""


@dataclass(frozen=True)
class _Part:
    context: Context
    inputs: frozenset[str]
    outputs: frozenset[str]


def _names(tensors: Sequence[TensorSpec]) -> frozenset[str]:
    return frozenset(tensor.name for tensor in tensors)
