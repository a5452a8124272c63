"""Engine directories for the fake GPU: real manifests, and plans that name an ONNX graph and its profiles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llava_deploy.engines.contract import GraphSpec
from llava_deploy.engines.engine_manifest import (
    ENGINE_FORMAT_VERSION,
    ENGINE_MANIFEST,
    EngineKey,
    EngineManifest,
    source_digest,
)
from llava_deploy.engines.lowering.files import lower_file
from llava_deploy.engines.lowering.tensorrt import decoder_passes, vision_passes
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, describe_file, read_manifest
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt.constructs import release_of
from llava_deploy.engines.tensorrt_module import TensorRtBackend, TensorRtModule
from llava_deploy.engines.tensorrt_recipe import EngineLimits, TensorRtRecipe

PLANS = ("vision.plan", "decoder.plan")


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
    passes: Sequence[ir.passes.InPlacePass] | None,
    version_compatible: bool,
) -> Path:
    """Write an engine's directory, by default where the bundle's engines are; lowered graphs go below ``graphs``."""
    manifest = read_manifest(bundle)
    release = release_of(TensorRtModule(backend, None, version))
    spoken = f"{release.major}.{release.minor}"
    recipe = TensorRtRecipe(spoken, cache, limits, capabilities, None, version_compatible, refittable=False)
    key = EngineKey(backend, version, "-".join(capabilities), source_digest(manifest), None, recipe)
    directory = bundle / key.directory if directory is None else directory
    directory.mkdir(parents=True)
    passes = decoder_passes(cache, limits.max_len) if passes is None else passes
    decoder = lower_file(bundle / DECODER_GRAPH, graphs, passes)
    shape, vision = manifest.decoder, manifest.vision.spec(limits.max_images)
    spec = shape.spec(limits.max_batch) if cache == "in-place" else shape.growing_spec(limits.max_batch)
    profiles = {
        "vision.plan": profiles_of(vision, [{"images": (1, limits.opt_images, limits.max_images)}]),
        "decoder.plan": profiles_of(spec, decoder_sizes(limits, cache)),
    }
    tower = lower_file(bundle / VISION_GRAPH, graphs, vision_passes(release))
    for plan, onnx in zip(PLANS, (tower, decoder), strict=True):
        content = {
            "backend": backend, "version": version, "capabilities": capabilities, "cache": cache,
            "onnx": str(onnx.resolve()), "profiles": profiles[plan],
        }  # fmt: skip
        (directory / plan).write_text(json.dumps(content), encoding="utf-8")
    files = tuple(describe_file(directory, plan) for plan in PLANS)
    text = EngineManifest(ENGINE_FORMAT_VERSION, key, {"fake": "1"}, files).to_json()
    (directory / ENGINE_MANIFEST).write_text(text, encoding="utf-8")
    return directory
