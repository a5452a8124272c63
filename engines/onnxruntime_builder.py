"""Bundle to ONNX Runtime engine: the canonical graphs, lowered for a CPU, after the backend's optimiser.

The lowering is what no load does: floats of 32 bits, products and norms put together, attention to the cache where it
lies, without a copy (``lowering/onnxruntime.py``). The optimiser does once what it
does at every load otherwise: constants folded (the transposed weights), activations fused, casts put in where the CPU
has no kernel for a type. The result belongs to one version of ONNX Runtime. Level 'extended', not 'all': the latter's
layouts are for the processor that it ran on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeAlias

from llava_deploy.engines.engine_manifest import (
    EngineKey,
    graphs_size,
    is_current,
    resolved_accuracy_level,
    source_digest,
    write_engine_manifest,
)
from llava_deploy.engines.errors import BackendError, lacks_onnx_ir
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, read_manifest
from llava_deploy.engines.names import ACCURACY_LEVEL_ENTRY, AccuracyLevel, Precision
from llava_deploy.engines.staging import require_space, staged_directory, write_error

if TYPE_CHECKING:
    import onnx_ir as ir

Passes: TypeAlias = "list[ir.passes.InPlacePass]"

_DISK: dict[Precision, int] = {"fp32": 1, "fp16": 4, "int4": 2, "int4-awq": 2}
"""Room for a build, in multiples of the graphs: the engine, whose floats are of 32 bits, and one graph's weights on
their way to it."""

_EXTERNAL_FROM = 1024  # bytes: smaller constants stay inside the graph


def build_onnxruntime(bundle: Path, *, accuracy_level: AccuracyLevel | None = None, replace: bool = False) -> Path:
    """Build the engine for the ONNX Runtime that is installed and return its directory.

    An engine that is there already, for the same graphs and version, and whole, is kept.

    Args:
        bundle: a bundle's directory.
        accuracy_level: for quantised weights, instead of what the manifest says.
        replace: build it even so.

    Raises:
        BundleError: the bundle is damaged.
        OptionError: an accuracy level for a bundle in which nothing is quantised.
        BackendError: ONNX Runtime or onnx-ir is missing, or ONNX Runtime refuses a graph.
        LlavaDeployError: the bundle's directory cannot be written to, or its disk is full.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest.files, Integrity.FULL, remedy="export the bundle again")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be imported ({error}); install it with: pip install 'llava-deploy[cpu]'"
        ) from error
    level = resolved_accuracy_level(manifest, accuracy_level)
    key = EngineKey("onnxruntime", onnxruntime.__version__, "cpu", source_digest(manifest), level, None)
    output = bundle / key.directory
    if not replace and is_current(output, key):
        return output
    require_space(bundle, graphs_size(manifest) * _DISK[manifest.model.precision])
    passes = _passes()
    try:
        with staged_directory(output, replace=True) as staging:
            _build(bundle, passes, key, staging)
    except OSError as error:
        raise write_error(output, error) from error
    return output


def _build(bundle: Path, passes: dict[str, Passes], key: EngineKey, staging: Path) -> None:
    paths = []
    with _place_inside(bundle, staging) as place:
        for name, each in passes.items():
            computed = place / f"{name}.computed"
            graph = _lowered(bundle / name, each, computed)
            paths += _optimise(bundle / name, graph, key, staging)
            computed.unlink()
    write_engine_manifest(staging, key, paths)


@contextmanager
def _place_inside(bundle: Path, staging: Path) -> Iterator[Path]:
    """Where computed weights lie: ONNX Runtime reads nothing that a link leads to out of the bundle."""
    if staging.resolve().is_relative_to(bundle.resolve()):
        yield staging
        return
    with TemporaryDirectory(prefix=".lowered-", dir=bundle) as place:
        yield Path(place)


def _optimise(source: Path, graph: bytes, key: EngineKey, staging: Path) -> list[str]:
    """Have ONNX Runtime write what it makes of ``graph``, whose weights are named relative to the bundle."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # its errors come as exceptions
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(staging / source.name)
    external = f"{source.name}.data"
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
        cause = " ".join(str(error).split())
        raise BackendError(
            f"{source}: ONNX Runtime {onnxruntime.__version__} cannot build it: {cause}; want 1.25 or later"
        ) from error
    return [path for path in (source.name, external) if (staging / path).exists()]


def _passes() -> dict[str, Passes]:
    """The passes of each graph, in order."""
    try:
        from llava_deploy.engines.lowering import onnxruntime as lowering
    except ImportError as error:
        raise lacks_onnx_ir(error) from error
    return {VISION_GRAPH: lowering.vision_passes(), DECODER_GRAPH: lowering.decoder_passes()}


def _lowered(source: Path, passes: Passes, computed: Path) -> bytes:
    from llava_deploy.engines.lowering.files import lower_in_memory

    return lower_in_memory(source, passes, computed)
