"""Other weights in a bundle that is there already: the part's graph, goldens and engines anew, all else as it was."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.errors import BundleError, InputError, LlavaDeployError
from llava_deploy.engines.goldens import GOLDENS, has_goldens
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import EMBEDDING_TABLE, MANIFEST_NAME, FileEntry, Manifest, read_manifest
from llava_deploy.engines.names import SwapPart
from llava_deploy.engines.rewriting import rewritten_bundle
from llava_deploy.engines.staging import write_error
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS
from llava_deploy.exporter.export import quantization_recipe, tool_versions, write_graph
from llava_deploy.exporter.swap.engines import Say, renew_engines
from llava_deploy.exporter.swap.parts import GRAPHS, SwappedModel, swapped_model
from llava_deploy.exporter.weights import SharedTable, write_embedding_table


class AfterSwap(Enum):
    """What becomes of a bundle's goldens, which are of the old weights."""

    RECORD = "record"
    """They are recorded anew."""
    DROP = "drop"
    """The bundle has none afterwards."""


@dataclass(frozen=True)
class SwapProgress:
    """How far a swap is: ``done`` of ``total`` bytes of weights."""

    done: int
    total: int


def swap(
    checkpoint: Checkpoint,
    bundle: Path,
    part: SwapPart,
    *,
    goldens: AfterSwap = AfterSwap.RECORD,
    device: str = "cpu",
    on_progress: Callable[[SwapProgress], None] = lambda _: None,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
    say: Say = lambda _: None,
) -> Manifest:
    """Put the projector of ``checkpoint``, or its decoder with the embeddings, in the place of the bundle's.

    The graph's external data is what an export of the whole model writes, byte for byte. What stays is not copied where
    the file system has hard links. The new bundle takes the place of the old one when all of it is written; after an
    error, Ctrl-C or a kill there is what was there before. A process that runs the bundle goes on with the old weights
    until it loads it again.

    Goldens are recorded with PyTorch: the part as ``checkpoint`` has it, everything else as the bundle stores it. A
    bundle that has none gets none. Engines are made anew, or dropped: see
    :func:`~llava_deploy.exporter.swap.engines.renew_engines`.

    Args:
        checkpoint: of the same model, as it was opened.
        bundle: its directory, or a link to it, which stays one.
        part: what to take of the checkpoint.
        goldens: what becomes of the bundle's goldens.
        device: where PyTorch computes new ones: ``cpu``, ``cuda`` or ``cuda:1``.
        on_progress: told of the weights that are written.
        on_step: told of the goldens that are recorded, in steps, and of how many.
        say: told what becomes of engines, and what of the checkpoint stays out.

    Returns:
        The new manifest.

    Raises:
        InputError: the checkpoint is of another model in anything but the values of weights, or is quantised in another
            way; or the bundle's goldens cannot be recorded, or the bundle was changed meanwhile.
        CheckpointError: a weight is NaN, infinite, or outside the range of the precision.
        BundleError: the bundle is damaged, or was packed without its graphs.
        OptionError: PyTorch has no such device.
        LlavaDeployError: the disk is full, or the bundle's directory cannot be written.
    """
    manifest = read_manifest(bundle)
    before = (bundle / MANIFEST_NAME).read_bytes()
    records = has_goldens(manifest) and goldens is AfterSwap.RECORD
    changed = _changed_files(part)
    # PyTorch is given what the bundle holds, and the projector's file is made of it: a flipped bit would become truth.
    read = {entry.path for entry in manifest.files} if records else set(_changed_files("projector"))
    _require_whole(bundle, manifest, read - changed if part == "decoder" else read)
    model = swapped_model(checkpoint, bundle, manifest, part)
    if records and model.rest_differs is not None:
        raise InputError(
            f"{checkpoint.directory}: the rest of it is another model than {bundle} holds ({model.rest_differs}), so "
            "PyTorch has no answers for new goldens; give a checkpoint of the whole model, or drop them with "
            "--without-goldens"
        )
    _require_space(bundle, sum(entry.size for entry in manifest.files if entry.path in changed))
    for note in model.notes:
        say(f"{checkpoint.directory}: {note}")
    try:
        with rewritten_bundle(bundle, keeps=lambda path: _stays(path, changed)) as new:
            written = _write_part(model, new, manifest, on_progress)
            kept = [entry for entry in manifest.files if _stays(entry.path, changed)]
            after = _manifest(manifest, model, [*kept, *written])
            if records:
                after = _with_goldens(model.checkpoint, new, after, device, on_step, say)
            (new / MANIFEST_NAME).write_text(after.to_json(), encoding="utf-8")
            renew_engines(bundle, manifest, new, part, say)
            if (bundle / MANIFEST_NAME).read_bytes() != before:
                raise InputError(f"{bundle}: another process changed it meanwhile, and it stays as it is; swap again")
    except OSError as error:
        raise write_error(bundle, error) from error
    if has_goldens(manifest) and not records:
        say("the goldens, which were of the old weights, are dropped")
    return after


def _require_whole(bundle: Path, manifest: Manifest, read: set[str]) -> None:
    """Hold the files against the manifest: closely, where their values are read."""
    if manifest.left_out:
        raise BundleError(
            f"{bundle}: was packed without {', '.join(entry.path for entry in manifest.left_out)}; "
            "swap in the bundle that it was packed from, and pack that again"
        )
    for integrity in Integrity:
        wanted = integrity is Integrity.FULL
        entries = [entry for entry in manifest.files if (entry.path in read) == wanted]
        check_files(bundle, entries, integrity, remedy="export the bundle again")


def _changed_files(part: SwapPart) -> set[str]:
    table = [EMBEDDING_TABLE] if part == "decoder" else []
    return {GRAPHS[part], f"{GRAPHS[part]}.data", *table}


def _stays(path: str, changed: set[str]) -> bool:
    return path not in changed and not path.startswith((f"{ENGINES}/", f"{GOLDENS}/"))


def _write_part(
    model: SwappedModel, directory: Path, manifest: Manifest, on_progress: Callable[[SwapProgress], None]
) -> list[FileEntry]:
    tensors = model.checkpoint.tensors
    names = {*model.graph.graph.initializers} | ({EMBED_TOKENS} if model.part == "decoder" else set())
    total = sum(tensors[name].nbytes for name in names if name in tensors)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        on_progress(SwapProgress(done, total))

    files = []
    table = SharedTable(directory / EMBEDDING_TABLE, 0)  # which a projector's graph does not refer to
    if model.part == "decoder":
        dtype = np.dtype(manifest.decoder.dtype)
        table, entry = write_embedding_table(table.path, tensors[EMBED_TOKENS], dtype, progress)
        files.append(entry)
    files += write_graph(model.graph, tensors, directory / GRAPHS[model.part], table, progress)
    return files


def _manifest(manifest: Manifest, model: SwappedModel, files: list[FileEntry]) -> Manifest:
    recipe = manifest.quantization
    if recipe is not None and model.quantized:
        recipe = quantization_recipe(model.quantized, recipe.accuracy_level)
    entries = tuple(sorted(files, key=lambda entry: entry.path))
    return dataclasses.replace(manifest, quantization=recipe, tools=tool_versions(), files=entries)


def _with_goldens(
    checkpoint: Checkpoint,
    directory: Path,
    manifest: Manifest,
    device: str,
    on_step: Callable[[int, int], None],
    say: Say,
) -> Manifest:
    # Which imports torch and transformers: a bundle without goldens does without.
    from llava_deploy.exporter.goldens.record import RecordOptions, record_goldens, with_goldens

    options = RecordOptions(device)
    entries = record_goldens(checkpoint, directory, manifest, options, on_progress=on_step, on_note=say)
    return with_goldens(manifest, entries)


def _require_space(bundle: Path, wanted: int) -> None:
    free = shutil.disk_usage(bundle.resolve().parent).free
    if free < wanted:
        raise LlavaDeployError(
            f"{bundle}: the disk is full: the new weights want {wanted:,} bytes beside the old ones, {free:,} are "
            "free; free some space"
        )
