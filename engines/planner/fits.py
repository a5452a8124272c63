"""Whether a bundle fits a machine that somebody else has looked at."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from llava_deploy.engines.fitting import Fit, Room
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.names import Backend
from llava_deploy.engines.planner.boards import Board
from llava_deploy.engines.planner.model import planned_bundle
from llava_deploy.engines.planner.plan import plan, resolve_sizes


def fits_here(bundle: Path, room: Room) -> dict[Backend, Fit]:
    """Plan build and run of one row at the model's full length, with every backend.

    Args:
        bundle: its directory.
        room: what the machine has.

    Raises:
        BundleError: no bundle, or one whose graphs were left out: they are what is planned by.
    """
    model = planned_bundle(bundle, read_manifest(bundle))
    board = Board(
        name="auto",
        title="this machine",
        memory=room.host if room.is_unified else room.device,
        host=None if room.is_unified else room.host,
        is_unified=room.is_unified,
        bandwidth=None,
        capability=room.capability,
        tensorrt=room.tensorrt,
        source="llava-deploy doctor",
    )
    stages = plan(model, board, resolve_sizes(model, 1, None, None), None).stages
    planned = {(stage.stage, stage.backend): stage for stage in stages}
    found = {}
    for backend in get_args(Backend):
        run, build = planned["run", backend], planned["build", backend]
        found[backend] = Fit(run.fits, build.fits, run.largest_len)
    return found
