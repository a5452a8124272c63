"""Which files of a bundle the backend loads: an engine built for it, or the canonical graphs, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llava_deploy.engines.engine_manifest import EngineKey, read_engine_manifest, resolved_accuracy_level, source_digest
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.engines.names import AccuracyLevel
from llava_deploy.runtime.bundle import Bundle


@dataclass(frozen=True)
class Choice:
    """The graphs to load, what they multiply quantised weights in, and a sentence on the choice for people."""

    vision: Path
    decoder: Path
    accuracy_level: AccuracyLevel | None
    reason: str


def choose_onnxruntime(
    bundle: Bundle, version: str, accuracy_level: AccuracyLevel | None, integrity: Integrity
) -> Choice:
    """Prefer the engine that ``llava-deploy build`` made for this ONNX Runtime; else take the canonical graphs.

    An ``accuracy_level`` that is asked for has to be the engine's.

    Raises:
        BundleError: the engine for this version is there but damaged.
        OptionError: an accuracy level for a bundle in which nothing is quantised.
    """
    level = resolved_accuracy_level(bundle.manifest, accuracy_level)
    key = EngineKey("onnxruntime", version, "cpu", source_digest(bundle.manifest), level, None)
    directory = bundle.directory / key.directory
    name = f"ONNX Runtime {version} on the CPU, "
    if not directory.is_dir():
        return _canonical(bundle, level, f"{name}canonical graphs; llava-deploy build makes it start sooner")
    engine = read_engine_manifest(directory)
    built = engine.key.accuracy_level
    if replace(engine.key, accuracy_level=level) != key:
        reason = "was built from others; build it again"
    elif accuracy_level is not None and built != accuracy_level:
        reason = f"was built for accuracy level {built}"
    else:
        reason = None
    if reason is not None:
        return _canonical(bundle, level, f"{name}canonical graphs: {directory.name} {reason}")
    check_files(directory, engine.files, integrity, remedy="build it again with: llava-deploy build --force")
    return Choice(directory / VISION_GRAPH, directory / DECODER_GRAPH, built, f"{name}engine {directory.name}")


def _canonical(bundle: Bundle, level: AccuracyLevel | None, reason: str) -> Choice:
    return Choice(bundle.path(VISION_GRAPH), bundle.path(DECODER_GRAPH), level, reason)
