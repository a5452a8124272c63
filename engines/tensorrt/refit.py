"""New weights in the plans of an engine that was built for it (``--refit``), without a build.

Written against the bindings' own signatures and tested on a fake GPU: it has not run on a real one yet. So nothing is
taken on trust: a weight that TensorRT does not know by its name, or wants and does not get, is an error, and the engine
goes. Source: TensorRT's developer guide, "Refitting an Engine" (``IParserRefitter``, ``IRefitter``). That of TensorRT
11.3 says of a known issue that engines built for refitting may drop the bias of a product: a self-test tells.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_deploy.engines.engine_manifest import (
    EngineKey,
    read_engine_manifest,
    source_digest,
    write_engine_manifest,
)
from llava_deploy.engines.errors import BackendError, BundleError, lacks_onnx_ir
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import Manifest, read_manifest
from llava_deploy.engines.planner.model import planned_bundle
from llava_deploy.engines.planner.onnx_header import read_initializers
from llava_deploy.engines.rewriting import link_or_copy
from llava_deploy.engines.staging import staged_directory, write_error
from llava_deploy.engines.tensorrt.adapter import current_capability
from llava_deploy.engines.tensorrt.constructs import Release, parse_release, release_of
from llava_deploy.engines.tensorrt.graphs import EngineGraph, engine_graphs
from llava_deploy.engines.tensorrt.messages import Messages, make_logger, one_line
from llava_deploy.engines.tensorrt.network import title
from llava_deploy.engines.tensorrt_module import TensorRtModule, import_tensorrt
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe

_LOWERED = "lowered"
_TABLES = (".cos", ".sin")
"""Of the decoder's names: made from its config, which stays as it is."""


@dataclass(frozen=True)
class Replaced:
    """What is new in a bundle.

    Attributes:
        graph: name of the graph that has other weights; the other graph is as it was.
        weights: how the names of its new weights begin.
        before: the manifest of the bundle as it was.
    """

    graph: str
    weights: tuple[str, ...]
    before: Manifest


def refit_tensorrt(
    bundle: Path, old: Path, replaced: Replaced, *, on_warning: Callable[[str], None] = lambda _: None
) -> Path:
    """Make the engine of ``bundle`` from the one in the directory ``old``, which is of the bundle as it was.

    Plans of the graph that is as it was are taken over as they are.

    Args:
        bundle: a bundle with new weights, its manifest written.
        old: an engine's directory; it is only read.
        replaced: what is new.
        on_warning: told of what TensorRT says that changes no result.

    Returns:
        The new engine's directory, in ``bundle``.

    Raises:
        BundleError: the old engine is damaged, or of yet other graphs.
        BackendError: it was not built for refitting, or not for what is installed here; there is no GPU; onnx-ir is
            missing; or TensorRT does not take the weights.
        LlavaDeployError: the directory cannot be written, or its disk is full.
    """
    engine = read_engine_manifest(old)
    key, recipe = engine.key, engine.key.tensorrt
    if recipe is None or key.backend == "onnxruntime" or key.backend == "onnxruntime-cuda":
        raise BackendError(f"{old}: want an engine of TensorRT, found one for {key.backend}")
    if not recipe.refittable:
        raise BackendError(f"{old}: was built without --refit, so its weights cannot be replaced")
    if key.source != source_digest(replaced.before):
        raise BundleError(f"{old}: was built from other graphs than the bundle held")
    module = import_tensorrt(key.backend)
    _require_fit(old, key, recipe, module)
    check_files(old, engine.files, Integrity.FULL, remedy="build the engine again")
    manifest = read_manifest(bundle)
    graphs = engine_graphs(manifest, planned_bundle(bundle, manifest), recipe)
    key = replace(key, source=source_digest(manifest))
    output = bundle / key.directory
    messages = Messages()
    try:
        with staged_directory(output, replace=True) as staging:
            for graph in graphs:
                if graph.source == replaced.graph:
                    lowered = staging / _LOWERED
                    lowered.mkdir()
                    path = _lower(bundle, graph, recipe, module, lowered)
                    names = _new_weights(path, replaced.weights)
                    _refit(module, recipe, old / graph.plan, path, names, staging / graph.plan, messages)
                    shutil.rmtree(lowered)
                else:
                    link_or_copy(old / graph.plan, staging / graph.plan)
            write_engine_manifest(staging, key, [graph.plan for graph in graphs])
    except OSError as error:
        raise write_error(output, error) from error
    for text in messages.warnings:
        on_warning(f"{old.name}: {title(module)} says: {text}")
    return output


def _require_fit(old: Path, key: EngineKey, recipe: TensorRtRecipe, module: TensorRtModule) -> None:
    if key.version != module.version:
        raise BackendError(f"{old}: was built with {key.backend} {key.version}, and {module.version} is installed")
    capability = current_capability()
    if capability not in recipe.capabilities:
        raise BackendError(f"{old}: was built for {', '.join(recipe.capabilities)}, and the GPU is {capability}")


def _lower(bundle: Path, graph: EngineGraph, recipe: TensorRtRecipe, module: TensorRtModule, directory: Path) -> Path:
    """As the builder did, so that weights have the names that they have in the plan."""
    try:
        from llava_deploy.engines.lowering.decoder_layers import TakeLayers
        from llava_deploy.engines.lowering.files import lower_beside
        from llava_deploy.engines.lowering.tensorrt import decoder_passes, vision_passes
    except ImportError as error:
        raise lacks_onnx_ir(error) from error
    if graph.layers is None:
        passes = vision_passes(_spoken(recipe, module))
    else:
        passes = [TakeLayers(graph.layers), *decoder_passes(recipe.cache, recipe.limits.max_len)]
    return lower_beside(bundle / graph.source, directory, passes).path


def _spoken(recipe: TensorRtRecipe, module: TensorRtModule) -> Release:
    own = release_of(module)
    return own if recipe.release == f"{own.major}.{own.minor}" else parse_release(recipe.release)


def _new_weights(path: Path, beginnings: tuple[str, ...]) -> set[str]:
    """Initializers of a lowered graph that have other values than before; scalars are the graph's own constants."""
    return {
        tensor.name
        for tensor in read_initializers(path)
        if tensor.name.startswith(beginnings) and not tensor.name.endswith(_TABLES) and tensor.shape
    }


def _refit(
    module: TensorRtModule,
    recipe: TensorRtRecipe,
    plan: Path,
    graph: Path,
    weights: set[str],
    output: Path,
    messages: Messages,
) -> None:
    """Write the plan ``output``: ``plan`` with the weights of the ONNX file ``graph``."""
    api, where = module.api, f"{plan.name}: {title(module)} does not take its new weights"
    logger = make_logger(api, messages)
    runtime = api.Runtime(logger)
    if recipe.version_compatible and module.backend == "tensorrt":
        runtime.engine_host_code_allowed = True  # such a plan brings the code of its own version's runtime
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(f"{plan.name}: {title(module)} cannot deserialise it: {messages.cause()}")
    if not engine.refittable:
        raise BackendError(f"{where}: the plan says that it cannot be refitted")
    refitter = api.Refitter(engine, logger)
    if unknown := sorted(weights - {*refitter.get_all_weights()}):
        raise BackendError(f"{where}: it knows no {unknown[0]}, nor {len(unknown) - 1} others; the old ones would stay")
    parser = api.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)):
        raise BackendError(f"{where}: {_parser_cause(parser, messages)}")
    if missing := list(refitter.get_missing_weights()):
        raise BackendError(f"{where}: it wants {missing[0]} and {len(missing) - 1} others, which the graph lacks")
    if not refitter.refit_cuda_engine():
        raise BackendError(f"{where}: {messages.cause()}")
    messages.require_no_loss(graph)
    config = engine.create_serialization_config()
    flags = api.SerializationFlag
    if "INCLUDE_REFIT" in flags.__members__:  # later releases leave it out unless they are asked
        config.set_flag(flags.INCLUDE_REFIT)
    serialized = engine.serialize_with_config(config)
    if serialized is None:
        raise BackendError(f"{where}: it cannot be serialised again: {messages.cause()}")
    with output.open("xb") as written:
        written.write(memoryview(serialized))


def _parser_cause(parser: Any, messages: Messages) -> str:
    return one_line(parser.get_error(0).desc()) if parser.num_errors else messages.cause()
