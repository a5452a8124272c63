"""Whether a bundle fits a machine that somebody else has looked at."""

from __future__ import annotations

from pathlib import Path

from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.planner.boards import Board
from llava_deploy.engines.planner.model import planned_bundle
from llava_deploy.engines.planner.plan import StagePlan, plan, resolve_sizes


def stages_here(
    bundle: Path,
    host: int | None,
    device: int | None,
    capability: str | None,
    tensorrt: str | None,
    *,
    is_unified: bool,
) -> tuple[StagePlan, ...]:
    """Plan build and run of one row at the model's full length.

    Args:
        bundle: its directory.
        host: bytes of memory to be had; ``None`` where nobody knows.
        device: of the GPU, likewise; of no meaning where it shares the host's.
        capability: compute capability of the GPU, as ``sm89``; ``None`` without one.
        tensorrt: release of TensorRT, as ``10.3``; ``None`` without one.
        is_unified: host and GPU share their memory.

    Raises:
        BundleError: no bundle, or one whose graphs were left out: they are what is planned by.
    """
    model = planned_bundle(bundle, read_manifest(bundle))
    board = Board(
        name="auto",
        title="this machine",
        memory=host if is_unified else device,
        host=None if is_unified else host,
        is_unified=is_unified,
        bandwidth=None,
        capability=capability,
        tensorrt=tensorrt,
        source="llava-deploy doctor",
    )
    return plan(model, board, resolve_sizes(model, 1, None, None), None).stages
