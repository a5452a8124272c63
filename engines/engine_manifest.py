"""The manifest of a built engine: which bundle, backend, version and device it is for, and the sha256 of its files.

Standard library only; the runtime reads it before it lets a backend near the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from llava_deploy.engines.errors import BundleError, OptionError
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import (
    DECODER_GRAPH,
    EMBEDDING_TABLE,
    VISION_GRAPH,
    FileEntry,
    Manifest,
    describe_file,
)
from llava_deploy.engines.names import AccuracyLevel, Backend, Int8Part
from llava_deploy.engines.plain import from_plain
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe

ENGINES = "engines"
ENGINE_MANIFEST = "engine.json"
VISION_PLAN = "vision.plan"
INT8_DECODER_GRAPH = "decoder.int8.onnx"
"""Of an ONNX Runtime engine: the decoder for steps of many tokens, where those are computed in 8-bit integers."""

ENGINE_FORMAT_VERSION = 3
LOWERING_VERSION = 8
"""Goes up when a builder makes other graphs of the same bundle, so that older engines are built again."""


@dataclass(frozen=True)
class EngineKey:
    """What an engine was built for; it runs nowhere else.

    Attributes:
        backend: the toolchain.
        version: its version, in full.
        device: what its files are tuned for: ``cpu``, or compute capabilities, ``sm80-sm89``.
        source: :func:`source_digest` of the bundle's graphs and the way that they are lowered.
        accuracy_level: what ONNX Runtime's ``MatMulNBits`` multiplies in; ``None`` where no weight is quantised, and
            of TensorRT, which computes in the graph's floats.
        tensorrt: limits and settings of a TensorRT engine; ``None`` for other backends.
        int8: what an ONNX Runtime engine computes in 8-bit integers, in the order of
            :data:`~llava_deploy.engines.names.Int8Part`.
    """

    backend: Backend
    version: str
    device: str
    source: str
    accuracy_level: AccuracyLevel | None
    tensorrt: TensorRtRecipe | None
    int8: tuple[Int8Part, ...] = ()

    @property
    def directory(self) -> str:
        """Its place inside the bundle, as a relative POSIX path."""
        return f"{ENGINES}/{self.backend}-{self.version}-{self.device}"


@dataclass(frozen=True)
class EngineManifest:
    """The whole of ``engine.json``."""

    format_version: int
    key: EngineKey
    tools: dict[str, str]
    files: tuple[FileEntry, ...]

    def to_json(self) -> str:
        """Text of ``engine.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def source_digest(manifest: Manifest) -> str:
    """Hex sha256 over :data:`LOWERING_VERSION` and the manifest's entries for everything an engine is built from."""
    files = (*manifest.files, *manifest.left_out)
    entries = sorted((f.path, f.size, f.sha256) for f in files if ".onnx" in f.path or f.path == EMBEDDING_TABLE)
    return hashlib.sha256(json.dumps([LOWERING_VERSION, entries]).encode()).hexdigest()


def decoder_plans(recipe: TensorRtRecipe) -> tuple[str, ...]:
    """Names of the decoder's plans, in the order in which they run."""
    count = len(recipe.parts)
    return ("decoder.plan",) if count == 1 else tuple(f"decoder-{i}-of-{count}.plan" for i in range(1, count + 1))


def loaded_files(key: EngineKey) -> tuple[str, ...]:
    """Names of what is loaded of an engine, which its manifest has to list."""
    if key.tensorrt is not None:
        return VISION_PLAN, *decoder_plans(key.tensorrt)
    return VISION_GRAPH, DECODER_GRAPH, *([INT8_DECODER_GRAPH] if "prefill" in key.int8 else [])


def weights_size(manifest: Manifest) -> int:
    """Bytes of the bundle's graphs with their weights, and of the token embeddings."""
    return graphs_size(manifest) + manifest.entry(EMBEDDING_TABLE).size


def graphs_size(manifest: Manifest) -> int:
    """Bytes of the bundle's graphs with their weights; an engine is as large."""
    return sum(entry.size for entry in manifest.files if ".onnx" in entry.path)


def resolved_accuracy_level(manifest: Manifest, wanted: AccuracyLevel | None) -> AccuracyLevel | None:
    """``wanted``, or else what the manifest says; ``None`` where no weight is quantised.

    Raises:
        OptionError: no level, or one for a bundle in which nothing is quantised.
    """
    stated = None if manifest.quantization is None else manifest.quantization.accuracy_level
    if wanted is None:
        return stated
    if stated is None:
        raise OptionError("accuracy_level", f"want a bundle of int4 weights, found one in {manifest.model.precision}")
    if type(wanted) is not int or wanted not in get_args(AccuracyLevel):  # True is equal to 1
        raise OptionError("accuracy_level", f"want 0 to 4, got {wanted!r}")
    return wanted


def built_engines(bundle: Path) -> list[Path]:
    """Directories of the engines of a bundle in order, without those that are being built."""
    return sorted(path.parent for path in (bundle / ENGINES).glob(f"[!.]*/{ENGINE_MANIFEST}"))


def write_engine_manifest(directory: Path, key: EngineKey, files: Iterable[str]) -> None:
    """Write ``engine.json`` for the ``files`` of ``directory`` as they are on the disk now.

    Raises:
        OSError: a file cannot be read, or the manifest not be written.
    """
    entries = tuple(describe_file(directory, name) for name in files)
    tools = {name: version(name) for name in ("llava-deploy", "onnx-ir")}
    text = EngineManifest(ENGINE_FORMAT_VERSION, key, tools, entries).to_json()
    (directory / ENGINE_MANIFEST).write_text(text, encoding="utf-8")


def read_engine_manifest(directory: Path, *, remedy: str = "build it again with: llava-deploy build") -> EngineManifest:
    """Read ``engine.json`` of an engine directory.

    Args:
        directory: of the engine.
        remedy: ends an error's message.

    Raises:
        BundleError: it is missing, not JSON, or does not have the fields of :class:`EngineManifest`.
    """
    where = directory / ENGINE_MANIFEST
    try:
        content = where.read_bytes()
    except OSError as error:
        raise BundleError(f"{where}: cannot be read ({error}); {remedy}") from error
    return parse_engine_manifest(content, where=str(where), remedy=remedy)


def parse_engine_manifest(content: bytes, *, where: str, remedy: str) -> EngineManifest:
    """The manifest that the bytes of an ``engine.json`` are; ``where`` it is begins an error's message.

    Raises:
        BundleError: as :func:`read_engine_manifest`.
    """
    try:
        data = json.loads(content.decode("utf-8"))
        manifest: EngineManifest = from_plain(EngineManifest, data, "engine")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{where}: cannot be read ({error}); {remedy}") from error
    if manifest.format_version != ENGINE_FORMAT_VERSION:
        raise BundleError(
            f"{where}: want format_version {ENGINE_FORMAT_VERSION}, found {manifest.format_version}; {remedy}"
        )
    return manifest


def is_current(directory: Path, key: EngineKey) -> bool:
    """Whether an engine of this key is there, and whole."""
    if not directory.is_dir():
        return False
    try:
        engine = read_engine_manifest(directory)
        check_files(directory, engine.files, Integrity.FULL, remedy="")
    except BundleError:
        return False  # damaged: build it anew
    return engine.key == key and {entry.path for entry in engine.files}.issuperset(loaded_files(key))
