"""Which files of a bundle the backend loads: an engine built for it, or the canonical graphs, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.engine_manifest import EngineKey, read_engine_manifest, source_digest
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.runtime.bundle import Bundle


@dataclass(frozen=True)
class Choice:
    """The graphs to load, and a sentence on the choice for people."""

    vision: Path
    decoder: Path
    reason: str


def choose_onnxruntime(bundle: Bundle, version: str, integrity: Integrity) -> Choice:
    """Prefer the engine that ``llava-deploy build`` made for this ONNX Runtime; else take the canonical graphs.

    Raises:
        BundleError: the engine for this version is there but damaged.
    """
    key = EngineKey("onnxruntime", version, "cpu", source_digest(bundle.manifest))
    directory = bundle.directory / key.directory
    reason = f"ONNX Runtime {version} on the CPU, "
    if not directory.is_dir():
        return _canonical(bundle, f"{reason}canonical graphs; llava-deploy build makes it start sooner")
    engine = read_engine_manifest(directory)
    if engine.key != key:
        return _canonical(bundle, f"{reason}canonical graphs: {directory.name} was built from others; build it again")
    check_files(directory, engine.files, integrity, remedy="build it again with: llava-deploy build --force")
    return Choice(directory / VISION_GRAPH, directory / DECODER_GRAPH, f"{reason}engine {directory.name}")


def _canonical(bundle: Bundle, reason: str) -> Choice:
    return Choice(bundle.path(VISION_GRAPH), bundle.path(DECODER_GRAPH), reason)
