"""What a machine has room for, and what fits in it: the question of the doctor, and the planner's answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """What a bundle has to fit in; ``None`` is what nobody knows.

    Attributes:
        host: bytes of memory to be had.
        device: of the GPU; of no meaning where it shares the host's.
        capability: compute capability of the GPU, as ``sm89``; ``None`` without one that can be used.
        is_unified: host and GPU share their memory.
        tensorrt: release of TensorRT, as ``10.3``; ``None`` without one.
    """

    host: int | None
    device: int | None
    capability: str | None
    is_unified: bool
    tensorrt: str | None


@dataclass(frozen=True)
class Fit:
    """Whether a bundle has room with one backend, in one row at the model's full length; ``None`` is not known.

    Attributes:
        run: it can be run.
        build: it can be built.
        largest_len: tokens of context that would fit.
    """

    run: bool | None
    build: bool | None
    largest_len: int | None
