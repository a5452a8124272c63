"""Engine directories for the fake GPU: real manifests, and plans that name an ONNX graph and its profiles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llava_deploy.engines.contract import GraphSpec
from llava_deploy.engines.decoder_parts import layer_ranges, part_spec
from llava_deploy.engines.engine_manifest import (
    ENGINE_FORMAT_VERSION,
    ENGINE_MANIFEST,
    VISION_PLAN,
    EngineKey,
    EngineManifest,
    decoder_plans,
    source_digest,
)
from llava_deploy.engines.lowering.decoder_layers import TakeLayers
from llava_deploy.engines.lowering.files import lower_file
from llava_deploy.engines.lowering.tensorrt import decoder_passes, vision_passes
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, describe_file, read_manifest
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt.constructs import release_of
from llava_deploy.engines.tensorrt_module import TensorRtBackend, TensorRtModule
from llava_deploy.engines.tensorrt_recipe import EngineLimits, TensorRtRecipe


def decoder_sizes(limits: EngineLimits, cache: CacheForm) -> list[dict[str, tuple[int, int, int]]]:
    """Lowest, best and highest of each named dim: prefill's profile and decode's."""
    growing = cache == "growing"
    batch, most = (1, limits.opt_batch, limits.max_batch), limits.max_len
    profiles = []
    for seq, total in (((1, limits.opt_seq, limits.max_seq), limits.opt_seq), ((1, 1, 1), limits.opt_total)):
        profiles.append({
            "batch": batch,
            "seq": seq,
            "total": (2, total + 1, most + seq[2]) if growing else (1, total, most),
            "past_len": (1, total, most),
            "max_len": (most, most, most),
        })  # fmt: skip
    return profiles


def profiles_of(spec: GraphSpec, sizes: Sequence[dict[str, tuple[int, int, int]]]) -> list[dict[str, Any]]:
    """For each profile and input, its lowest, best and highest shape."""
    return [
        {
            each.name: [[dim if isinstance(dim, int) else profile[dim][i] for dim in each.shape] for i in range(3)]
            for each in spec.inputs
        }
        for profile in sizes
    ]


def write_engine(
    bundle: Path,
    directory: Path | None,
    graphs: Path,
    *,
    backend: TensorRtBackend,
    version: str,
    limits: EngineLimits,
    capabilities: tuple[str, ...],
    cache: CacheForm,
    parts: tuple[int, ...] | None,
    passes: Sequence[ir.passes.InPlacePass] | None,
    version_compatible: bool,
    refittable: bool,
) -> Path:
    """Write an engine's directory, by default where the bundle's engines are; lowered graphs go below ``graphs``."""
    manifest = read_manifest(bundle)
    release = release_of(TensorRtModule(backend, None, version))
    spoken = f"{release.major}.{release.minor}"
    shape, vision = manifest.decoder, manifest.vision.spec(limits.max_images)
    parts = (shape.layers,) if parts is None else parts
    recipe = TensorRtRecipe(spoken, cache, parts, limits, capabilities, None, version_compatible, refittable)
    key = EngineKey(backend, version, "-".join(capabilities), source_digest(manifest), None, recipe)
    directory = bundle / key.directory if directory is None else directory
    directory.mkdir(parents=True)
    passes = decoder_passes(cache, limits.max_len) if passes is None else passes
    whole = shape.spec(limits.max_batch) if cache == "in-place" else shape.growing_spec(limits.max_batch)
    tower = lower_file(bundle / VISION_GRAPH, graphs, vision_passes(release))
    plans = {VISION_PLAN: (tower, profiles_of(vision, [{"images": (1, limits.opt_images, limits.max_images)}]))}
    for plan, layers in zip(decoder_plans(recipe), layer_ranges(parts), strict=True):
        (place := graphs / plan).mkdir()
        onnx = lower_file(bundle / DECODER_GRAPH, place, [TakeLayers(layers), *passes])
        plans[plan] = onnx, profiles_of(part_spec(whole, shape, layers), decoder_sizes(limits, cache))
    common = {"backend": backend, "version": version, "capabilities": capabilities, "cache": cache}
    common["refittable"] = refittable
    write_plans(directory, common, plans)
    files = tuple(describe_file(directory, plan) for plan in plans)
    text = EngineManifest(ENGINE_FORMAT_VERSION, key, {"fake": "1"}, files).to_json()
    (directory / ENGINE_MANIFEST).write_text(text, encoding="utf-8")
    return directory


def write_plans(directory: Path, common: Mapping[str, Any], plans: Mapping[str, tuple[Path, list[Any]]]) -> None:
    """Plans that name their graph and profiles."""
    for plan, (onnx, profiles) in plans.items():
        content = {**common, "onnx": str(onnx.resolve()), "profiles": profiles}
        (directory / plan).write_text(json.dumps(content), encoding="utf-8")
