"""What may be asked of a TensorRT build, and what follows from it and from the bundle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.manifest import Manifest
from llava_deploy.engines.names import PREFILL_TOKENS
from llava_deploy.engines.tensorrt_module import TensorRtBackend
from llava_deploy.engines.tensorrt_recipe import EngineLimits

_MOST_ROWS = 1024
_TEXT = 64  # tokens of a question beside its picture, which kernels are chosen for
_ANSWER = 128  # tokens of an answer, likewise
_LARGEST_WORKSPACE = 1 << 40  # bytes: beyond what any GPU has, and less than TensorRT's sums overflow at
_CAPABILITY = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)", re.ASCII)


@dataclass(frozen=True)
class TensorRtBuildOptions:
    """Of one build; ``None`` where the bundle or the machine says it.

    Attributes:
        backend: which module builds.
        max_batch: rows at once; 1.
        max_len: slots of the KV cache; all positions that the model knows.
        max_images: pictures in one run of the vision graph; as many as rows.
        max_seq: new tokens of a row in one run; 1024, or ``max_len`` where that is less. Longer prompts are read in
            pieces.
        opt_batch: rows that kernels are chosen for; ``max_batch``.
        opt_seq: tokens of a prompt that they are chosen for; a picture and a question's.
        opt_total: visible slots that decode's are chosen for; such a prompt and its answer.
        opt_images: pictures that they are chosen for; ``max_images``.
        capabilities: compute capabilities to build for, as ``sm89``; none: the GPU of this machine. More than one, or
            another than this machine's, is for TensorRT for RTX.
        workspace: bytes that a layer may use beside its tensors; what TensorRT takes.
        version_compatible: later versions of TensorRT's runtime may run the engines.
        refit: weights can be replaced in the engines.
        timing_cache: file of measured kernels, read where it is there and written after the build.
        release: of TensorRT, as ``10.3``, whose dialect the graphs are lowered to; the module's.
        parts: plans that the decoder is built as, which bounds what a build takes of memory; as few as keep each to
            :data:`~llava_deploy.engines.names.LARGEST_PART`.
        skip_memory_check: go on where the plan says that memory will not do.
    """

    backend: TensorRtBackend
    max_batch: int | None = None
    max_len: int | None = None
    max_images: int | None = None
    max_seq: int | None = None
    opt_batch: int | None = None
    opt_seq: int | None = None
    opt_total: int | None = None
    opt_images: int | None = None
    capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    version_compatible: bool = False
    refit: bool = False
    timing_cache: Path | None = None
    release: str | None = None
    parts: int | None = None
    skip_memory_check: bool = False


def resolve_limits(options: TensorRtBuildOptions, manifest: Manifest) -> EngineLimits:
    """The limits that are asked for, the bundle's where none are.

    Raises:
        OptionError: one beyond what the model has, or beyond another that bounds it.
    """
    positions, patches = manifest.decoder.max_positions, manifest.vision.patches
    max_batch = _within("max_batch", options.max_batch, 1, _MOST_ROWS, "rows")
    max_len = _within("max_len", options.max_len, positions, positions, "positions of the model")
    max_images = _within("max_images", options.max_images, max_batch, _MOST_ROWS, "pictures")
    max_seq = _within("max_seq", options.max_seq, PREFILL_TOKENS, max_len, "the cache's length, --max-len")
    opt_seq = _within("opt_seq", options.opt_seq, patches + _TEXT, max_seq, "--max-seq")
    return EngineLimits(
        max_batch=max_batch,
        max_len=max_len,
        max_seq=max_seq,
        max_images=max_images,
        opt_batch=_within("opt_batch", options.opt_batch, max_batch, max_batch, "--max-batch"),
        opt_seq=opt_seq,
        opt_total=_within("opt_total", options.opt_total, opt_seq + _ANSWER, max_len, "--max-len"),
        opt_images=_within("opt_images", options.opt_images, max_images, max_images, "--max-images"),
    )


def normal_capability(text: str) -> str:
    """``8.9``, ``89``, ``sm_89`` and ``sm89``, all as ``sm89``.

    Raises:
        OptionError: it is none.
    """
    match = _CAPABILITY.fullmatch(text.strip().lower())
    if match is None:
        raise OptionError("sm", f"want compute capabilities such as sm89 or 8.9, got {text!r}")
    return f"sm{int(match[1])}{match[2]}"


def check_workspace(workspace: int | None) -> None:
    """Refuse a workspace of no bytes, and one that no GPU has.

    Raises:
        OptionError: it is not positive, or beyond :data:`_LARGEST_WORKSPACE`.
    """
    if workspace is not None and not 1 <= workspace <= _LARGEST_WORKSPACE:
        raise OptionError("workspace", f"want 1 byte to {_LARGEST_WORKSPACE >> 20:,} MiB, got {workspace:,} bytes")


def _within(option: str, wanted: int | None, usual: int, most: int, what: str) -> int:
    """``wanted``, or else ``usual`` as far as ``most`` goes."""
    if wanted is None:
        return min(usual, most)
    if not 1 <= wanted <= most:
        raise OptionError(option, f"want 1 to {most} ({what}), got {wanted}")
    return wanted
