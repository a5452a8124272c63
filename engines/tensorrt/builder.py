"""Bundle to TensorRT engines: the canonical graphs, lowered, parsed, held against the contract, built.

One plan after the other, the decoder in as many as it has parts: each is done with before the next begins. Weights that
no pass computes are read where they lie in the bundle, and a plan goes to its file as it is made, so that what a build
has in memory is what TensorRT needs for the largest of them.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.engine_manifest import (
    EngineKey,
    graphs_size,
    is_current,
    source_digest,
    write_engine_manifest,
)
from llava_deploy.engines.errors import BackendError, OptionError, lacks_onnx_ir
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import Manifest, read_manifest
from llava_deploy.engines.planner.model import PlannedModel, planned_bundle
from llava_deploy.engines.planner.parts import decoder_parts, part_weights
from llava_deploy.engines.staging import require_space, staged_directory, write_error
from llava_deploy.engines.tensorrt.adapter import (
    require_supported,
    resolve_capabilities,
    serialize,
    set_flags,
    set_targets,
)
from llava_deploy.engines.tensorrt.attention import allow_decomposition
from llava_deploy.engines.tensorrt.checks import (
    ExpectedLayers,
    check_network,
    expected_decoder,
    expected_vision,
)
from llava_deploy.engines.tensorrt.constructs import OLDEST, Release, cache_form, parse_release, release_of
from llava_deploy.engines.tensorrt.graphs import WHOLE, EngineGraph, engine_graphs
from llava_deploy.engines.tensorrt.heap import give_back_freed_memory, trim_heap
from llava_deploy.engines.tensorrt.memory import require_memory
from llava_deploy.engines.tensorrt.messages import Messages
from llava_deploy.engines.tensorrt.network import parse_network, title
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions, check_workspace, resolve_limits
from llava_deploy.engines.tensorrt.profiles import add_profiles
from llava_deploy.engines.tensorrt.progress import BuildProgress, Phases, make_monitor, run_watched
from llava_deploy.engines.tensorrt.timing import load_timing_cache, save_timing_cache
from llava_deploy.engines.tensorrt_module import TensorRtModule, import_tensorrt
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe

_LOWERED = "lowered"  # directory of lowered graphs, inside the staging directory while they are wanted

Report = Callable[[BuildProgress], None]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class _Build:
    """What is the same for all graphs."""

    bundle: Path
    module: TensorRtModule
    release: Release
    recipe: TensorRtRecipe
    timing_cache: Path | None
    on_progress: Report
    on_warning: Warn


def build_tensorrt(
    bundle: Path,
    options: TensorRtBuildOptions,
    *,
    replace: bool = False,
    on_progress: Report = lambda _: None,
    on_warning: Warn = lambda _: None,
) -> Path:
    """Build the engines of both graphs, the decoder's in parts, and return their directory.

    Engines that are there already, for the same graphs, version, GPUs and limits, and whole, are kept. After an error,
    Ctrl-C or a kill there is what was there before.

    Args:
        bundle: a bundle's directory.
        options: see :class:`~llava_deploy.engines.tensorrt.options.TensorRtBuildOptions`.
        replace: build them even so.
        on_progress: told of it, in the thread that called.
        on_warning: told of what TensorRT says that changes no result, and of memory that may not do.

    Raises:
        BundleError: the bundle is damaged.
        OptionError: an option has a value that it cannot have, for this bundle, module or machine.
        BackendError: TensorRT, cuda-python or onnx-ir is missing, there is no GPU where one is needed, or TensorRT
            refuses a graph or reads another one in it.
        LlavaDeployError: too little memory, or the bundle's directory cannot be written to, or its disk is full.
    """
    manifest = read_manifest(bundle)
    limits = resolve_limits(options, manifest)
    check_workspace(options.workspace)
    module = import_tensorrt(options.backend)
    require_supported(module, options)
    release = _release(module, options.release)
    model = planned_bundle(bundle, manifest)
    recipe = TensorRtRecipe(
        release=f"{release.major}.{release.minor}",
        cache=cache_form(release),
        parts=decoder_parts(model, options.parts),
        limits=limits,
        capabilities=resolve_capabilities(module, options.capabilities),
        workspace=options.workspace,
        version_compatible=options.version_compatible,
        refittable=options.refit,
    )
    check_files(bundle, manifest.files, Integrity.FULL, remedy="export the bundle again")
    device = "-".join(recipe.capabilities)
    key = EngineKey(module.backend, module.version, device, source_digest(manifest), None, recipe)
    output = bundle / key.directory
    if not replace and is_current(output, key):
        return output
    graphs = engine_graphs(manifest, model, recipe)
    require_space(bundle, _space(manifest, graphs, model))
    require_memory(bundle, model, module, recipe, on_warning, enforce=not options.skip_memory_check)
    build = _Build(bundle, module, release, recipe, options.timing_cache, on_progress, on_warning)
    give_back_freed_memory()
    try:
        with staged_directory(output, replace=True) as staging:
            write_engine_manifest(staging, key, [_build_graph(build, graph, staging) for graph in graphs])
    except OSError as error:
        raise write_error(output, error) from error
    return output


def _release(module: TensorRtModule, wanted: str | None) -> Release:
    """Whose dialect is spoken: an older one than the module's, where that is wanted."""
    own, oldest = release_of(module), OLDEST[module.backend]
    if own.number < oldest.number:
        raise BackendError(f"want {oldest} or later, found {title(module)}, which lacks operators of the graphs")
    if wanted is None:
        return own
    release = parse_release(wanted)
    if release.backend == own.backend and release.number > own.number:
        raise OptionError("trt_version", f"want a release up to the one installed, {title(module)}, got {wanted}")
    return release


def _space(manifest: Manifest, graphs: Sequence[EngineGraph], model: PlannedModel) -> int:
    """Bytes on the disk: the engines, and for a while the weights without zero points of the largest part."""
    quantization = manifest.quantization
    rewritten = quantization is not None and not quantization.symmetric
    parts = [part_weights(model, graph.layers).nbytes for graph in graphs if graph.layers is not None]
    return graphs_size(manifest) + (max(parts) if rewritten else 0)


def _build_graph(build: _Build, graph: EngineGraph, staging: Path) -> str:
    """Lower, parse, check and build one graph; the name of its plan in ``staging``."""
    build.on_progress(BuildProgress(graph.spec.name, "Lowering the graph", graph.begins, WHOLE))
    lowered = staging / _LOWERED
    lowered.mkdir()
    path, expected = _lower(build, graph, lowered)
    gc.collect()  # the model's values refer to each other: nothing else frees it, and the maps of the bundle's files
    build.on_progress(BuildProgress(graph.spec.name, "Parsing the graph", graph.begins, WHOLE))
    _parse_and_serialize(build, graph, path, expected, staging / graph.plan)
    trim_heap()
    shutil.rmtree(lowered)
    return graph.plan


def _lower(build: _Build, graph: EngineGraph, directory: Path) -> tuple[Path, ExpectedLayers]:
    try:
        from llava_deploy.engines.lowering.decoder_layers import TakeLayers
        from llava_deploy.engines.lowering.files import lower_beside
        from llava_deploy.engines.lowering.tensorrt import decoder_passes, vision_passes
    except ImportError as error:
        raise lacks_onnx_ir(error) from error
    source, cache = build.bundle / graph.source, build.recipe.cache
    if graph.layers is None:
        tower = lower_beside(source, directory, vision_passes(build.release))
        return tower.path, expected_vision(tower.operators["Attention"])
    passes = [TakeLayers(graph.layers), *decoder_passes(cache, build.recipe.limits.max_len)]
    return lower_beside(source, directory, passes).path, expected_decoder(graph.layers, graph.quantized, cache)


def _parse_and_serialize(build: _Build, graph: EngineGraph, path: Path, expected: ExpectedLayers, plan: Path) -> None:
    module, recipe = build.module, build.recipe
    messages, phases = Messages(), Phases()
    # In a thread, too: a Ctrl-C that arrives while the parser calls back into Python would get lost in it.
    parsed = run_watched(lambda: parse_network(module, path, messages), Phases(), lambda *_: None)
    check_network(module.api, parsed.network, graph.spec, expected)
    allow_decomposition(module.api, parsed.network)
    config = parsed.builder.create_builder_config()
    monitor = make_monitor(module.api, phases)
    config.progress_monitor = monitor
    set_targets(module, config, recipe.capabilities)
    set_flags(module, config, recipe)
    add_profiles(parsed.builder, config, graph.profiles)
    timing = load_timing_cache(module, config, build.timing_cache, messages)

    def report(phase: str, part: float) -> None:
        done = graph.begins + int(part * (graph.ends - graph.begins))
        build.on_progress(BuildProgress(graph.spec.name, phase if phase else "Building", done, WHOLE))

    built = run_watched(
        lambda: serialize(module, parsed.builder, parsed.network, config, plan), phases, report, on_look=trim_heap
    )
    if not built:
        raise _build_error(build, graph, messages)
    messages.require_no_loss(path)
    for text in messages.warnings:
        build.on_warning(f"{graph.title}: {title(module)} says: {text}")
    save_timing_cache(config, timing, build.timing_cache)
    report("", 1.0)


def _build_error(build: _Build, graph: EngineGraph, messages: Messages) -> BackendError:
    cause, targets = messages.cause(), ", ".join(build.recipe.capabilities)
    what = f"{graph.title}: {title(build.module)} cannot build it for {targets}: {cause}"
    if build.recipe.workspace is not None and any(word in cause for word in ("workspace", "OutOfMemory")):
        return BackendError(f"{what}; raise --workspace, or leave it out")
    return BackendError(f"{what}; use another version of TensorRT, or smaller limits")
