"""What becomes of a bundle's engines when weights of it are swapped: none may go on answering with the old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llava_deploy.engines.build_command import build_command
from llava_deploy.engines.engine_manifest import ENGINES, EngineKey, read_engine_manifest, source_digest
from llava_deploy.engines.errors import BackendError, BundleError, OptionError
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, Manifest
from llava_deploy.engines.names import SwapPart
from llava_deploy.engines.onnxruntime_builder import EarlierEngine, build_onnxruntime
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.engines.onnxruntime_module import import_onnxruntime
from llava_deploy.engines.tensorrt.refit import Replaced, refit_tensorrt
from llava_deploy.exporter.config import PROJECTOR

Say = Callable[[str], None]

_REPLACED: dict[SwapPart, tuple[str, tuple[str, ...]]] = {
    "projector": (VISION_GRAPH, (PROJECTOR,)),
    "decoder": (DECODER_GRAPH, ("language_model.", "lm_head.")),
}


def renew_engines(bundle: Path, before: Manifest, new: Path, part: SwapPart, say: Say) -> None:
    """Make the engines of ``bundle`` anew in ``new``, each with the options that it was built with.

    ONNX Runtime's is built for the version that is installed, where it was built for that one; what was made of the
    graph that is as it was is taken over. TensorRT's are refitted, where they were built for it and their GPU is here.
    An engine that cannot be renewed is not in ``new``, which is said, with the command that builds it.

    Args:
        bundle: as it was; its engines are only read.
        before: its manifest.
        new: the bundle with new weights, its manifest written, without engines.
        part: whose weights are new.
        say: told what became of each.

    Raises:
        LlavaDeployError: the disk is full.
    """
    home = bundle / ENGINES
    for directory in sorted(home.iterdir()) if home.is_dir() else ():
        if not directory.is_dir() or directory.name.startswith("."):
            continue  # what a build that was killed has left
        try:
            key = read_engine_manifest(directory).key
        except BundleError as error:
            say(f"engine {directory.name} is dropped: {error}")
            continue
        try:
            done = _renew(directory, key, before, new, part, say)
        except (BackendError, BundleError, OptionError) as error:
            reason = str(error).replace(str(new), str(bundle))
            say(f"engine {directory.name} is dropped: {reason}; build it with: {build_command(bundle, key)}")
        else:
            say(f"engine {directory.name} {done}")


def _renew(directory: Path, key: EngineKey, before: Manifest, new: Path, part: SwapPart, say: Say) -> str:
    graph, weights = _REPLACED[part]
    if key.backend == "onnxruntime-cuda":
        build_onnxruntime_cuda(new)
        return "was built again"
    if key.backend != "onnxruntime":
        refit_tensorrt(new, directory, Replaced(graph, weights, before), on_warning=say)
        return "was refitted, which no GPU has been seen to do yet: hold it against the goldens, with a selftest"
    installed = _onnxruntime_version()
    if key.version != installed:
        raise BackendError(f"it is for ONNX Runtime {key.version}, and {installed} is installed")
    (other,) = {VISION_GRAPH, DECODER_GRAPH} - {graph}
    earlier = EarlierEngine(directory, source_digest(before), (other,))
    build_onnxruntime(new, accuracy_level=key.accuracy_level, int8=key.int8, earlier=earlier)
    return "was built again"


def _onnxruntime_version() -> str:
    try:
        return str(import_onnxruntime().__version__)
    except BackendError:
        return "none"
