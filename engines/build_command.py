"""The command that builds an engine again, with the options that it was built with. Standard library only."""

from __future__ import annotations

import shlex
from pathlib import Path

from llava_deploy.engines.engine_manifest import EngineKey
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe

_MIB = 1 << 20


def build_command(bundle: Path, key: EngineKey) -> str:
    """What to type to have the engine of ``key`` built again, for the graphs that ``bundle`` holds now."""
    words = ["llava-deploy", "build", str(bundle), "--backend", key.backend]
    if key.accuracy_level is not None:
        words += ["--accuracy-level", str(key.accuracy_level)]
    for part in key.int8:
        words += ["--int8", part]
    if key.tensorrt is not None:
        words += _tensorrt_words(key, key.tensorrt)
    return shlex.join(words)


def _tensorrt_words(key: EngineKey, recipe: TensorRtRecipe) -> list[str]:
    limits = recipe.limits
    numbers = {
        "--max-batch": limits.max_batch,
        "--max-len": limits.max_len,
        "--max-images": limits.max_images,
        "--max-seq": limits.max_seq,
        "--opt-batch": limits.opt_batch,
        "--opt-seq": limits.opt_seq,
        "--opt-total": limits.opt_total,
        "--opt-images": limits.opt_images,
        "--parts": len(recipe.parts),
    }
    words = [word for option, number in numbers.items() for word in (option, str(number))]
    if key.backend == "tensorrt-rtx":
        words += [word for name in recipe.capabilities for word in ("--sm", name)]
    if recipe.workspace is not None:
        words += ["--workspace", str(max(1, recipe.workspace // _MIB))]
    if recipe.version_compatible:
        words.append("--version-compatible")
    if recipe.refittable:
        words.append("--refit")
    if key.version.split(".")[:2] != recipe.release.split("."):
        words += ["--trt-version", recipe.release]
    return words
