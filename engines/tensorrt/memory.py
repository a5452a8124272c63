"""Whether a build will have the memory that it is planned to take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.engines.planner.build import build_memory
from llava_deploy.engines.planner.machine import available_memory
from llava_deploy.engines.planner.model import PlannedModel, Sizes
from llava_deploy.engines.tensorrt.adapter import free_device_memory
from llava_deploy.engines.tensorrt_module import TensorRtModule
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe


class BuildMemoryError(LlavaDeployError):
    """A build is planned to take more memory than there is."""


def require_memory(
    bundle: Path,
    model: PlannedModel,
    module: TensorRtModule,
    recipe: TensorRtRecipe,
    on_warning: Callable[[str], None],
    *,
    enforce: bool,
) -> None:
    """Hold the plan of a build against what this machine has; without ``enforce``, say what is missing, and go on.

    Raises:
        BuildMemoryError: there is too little, on the host or on the GPU.
    """
    planned = build_memory(model, module.backend, Sizes.of(recipe.limits), recipe.cache, recipe.parts)
    device = free_device_memory() if planned.device else None
    for where, wanted, free in (
        ("memory", planned.anonymous, available_memory()),
        ("memory of the GPU", planned.device, device),
    ):
        if free is None or wanted <= free:
            continue
        problem = f"{bundle}: the build is planned to take {wanted:,} bytes of {where}, {free:,} are free"
        if enforce:
            smaller = "" if len(recipe.parts) == model.decoder.layers else "in more --parts, "
            raise BuildMemoryError(f"{problem}; free some, build {smaller}on a larger machine, or go on with --force")
        on_warning(f"{problem}; going on")
