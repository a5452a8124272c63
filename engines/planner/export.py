"""Memory at the peak of an export."""

from __future__ import annotations

from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import PlannedModel


def export_memory(model: PlannedModel) -> Memory:
    """Peak of ``llava-deploy export`` of a checkpoint."""
    return Memory((Part("weights", "mapped", model.source.largest.nbytes if model.source else 0),))
