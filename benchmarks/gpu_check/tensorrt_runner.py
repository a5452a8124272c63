"""A graph on TensorRT for Polygraphy: lowered by the project's passes, built and run by Polygraphy's loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from outcome import NotRunError
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.trt import (
    CreateConfig,
    EngineBytesFromNetwork,
    EngineFromBytes,
    NetworkFromOnnxPath,
    PostprocessNetwork,
    Profile,
    TrtRunner,
)

from llava_deploy.engines.lowering.files import lower_file
from llava_deploy.engines.lowering.tensorrt import decoder_passes, vision_passes
from llava_deploy.engines.manifest import DECODER_GRAPH, Manifest
from llava_deploy.engines.tensorrt.adapter import network_flags
from llava_deploy.engines.tensorrt.attention import allow_decomposition
from llava_deploy.engines.tensorrt.checks import with_sizes
from llava_deploy.engines.tensorrt.constructs import cache_form, release_of
from llava_deploy.engines.tensorrt.profiles import decoder_profiles, decoder_spec, vision_profiles
from llava_deploy.engines.tensorrt_module import TensorRtBackend, import_tensorrt
from llava_deploy.engines.tensorrt_recipe import PREFILL_PROFILE, EngineLimits


def tensorrt_runner(
    backend: TensorRtBackend, graph: Path, manifest: Manifest, slots: int, marks: Sequence[ir.passes.InPlacePass],
    place: Path,
) -> BaseRunner:  # fmt: skip
    """A runner of the graph; ``marks`` are applied before it is lowered, and lowered files go to ``place``."""
    plan = engine_bytes(backend, graph, manifest, slots, marks, place, ())
    return TrtRunner(EngineFromBytes(plan), name=f"{backend}, {graph.stem}")


def engine_bytes(
    backend: TensorRtBackend, graph: Path, manifest: Manifest, slots: int, marks: Sequence[ir.passes.InPlacePass],
    place: Path, capabilities: Sequence[tuple[int, int]],
) -> Callable[[], Any]:  # fmt: skip
    """A loader of the built engine, for one row.

    Args:
        backend: which module builds.
        graph: canonical, in its bundle.
        manifest: of the bundle.
        slots: of the decoder's cache.
        marks: passes before those of the lowering.
        place: for the lowered files.
        capabilities: to build for, by TensorRT for RTX; none: this machine's GPU.
    """
    module = import_tensorrt(backend)
    release = release_of(module)
    cache = cache_form(release)
    limits = EngineLimits(1, max(1, slots), max(1, slots), 1, 1, max(1, slots), max(1, slots), 1)
    if graph.name == DECODER_GRAPH:
        if cache != "in-place":
            raise NotRunError(f"{release} has a growing cache, which these feeds do not fit; verify compares it")
        passes = decoder_passes(cache, slots)
        spec = with_sizes(decoder_spec(manifest.decoder, limits, cache), {"max_len": slots})
        ranges = decoder_profiles(spec, limits, cache)[PREFILL_PROFILE]
    else:
        passes = vision_passes(release)
        (ranges,) = vision_profiles(manifest.vision.spec(), limits)
    lowered = lower_file(graph, place, [*marks, *passes])
    profile = Profile()
    for name, sizes in ranges.items():
        profile.add(name, sizes.least, sizes.usual, sizes.most)

    def unfused(network: Any) -> None:
        allow_decomposition(module.api, network)

    parsed = NetworkFromOnnxPath(str(lowered), strongly_typed=bool(network_flags(module)))
    return EngineBytesFromNetwork(PostprocessNetwork(parsed, unfused), _config(backend, [profile], capabilities))


def _config(backend: TensorRtBackend, profiles: list[Profile], capabilities: Sequence[tuple[int, int]]) -> Any:
    if backend == "tensorrt":
        return CreateConfig(profiles=profiles)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    if capabilities:
        return CreateConfigRTX(profiles=profiles, compute_capabilities=list(capabilities))
    return CreateConfigRTX(profiles=profiles, use_gpu=True)
