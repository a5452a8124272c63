"""What a TensorRT engine was built for: its limits, its dialect, and the ways that it was built.

The builder writes it into ``engine.json``; the runtime binds nothing that it does not allow. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_deploy.engines.errors import ContractError
from llava_deploy.engines.names import CacheForm

PREFILL_PROFILE = 0
"""The decoder's optimisation profile for prompts."""

DECODE_PROFILE = 1
"""The decoder's optimisation profile for one token a row."""


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that a TensorRT engine accepts, and those that its kernels were chosen for.

    Attributes:
        max_batch: rows at once.
        max_len: slots of the KV cache.
        max_seq: new tokens of a row in one run; longer prompts are read in pieces.
        max_images: pictures in one run of the vision graph.
        opt_batch: rows that kernels are chosen for.
        opt_seq: tokens of a prompt that prefill's kernels are chosen for.
        opt_total: visible slots that decode's kernels are chosen for.
        opt_images: pictures that the tower's kernels are chosen for.
    """

    max_batch: int
    max_len: int
    max_seq: int
    max_images: int
    opt_batch: int
    opt_seq: int
    opt_total: int
    opt_images: int

    def __post_init__(self) -> None:
        ranges = {
            "opt_batch": (self.opt_batch, self.max_batch),
            "max_seq": (self.max_seq, self.max_len),
            "opt_seq": (self.opt_seq, self.max_seq),
            "opt_total": (self.opt_total, self.max_len),
            "opt_images": (self.opt_images, self.max_images),
        }
        for name, (value, most) in ranges.items():
            if not 1 <= value <= most:
                raise ContractError(f"engine limits: want {name} of 1 to {most}, got {value}")


@dataclass(frozen=True)
class TensorRtRecipe:
    """How an engine was built, beside the graphs and the version of TensorRT.

    Attributes:
        release: of TensorRT, as ``10.3``, whose operators the graphs were lowered to.
        cache: what the decoder does with its cache: see :data:`~llava_deploy.engines.names.CacheForm`.
        parts: layers of the decoder in each of its plans, which run one after the other.
        limits: what may be bound.
        capabilities: compute capabilities that it runs on, as ``sm89``, in ascending order.
        workspace: bytes that a layer may use beside its tensors; ``None``: what TensorRT takes.
        version_compatible: later versions of TensorRT's runtime may run it.
        refittable: its weights may be replaced.
    """

    release: str
    cache: CacheForm
    parts: tuple[int, ...]
    limits: EngineLimits
    capabilities: tuple[str, ...]
    workspace: int | None
    version_compatible: bool
    refittable: bool

    def __post_init__(self) -> None:
        if not self.capabilities:
            raise ContractError("engine recipe: want one compute capability at least, got none")
        if not self.parts or min(self.parts) < 1:
            raise ContractError(f"engine recipe: want parts of one layer at least, got {self.parts}")
