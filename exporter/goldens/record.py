"""Goldens into a bundle: PyTorch is asked, and what it says is written beside the graphs and listed in the manifest."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from llava_deploy.engines.errors import CheckpointError, InputError, LlavaDeployError, OptionError
from llava_deploy.engines.goldens import GOLDENS, GOLDENS_FILE, GOLDENS_FORMAT_VERSION, Golden, Goldens, golden_dtype
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import (
    DECODER_GRAPH,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    describe_file,
    read_manifest,
)
from llava_deploy.engines.rewriting import rewritten_bundle
from llava_deploy.engines.staging import write_error
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.goldens.answers import Loading, Recorded, Step, answer_prompts
from llava_deploy.exporter.goldens.prompts import choose_prompts
from llava_deploy.exporter.goldens.questions import questions
from llava_deploy.exporter.goldens.rounded import rounded_to_float16
from llava_deploy.exporter.made_from import require_made_from, require_sizes_of
from llava_deploy.exporter.quantization.stored import with_stored_decoder
from llava_deploy.exporter.reference.torch_decoder import torch_device

MOST_TOKENS = 16
"""Of an answer, where nobody says otherwise."""

TOOLS = ("llava-deploy", "torch", "transformers", "tokenizers", "pillow", "numpy")

Note = Callable[[str], None]
"""Told what a person should know, in a sentence."""


@dataclass(frozen=True)
class RecordOptions:
    """How goldens are recorded.

    Attributes:
        device: where PyTorch computes: ``cpu``, ``cuda`` or ``cuda:1``. The answers are those of this device.
        max_new_tokens: greedy tokens of each answer, if it does not stop before.
        loading: how the decoder is held; it changes what is in memory and the time, not the answers.
    """

    device: str = "cpu"
    max_new_tokens: int = MOST_TOKENS
    loading: Loading = "auto"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError("max_new_tokens", f"want 1 or more, got {self.max_new_tokens}")


STANDARD = RecordOptions()


def record(
    checkpoint: Checkpoint,
    bundle: Path,
    options: RecordOptions = STANDARD,
    *,
    on_progress: Step = lambda _done, _total: None,
    on_note: Note = lambda _: None,
) -> Manifest:
    """Record goldens for a bundle that is there; those that it had are replaced, its engines stay.

    The bundle stays as it was until everything is recorded, and then changes in one step.

    Args:
        checkpoint: that the bundle was exported from, opened with the same options.
        bundle: its directory.
        options: see there.
        on_progress: called with the steps that are done, and of how many.
        on_note: told which goldens were left out or asked more simply, and why.

    Returns:
        The bundle's new manifest.

    Raises:
        InputError: the bundle was made from another checkpoint, or with other options.
        BundleError: the bundle is damaged.
        LlavaDeployError: the disk is full, or the bundle was changed in the meantime.
        OptionError: PyTorch has no such device.
    """
    manifest = read_manifest(bundle)
    remedy = "export the bundle again"
    check_files(
        bundle, [entry for entry in manifest.files if not is_golden(entry.path)], Integrity.QUICK, remedy=remedy
    )
    if manifest.quantization is not None:  # PyTorch is given what it holds: a flipped bit would become the truth
        check_files(bundle, [manifest.entry(f"{DECODER_GRAPH}.data")], Integrity.FULL, remedy=remedy)
    require_made_from(checkpoint, bundle, manifest)
    recorded = _answers(checkpoint, bundle, manifest, options, on_progress, on_note)
    try:
        with rewritten_bundle(bundle, keeps=lambda path: not is_golden(path)) as staging:
            if read_manifest(bundle) != manifest:
                raise LlavaDeployError(f"{bundle}: changed while its goldens were recorded; record them again")
            manifest = with_goldens(manifest, _write(recorded, staging, manifest))
            (staging / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    except OSError as error:
        raise write_error(bundle, error) from error
    return manifest


def record_goldens(
    checkpoint: Checkpoint,
    bundle_directory: Path,
    manifest: Manifest,
    options: RecordOptions = STANDARD,
    *,
    on_progress: Step = lambda _done, _total: None,
    on_note: Note = lambda _: None,
) -> tuple[FileEntry, ...]:
    """Write ``goldens/`` into a directory that holds a bundle's graphs and tables, such as a staging directory.

    Of a quantised bundle PyTorch's decoder gets the weights that the bundle's stand for; everything else is the
    checkpoint's own, rounded to float16 where the bundle holds it so. PyTorch computes in float32.

    Args:
        checkpoint: that the bundle is made from.
        bundle_directory: goldens that are there are replaced.
        manifest: of the bundle; its list of files need not be whole.
        options: see there.
        on_progress: called with the steps that are done, and of how many.
        on_note: told which goldens were left out or asked more simply, and why.

    Returns:
        The entries of what was written, for the bundle's manifest; see :func:`with_goldens`.

    Raises:
        InputError: the bundle's model has other sizes.
        CheckpointError: PyTorch's values are NaN, infinite, or outside the range of the bundle's precision.
        LlavaDeployError: the model takes none of the questions.
        OptionError: PyTorch has no such device.
        OSError: a file cannot be written.
    """
    recorded = _answers(checkpoint, bundle_directory, manifest, options, on_progress, on_note)
    return _write(recorded, bundle_directory, manifest)


def is_golden(path: str) -> bool:
    """Whether a path of a bundle is one of its goldens' files."""
    return path.startswith(f"{GOLDENS}/")


def with_goldens(manifest: Manifest, entries: Sequence[FileEntry]) -> Manifest:
    """The manifest with these files of goldens in place of those that it lists."""
    others = [entry for entry in manifest.files if not is_golden(entry.path)]
    return replace(manifest, files=tuple(sorted([*others, *entries], key=lambda entry: entry.path)))


def _answers(
    checkpoint: Checkpoint,
    bundle: Path,
    manifest: Manifest,
    options: RecordOptions,
    on_progress: Step,
    on_note: Note,
) -> tuple[Recorded, ...]:
    require_sizes_of(checkpoint, bundle, manifest)
    device = torch_device(options.device)
    held = checkpoint if manifest.model.precision == "fp32" else rounded_to_float16(checkpoint)
    decoder = held if manifest.quantization is None else with_stored_decoder(checkpoint, bundle)
    chosen = choose_prompts(checkpoint, questions(manifest.vision.image_height), options.max_new_tokens)
    for left_out in chosen.left_out:
        on_note(f"golden left out: {left_out}")
    for name in chosen.simplified:
        on_note(f"golden {name}: asked in a simpler form, which the model's template and context take")
    if chosen.dated:
        on_note("the chat template writes the date: the goldens' prompts are of today")
    return answer_prompts(held, decoder, chosen.prompts, options.loading, device, on_progress)


def _write(recorded: Sequence[Recorded], directory: Path, manifest: Manifest) -> tuple[FileEntry, ...]:
    if (directory / GOLDENS).exists():
        shutil.rmtree(directory / GOLDENS)
    (directory / GOLDENS).mkdir()
    goldens, written = [], [GOLDENS_FILE]
    for one in recorded:
        golden = _golden(one)
        (directory / GOLDENS / golden.name).mkdir()
        for path, data in zip(golden.pictures, one.prompt.question.pictures, strict=True):
            (directory / path).write_bytes(data)
            written.append(path)
        for name, values in one.arrays.items():
            dtype = np.dtype(np.float32) if name == "pixel_values" else golden_dtype(manifest)
            np.save(directory / golden.path(name), _as(values, dtype, f"golden {golden.name}, {name}"))
            written.append(golden.path(name))
        goldens.append(golden)
    weights: Literal["checkpoint", "stored"] = "checkpoint" if manifest.quantization is None else "stored"
    tools = {name: importlib.metadata.version(name) for name in TOOLS}
    whole = Goldens(GOLDENS_FORMAT_VERSION, tools, weights, tuple(goldens))
    (directory / GOLDENS_FILE).write_text(whole.to_json(), encoding="utf-8")
    return tuple(describe_file(directory, path) for path in sorted(written))


def _golden(recorded: Recorded) -> Golden:
    question = recorded.prompt.question
    return Golden(
        name=question.name,
        messages=question.messages,
        pictures=tuple(f"{GOLDENS}/{question.name}/picture-{n}.png" for n in range(1, len(question.pictures) + 1)),
        prompt=recorded.prompt.text,
        input_ids=recorded.prompt.ids,
        token_ids=recorded.token_ids,
    )


def _as(values: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{what}: PyTorch gives NaN or infinity; the checkpoint is damaged, take it from its source again"
        )
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not np.isfinite(cast).all():
        raise InputError(
            f"{what}: PyTorch gives {np.abs(values).max():g}, outside the range of {dtype}, which the bundle computes "
            "in; export it with --precision fp32"
        )
    return np.ascontiguousarray(cast)
