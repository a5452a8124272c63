"""The first stage: every file of the bundle, and of the engine that will be loaded, is the one that was made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.engine_manifest import read_engine_manifest
from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.goldens import Golden, GoldenArray, Goldens, has_goldens, read_golden_array, read_goldens
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import FileEntry, Manifest
from llava_deploy.runtime.backend_choice import GpuChoice, OnnxRuntimeChoice, Wanted, choose
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.selftest.limits import failed
from llava_deploy.runtime.stages import StageResult
from llava_deploy.runtime.tensorrt_choice import TensorRtChoice


@dataclass(frozen=True)
class Checked:
    """What the files are, once all were read."""

    result: StageResult
    goldens: Goldens
    choice: OnnxRuntimeChoice | GpuChoice


def check_bundle(bundle: Bundle, wanted: Wanted) -> Checked | StageResult:
    """Hash every file, and read the goldens; the failed stage where one is not what was made.

    Raises:
        BackendError: the backend that was asked for does not run here, or none does.
        OptionError: an option that the backend does not have, or beyond what the engine was built for.
    """
    manifest, directory = bundle.manifest, bundle.directory
    problems = _damaged(directory, manifest.files, "take it from where it was made, or export the bundle again")
    if problems:
        return _failed(problems)
    try:
        goldens = read_goldens(directory, manifest)
        for golden in goldens.goldens:
            for array in arrays_of(golden):
                read_golden_array(directory, manifest, golden, array)
        choice = choose(bundle, wanted, Integrity.QUICK)
        engine = engine_of(bundle, choice)
        entries = () if engine is None else read_engine_manifest(engine).files
    except BundleError as error:
        return _failed([str(error)])
    if engine is not None:
        problems = _damaged(engine, entries, f"build it again with: llava-deploy build {directory} --force")
        if problems:
            return _failed(problems)
    counts = f"{len(manifest.files)} files" + ("" if engine is None else f", {len(entries)} of {engine.name}")
    total = sum(entry.size for entry in (*manifest.files, *entries))
    detail = f"{counts}, {total:,} bytes, all as they were made"
    return Checked(StageResult("files", "files", 0.0, 0.0, 0.0, detail), goldens, choice)


def arrays_of(golden: Golden) -> tuple[GoldenArray, ...]:
    """Names of the arrays that a golden has."""
    pictures: tuple[GoldenArray, ...] = ("pixel_values", "image_features") if golden.pictures else ()
    return (*pictures, "inputs_embeds", "logits")


def engine_of(bundle: Bundle, choice: OnnxRuntimeChoice | GpuChoice) -> Path | None:
    """Directory of the engine that was chosen; ``None``: the canonical graphs."""
    home = choice.directory if isinstance(choice, TensorRtChoice) else choice.decoder.parent
    return None if home == bundle.directory else home


def unreadable(error: BundleError) -> StageResult:
    """The stage, where not even the manifest can be read."""
    return _failed([str(error)])


def require_goldens(directory: Path, manifest: Manifest) -> None:
    """Refuse a bundle in which there is nothing to compare with.

    Raises:
        BundleError: it lists no goldens.
    """
    if not has_goldens(manifest):
        read_goldens(directory, manifest)  # which says it


def _damaged(root: Path, entries: Iterable[FileEntry], remedy: str) -> list[str]:
    problems = []
    for entry in entries:
        try:
            check_files(root, [entry], Integrity.FULL, remedy=remedy)
        except (BundleError, OSError) as error:
            problems.append(str(error))
    return problems


def _failed(problems: list[str]) -> StageResult:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return failed("files", "files", f"{problems[0]}{more}")
