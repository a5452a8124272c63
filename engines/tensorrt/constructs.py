"""Which release of TensorRT takes which construct of the graphs, and where that is said. Standard library only.

Releases of TensorRT for RTX have numbers of their own; what is known of them is what was parsed here with one of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt_module import SPOKEN, TensorRtBackend, TensorRtModule

ConstructName = Literal[
    "strongly typed network",
    "LayerNormalization",
    "Gelu",
    "INT64 inputs",
    "int4 weights in blocks",
    "int4 zero points",
    "tensor axes of Slice",
    "Attention",
    "Attention with a past",
    "Attention with nonpad_kv_seqlen",
    "RotaryEmbedding",
    "RMSNormalization",
    "TensorScatter",
]

_NUMBER = re.compile(r"(\d{1,4})\.(\d{1,4})(\.\d+)*", re.ASCII)
_CHANGELOG = "changelog of the ONNX parser (onnx-tensorrt, docs/Changelog.md)"
_OPERATORS = "operators list of the ONNX parser (onnx-tensorrt, docs/operators.md)"
_HERE = "parsed and built here with TensorRT for RTX 1.7.1.116"
_REFUSED = "refused here by TensorRT for RTX 1.7.1.116"


@dataclass(frozen=True, order=True)
class Release:
    """A release of one of the two modules, by its major and minor number."""

    backend: TensorRtBackend
    major: int
    minor: int

    def __str__(self) -> str:
        return f"{SPOKEN[self.backend]} {self.major}.{self.minor}"

    @property
    def number(self) -> tuple[int, int]:
        """Major and minor, which compare."""
        return self.major, self.minor


OLDEST: dict[TensorRtBackend, Release] = {
    "tensorrt": Release("tensorrt", 10, 3),
    "tensorrt-rtx": Release("tensorrt-rtx", 1, 7),
}
"""The first releases that graphs are lowered for: that of JetPack 6.1, and the one that was built with here."""


@dataclass(frozen=True)
class Construct:
    """A row of the table.

    Attributes:
        tensorrt: first release of TensorRT that takes it, by its parser; ``None``: none does.
        rtx: first release of TensorRT for RTX that is known to take it; ``None``: none is.
        source: who says so.
    """

    tensorrt: tuple[int, int] | None
    rtx: tuple[int, int] | None
    source: str


CONSTRUCTS: dict[ConstructName, Construct] = {
    "strongly typed network": Construct((10, 0), (1, 0), f"bindings of TensorRT 10.3 list the flag; {_HERE}"),
    "LayerNormalization": Construct((8, 6), (1, 7), f"{_CHANGELOG}, 8.6 EA; {_HERE}"),
    "Gelu": Construct((10, 0), (1, 7), f"{_OPERATORS} of 10.6, no entry in the changelog of 10.1 to 10.6; {_HERE}"),
    "INT64 inputs": Construct((9, 0), (1, 7), f"{_CHANGELOG}, 9.0 EA; {_HERE}"),
    "int4 weights in blocks": Construct((10, 0), (1, 7), f"{_CHANGELOG}, 10.0 EA; {_HERE}, weights stay in 4 bits"),
    "int4 zero points": Construct(None, None, f"{_OPERATORS} of 10.6 and 10.15: x_zero_point must be zero; {_REFUSED}"),
    "tensor axes of Slice": Construct((10, 3), (1, 7), f"{_CHANGELOG}, 10.3 GA; {_HERE}"),
    "Attention": Construct((10, 14), (1, 7), f"{_CHANGELOG}, 10.14 GA; {_HERE}, fused"),
    "Attention with a past": Construct(None, None, f"{_OPERATORS} of 10.15: unsupported; {_REFUSED}"),
    "Attention with nonpad_kv_seqlen": Construct(
        None, None, f"{_OPERATORS} of 10.15: unsupported; TensorRT for RTX 1.7.1.116 reports it unused, and ignores it"
    ),
    "RotaryEmbedding": Construct((10, 15), (1, 7), f"{_CHANGELOG}, 10.15 GA; {_HERE}"),
    "RMSNormalization": Construct((10, 15), (1, 7), f"{_CHANGELOG}, 10.15 GA; {_HERE}"),
    "TensorScatter": Construct(
        (10, 15), (1, 7), f"{_CHANGELOG}, 10.15 GA; {_HERE}, as KV_CACHE_UPDATE of a cache of static length"
    ),
}
"""The table."""

_ROWS = {"DequantizeLinear": "int4 weights in blocks", "Slice": "tensor axes of Slice"}
_IN_PLACE: tuple[ConstructName, ...] = ("Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter")


def parse_release(text: str) -> Release:
    """Of the full TensorRT: ``10.3``, or a version in full, ``10.3.0.26``.

    Raises:
        OptionError: of ``trt_version``: it is no version, or an older one than :data:`OLDEST`.
    """
    match = _NUMBER.fullmatch(text.strip())
    oldest = OLDEST["tensorrt"]
    wanted = f"want a release of {SPOKEN['tensorrt']} from {oldest.major}.{oldest.minor} on, as in 10.3"
    if match is None:
        raise OptionError("trt_version", f"{wanted}, got {text!r:.60}")
    release = Release("tensorrt", int(match[1]), int(match[2]))
    if release.number < oldest.number:
        raise OptionError("trt_version", f"{wanted}, got {text!r}: it takes too few of the graphs' operators")
    return release


def release_of(module: TensorRtModule) -> Release:
    """The release of the module that is installed."""
    return Release(module.backend, *module.release)


def takes(release: Release, construct: ConstructName) -> bool:
    """Whether graphs for ``release`` may have it."""
    row = CONSTRUCTS[construct]
    first = row.tensorrt if release.backend == "tensorrt" else row.rtx
    return first is not None and release.number >= first


def cache_form(release: Release) -> CacheForm:
    """``in-place`` where the release has all operators of the canonical decoder, else ``growing``."""
    return "in-place" if all(takes(release, name) for name in _IN_PLACE) else "growing"


def explain(construct: ConstructName) -> str:
    """One line for people: since when, and who says so."""
    row = CONSTRUCTS[construct]
    since = [
        f"{name} {first[0]}.{first[1]}" for name, first in (("TensorRT", row.tensorrt), ("for RTX", row.rtx)) if first
    ]
    return f"{construct}: {'from ' + ', '.join(since) + ' on' if since else 'no release'} ({row.source})"


def construct_of(operator: str) -> ConstructName | None:
    """The row of the table that an ONNX operator of a graph belongs to, for messages."""
    for name in get_args(ConstructName):
        if name == _ROWS.get(operator, operator):
            return name
    return None
