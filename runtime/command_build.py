"""What ``build`` asks for a TensorRT engine. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click

from llava_deploy.engines.names import LARGEST_PART
from llava_deploy.runtime.command_group import options_as_one, refuse_given
from llava_deploy.runtime.command_options import PATH

_MIB = 1 << 20


@dataclass(frozen=True)
class TensorRtRequest:
    """Options of a build, by the names of the builder's own; ``None``: the bundle or the machine says it."""

    max_batch: int | None
    max_len: int | None
    max_images: int | None
    max_seq: int | None
    opt_batch: int | None
    opt_seq: int | None
    opt_total: int | None
    opt_images: int | None
    sm: tuple[str, ...]
    workspace: int | None
    parts: int | None
    version_compatible: bool
    refit: bool
    timing_cache: Path | None
    trt_version: str | None

    @property
    def workspace_bytes(self) -> int | None:
        """``workspace``, which is in MiB."""
        return None if self.workspace is None else self.workspace * _MIB


def refuse_tensorrt_options(reason: str) -> None:
    """Refuse all of them, of a command that has none of their use.

    Raises:
        UsageError: one was given.
    """
    refuse_given(reason, *(field.name for field in dataclasses.fields(TensorRtRequest)))


parts_option = click.option(
    "--parts",
    type=int,
    help=f"Of TensorRT: plans of the decoder, built in turn; by default few, of {LARGEST_PART / 1e9:.2f} GB at most.",
)
tensorrt_options = options_as_one(
    "tensorrt",
    TensorRtRequest,
    click.option("--max-batch", type=int, help="Of TensorRT: prompts at once; 1 by default."),
    click.option("--max-len", type=int, help="Of TensorRT: slots of the KV cache; by default the model's positions."),
    click.option("--max-images", type=int, help="Of TensorRT: pictures in one run of the tower; as many as prompts."),
    click.option("--max-seq", type=int, help="Of TensorRT: tokens of a prompt in one run; 1024 by default."),
    click.option("--opt-batch", type=int, help="Of TensorRT: prompts that kernels are chosen for."),
    click.option("--opt-seq", type=int, help="Of TensorRT: prompt tokens that kernels are chosen for."),
    click.option("--opt-total", type=int, help="Of TensorRT: context that the kernels of decode are chosen for."),
    click.option("--opt-images", type=int, help="Of TensorRT: pictures that kernels are chosen for."),
    click.option(
        "--sm", multiple=True, metavar="NAME", help="Of tensorrt-rtx: compute capability, as sm89; repeatable."
    ),
    click.option("--workspace", type=int, metavar="MIB", help="Of TensorRT: memory that a layer may use beside."),
    parts_option,
    click.option("--version-compatible", is_flag=True, help="Of TensorRT: for later versions of its runtime too."),
    click.option("--refit", is_flag=True, help="Of TensorRT: weights can be replaced in the engine."),
    click.option("--timing-cache", type=PATH, metavar="FILE", help="Of TensorRT: measured kernels, read and written."),
    click.option("--trt-version", metavar="VERSION", help="Of TensorRT: use an older release's operators, as 10.3."),
)
