"""Bundle to ONNX Runtime engine: the canonical graphs, lowered for a CPU, after the backend's optimiser.

The lowering is what no load does: floats of 32 bits, products and norms put together, attention to the cache where it
lies, without a copy (``lowering/onnxruntime.py``). The optimiser does once what it
does at every load otherwise: constants folded (the transposed weights), activations fused, casts put in where the CPU
has no kernel for a type. The result belongs to one version of ONNX Runtime. Level 'extended', not 'all': the latter's
layouts are for the processor that it ran on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeAlias, get_args

from llava_deploy.engines.engine_manifest import (
    INT8_DECODER_GRAPH,
    EngineKey,
    graphs_size,
    is_current,
    resolved_accuracy_level,
    source_digest,
    write_engine_manifest,
)
from llava_deploy.engines.errors import BackendError, OptionError, lacks_onnx_ir
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, read_manifest
from llava_deploy.engines.names import ACCURACY_LEVEL_ENTRY, AccuracyLevel, Int8Part, Precision
from llava_deploy.engines.onnxruntime_module import cause, import_onnxruntime
from llava_deploy.engines.processor import has_int8_products
from llava_deploy.engines.rewriting import link_or_copy
from llava_deploy.engines.staging import require_space, staged_directory, write_error

if TYPE_CHECKING:
    import onnx_ir as ir

Passes: TypeAlias = "list[ir.passes.InPlacePass]"

_DISK: dict[Precision, int] = {"fp32": 1, "fp16": 4, "int4": 2, "int4-awq": 2}
"""Room for a build, in multiples of the graphs: the engine, whose floats are of 32 bits, and one graph's weights on
their way to it."""

_DISK_INT8: dict[Precision, int] = {"fp32": 1, "fp16": 1, "int4": 3, "int4-awq": 3}
"""Likewise more for each part in 8-bit integers, whose weights have twice the bytes of int4."""

_EXTERNAL_FROM = 1024  # bytes: smaller constants stay inside the graph


@dataclass(frozen=True)
class EarlierEngine:
    """An engine of a bundle before some of its graphs were replaced: what was made of the others is taken over.

    Attributes:
        directory: of the engine; it is only read.
        source: the digest of what it has to be made from.
        graphs: names of the bundle's graphs that are as they were.
    """

    directory: Path
    source: str
    graphs: tuple[str, ...]


@dataclass(frozen=True)
class _Graph:
    """One to build: its file in the bundle, its name in the engine, and what is done to it."""

    source: str
    name: str
    passes: Passes


def build_onnxruntime(
    bundle: Path,
    *,
    accuracy_level: AccuracyLevel | None = None,
    int8: Sequence[Int8Part] = (),
    replace: bool = False,
    earlier: EarlierEngine | None = None,
) -> Path:
    """Build the engine for the ONNX Runtime that is installed and return its directory.

    An engine that is there already, for the same graphs and version, and whole, is kept.

    Args:
        bundle: a bundle's directory.
        accuracy_level: for quantised weights, instead of what the manifest says.
        int8: what to compute in 8-bit integers, weights and activations: ``vision``, the tower with its projector;
            ``prefill``, the decoder's steps of :data:`~llava_deploy.engines.names.INT8_FROM_TOKENS` tokens and more,
            from weights that lie beside the others then. Values change by some 1 %.
        replace: build it even so.
        earlier: an engine of the bundle as it was; where it was built in the same way and is whole, only the graphs
            that are new since are built.

    Raises:
        BundleError: the bundle is damaged.
        OptionError: an accuracy level for a bundle in which nothing is quantised; int8 for what is no part, or on a
            processor without products of 8-bit integers.
        BackendError: ONNX Runtime or onnx-ir is missing, or ONNX Runtime refuses a graph.
        LlavaDeployError: the bundle's directory cannot be written to, or its disk is full.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest.files, Integrity.FULL, remedy="export the bundle again")
    onnxruntime = import_onnxruntime()
    level = resolved_accuracy_level(manifest, accuracy_level)
    parts = _int8_parts(int8)
    key = EngineKey("onnxruntime", onnxruntime.__version__, "cpu", source_digest(manifest), level, None, parts)
    output = bundle / key.directory
    if not replace and is_current(output, key):
        return output
    for name in (VISION_GRAPH, DECODER_GRAPH):
        manifest.entry(name)  # an archive may have been packed without them
    precision = manifest.model.precision
    require_space(bundle, graphs_size(manifest) * (_DISK[precision] + _DISK_INT8[precision] * len(parts)))
    graphs = _graphs(key.version, parts)
    if earlier is not None and not is_current(earlier.directory, dataclasses.replace(key, source=earlier.source)):
        earlier = None
    try:
        with staged_directory(output, replace=True) as staging:
            _build(bundle, graphs, key, staging, earlier)
    except OSError as error:
        raise write_error(output, error) from error
    return output


def _int8_parts(wanted: Sequence[Int8Part]) -> tuple[Int8Part, ...]:
    known = get_args(Int8Part)
    if isinstance(wanted, str) or any(part not in known for part in wanted):
        raise OptionError("int8", f"want some of {', '.join(known)}, got {wanted!r}")
    if wanted and not has_int8_products():
        raise OptionError("int8", "this processor has no exact products of 8-bit integers (VNNI); leave it out")
    return tuple(part for part in known if part in wanted)


def _build(
    bundle: Path, graphs: Sequence[_Graph], key: EngineKey, staging: Path, earlier: EarlierEngine | None
) -> None:
    paths = []
    with _place_inside(bundle, staging) as place:
        for graph in graphs:
            if earlier is not None and graph.source in earlier.graphs:
                paths += _take_over(earlier.directory, graph.name, staging)
                continue
            computed = place / f"{graph.name}.computed"
            lowered = _lowered(bundle / graph.source, graph.passes, computed)
            paths += _optimise(bundle / graph.source, lowered, key, staging / graph.name)
            computed.unlink()
    write_engine_manifest(staging, key, paths)


def _take_over(directory: Path, name: str, staging: Path) -> list[str]:
    """A graph of another engine and its weights, which are not copied where the file system has hard links."""
    names = [each for each in (name, f"{name}.data") if (directory / each).exists()]
    for each in names:
        link_or_copy(directory / each, staging / each)
    return names


@contextmanager
def _place_inside(bundle: Path, staging: Path) -> Iterator[Path]:
    """Where computed weights lie: ONNX Runtime reads nothing that a link leads to out of the bundle."""
    if staging.resolve().is_relative_to(bundle.resolve()):
        yield staging
        return
    with TemporaryDirectory(prefix=".lowered-", dir=bundle) as place:
        yield Path(place)


def _optimise(source: Path, graph: bytes, key: EngineKey, output: Path) -> list[str]:
    """Have ONNX Runtime write what it makes of ``graph``, whose weights are named relative to the bundle.

    Returns:
        Names of the files that it has written.
    """
    onnxruntime = import_onnxruntime()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # its errors come as exceptions
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(output)
    external = f"{output.name}.data"
    prefix = "session.optimized_model_external_initializers"
    settings.add_session_config_entry(f"{prefix}_file_name", external)
    settings.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(_EXTERNAL_FROM))
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(source.parent))
    settings.add_session_config_entry("session.disable_prepacking", "1")  # which is for a session that runs
    if key.accuracy_level is not None:
        settings.add_session_config_entry(ACCURACY_LEVEL_ENTRY, str(key.accuracy_level))
    try:
        onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(
            f"{source}: ONNX Runtime {onnxruntime.__version__} cannot build it: {cause(error)}; want 1.25 or later"
        ) from error
    return [name for name in (output.name, external) if (output.parent / name).exists()]


def _graphs(version: str, int8: tuple[Int8Part, ...]) -> list[_Graph]:
    """What an engine for a version of ONNX Runtime has, with the passes of each, in order."""
    try:
        from llava_deploy.engines.lowering import onnxruntime as lowering
    except ImportError as error:
        raise lacks_onnx_ir(error) from error
    form = lowering.attention_form(version)
    graphs = [
        _Graph(VISION_GRAPH, VISION_GRAPH, lowering.vision_passes(int8)),
        _Graph(DECODER_GRAPH, DECODER_GRAPH, lowering.decoder_passes(form, int8)),
    ]
    if "prefill" in int8:
        graphs.append(_Graph(DECODER_GRAPH, INT8_DECODER_GRAPH, lowering.int8_decoder_passes(form)))
    return graphs


def _lowered(source: Path, passes: Passes, computed: Path) -> bytes:
    from llava_deploy.engines.lowering.files import lower_in_memory

    return lower_in_memory(source, passes, computed)
