"""A swapped bundle is the bundle that an export of the mixed model writes, byte for byte."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from finetuned import DECODER, PROJECTOR, finetuned, logits_of

from llava_deploy.engines.errors import BundleError, CheckpointError, InputError, LlavaDeployError
from llava_deploy.engines.manifest import FileEntry, read_manifest
from llava_deploy.engines.names import Precision, SwapPart
from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.swap import swap as swap_module
from llava_deploy.exporter.swap.swap import swap
from llava_deploy.runtime import Llava

PARTS: dict[SwapPart, tuple[str, ...]] = {"projector": PROJECTOR, "decoder": DECODER}
STORED: dict[str, tuple[Precision, QuantizeOptions | None]] = {
    "fp32": ("fp32", None),
    "fp16": ("fp16", None),
    "int4": ("int4", QuantizeOptions(32, False, "fp16")),
    "int4 symmetric, int8 head": ("int4", QuantizeOptions(32, True, "int8")),
    "int4 head": ("int4", QuantizeOptions(32, False, "int4")),
}


def exported(checkpoint: Checkpoint, output: Path, stored: str) -> Path:
    precision, options = STORED[stored]
    export(checkpoint if options is None else round_to_nearest(checkpoint, options), output, precision)
    return output


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("seed", "stored"), [*enumerate(STORED), (5, "fp16"), (6, "int4"), (7, "int4 symmetric, int8 head")]
)
def test_as_an_export_writes_it(
    drawn: Any,
    random_config: Any,
    contents: Any,
    with_part: Any,
    tmp_path: Path,
    seed: int,
    stored: str,
    part: SwapPart,
) -> None:
    changes = random_config(seed)
    old, other = drawn(0, changes), drawn(1, changes)
    bundle = exported(old, tmp_path / "bundle", stored)
    before = contents(bundle)
    says: list[str] = []
    manifest = swap(other, bundle, part, say=says.append)
    want = contents(exported(with_part(old, other, PARTS[part]), tmp_path / "want", stored))
    found = contents(bundle)
    assert [name for name in want if found[name] != want[name]] == []
    assert found.keys() == want.keys()
    changed = {name for name in found if found[name] != before[name]} - {"manifest.json"}
    table = {"embed_tokens.npy", "decoder.onnx.data"}
    assert changed == ({"vision.onnx.data"} if part == "projector" else table)
    assert manifest == read_manifest(bundle)
    assert len(says) == 1  # of the other half, which has other weights too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "want"]


@pytest.mark.parametrize("stored", ["fp32", "fp16", "int4"])
def test_answers_are_those_of_the_new_model(demo_checkpoint: Path, tmp_path: Path, stored: str) -> None:
    shipped = open_checkpoint(demo_checkpoint)
    other = finetuned(shipped, (*PROJECTOR, *DECODER))
    bundle = exported(shipped, tmp_path / "bundle", stored)
    seen = [logits_of(Llava.load(bundle))]
    for part in PARTS:
        swap(other, bundle, part)
        seen.append(logits_of(Llava.load(bundle)))
    want = logits_of(Llava.load(exported(other, tmp_path / "want", stored)))
    np.testing.assert_array_equal(seen[-1], want)
    assert all(np.abs(one - two).max() > 0.1 for one, two in itertools.pairwise(seen))


def test_the_same_weights_change_nothing(drawn: Any, contents: Any, tmp_path: Path) -> None:
    bundle = exported(drawn(), tmp_path / "bundle", "fp16")
    before, says = contents(bundle), list[str]()
    for part in PARTS:
        swap(drawn(), bundle, part, say=says.append)
    assert contents(bundle) == before
    assert says == []


def test_what_stays_is_not_copied(drawn: Any, tmp_path: Path) -> None:
    bundle = exported(drawn(), tmp_path / "bundle", "fp16")
    before = (bundle / "decoder.onnx.data").stat()
    swap(drawn(1), bundle, "projector")
    after = (bundle / "decoder.onnx.data").stat()
    assert (after.st_ino, after.st_nlink) == (before.st_ino, 1)


def test_a_bundle_whose_files_have_other_names_too(drawn: Any, contents: Any, tmp_path: Path) -> None:
    """As backups have it, and what a swap that was killed has left."""
    bundle, backup = exported(drawn(), tmp_path / "bundle", "int4"), tmp_path / "backup"
    shutil.copytree(bundle, backup, copy_function=os.link)
    before = contents(backup)
    swap(drawn(1), bundle, "projector")
    swap(drawn(1), bundle, "decoder")
    assert contents(backup) == before
    assert (bundle / "decoder.onnx.data").read_bytes() != before["decoder.onnx.data"]


def test_a_bundle_that_is_a_link(drawn: Any, tmp_path: Path) -> None:
    bundle = exported(drawn(), tmp_path / "real" / "bundle", "fp32")
    link = tmp_path / "current"
    link.symlink_to(bundle)
    before = (bundle / "vision.onnx.data").read_bytes()
    swap(drawn(1), link, "projector")
    assert link.is_symlink()
    assert (bundle / "vision.onnx.data").read_bytes() != before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_running_model_goes_on_with_the_old_weights(demo_checkpoint: Path, tmp_path: Path) -> None:
    shipped = open_checkpoint(demo_checkpoint)
    bundle = exported(shipped, tmp_path / "bundle", "fp16")
    running = Llava.load(bundle)
    before = logits_of(running)
    for part, beginnings in PARTS.items():
        swap(finetuned(shipped, beginnings), bundle, part)
    np.testing.assert_array_equal(logits_of(running), before)
    assert np.abs(logits_of(Llava.load(bundle)) - before).max() > 0.1


def test_the_rest_of_a_checkpoint_is_not_read_where_it_is_not_wanted(drawn: Any, tmp_path: Path) -> None:
    """Another decoder, of other sizes even: there are no goldens to record with it."""
    bundle = exported(drawn(), tmp_path / "bundle", "fp16")
    other = drawn(1, {"decoder": {"intermediate_size": 160, "num_hidden_layers": 1}})
    swap(other, bundle, "projector")
    with pytest.raises(InputError, match="layers: want 2, found 1"):
        swap(other, bundle, "decoder")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def unchanged(bundle: Path, act: Callable[[], object], contents: Any, error: type[Exception], match: str) -> None:
    before = contents(bundle)
    with pytest.raises(error, match=match):
        act()
    assert contents(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_a_full_disk(drawn: Any, contents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported(drawn(), tmp_path / "bundle", "fp16")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(swap_module, "write_graph", full)
        unchanged(
            bundle, lambda: swap(drawn(1), bundle, "decoder"), contents, LlavaDeployError, "bundle: the disk is ful"
        )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, (1 << 30) - 1000, 1000))
    said = r"the new weights want [\d,]+ bytes beside the old ones, 1,000 are free"
    unchanged(bundle, lambda: swap(drawn(1), bundle, "decoder"), contents, LlavaDeployError, said)


@pytest.mark.parametrize(("part", "name"), [("projector", "projector.0.weight"), ("decoder", "lm_head.weight")])
def test_weights_that_are_no_numbers(drawn: Any, contents: Any, tmp_path: Path, part: SwapPart, name: str) -> None:
    bundle, other = exported(drawn(), tmp_path / "bundle", "fp16"), drawn(1)

    class Broken(type(other.tensors[name])):  # type: ignore[misc]
        def read(self) -> np.ndarray:
            return np.full(self.shape, np.nan, np.float32)

    broken = Broken(name, other.tensors[name].shape, 0)
    other = dataclasses.replace(other, tensors={**other.tensors, name: broken})
    unchanged(bundle, lambda: swap(other, bundle, part), contents, CheckpointError, f"{name}.*NaN or infinite")


@pytest.mark.parametrize("name", ["vision.onnx.data", "tokenizer.json", "decoder.onnx"])
def test_a_damaged_bundle(drawn: Any, contents: Any, tmp_path: Path, name: str) -> None:
    """Of the projector's swap the tower's file is read, whatever its size: a flipped bit would become truth."""
    bundle = exported(drawn(), tmp_path / "bundle", "fp16")
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    unchanged(bundle, lambda: swap(drawn(1), bundle, "projector"), contents, BundleError, f"{name}: want sha256")


def test_a_bundle_without_its_graphs(drawn: Any, contents: Any, tmp_path: Path) -> None:
    bundle = exported(drawn(), tmp_path / "bundle", "fp16")
    manifest = read_manifest(bundle)
    gone = [entry for entry in manifest.files if ".onnx" in entry.path]
    for entry in gone:
        (bundle / entry.path).unlink()
    kept = tuple(entry for entry in manifest.files if entry not in gone)
    left: tuple[FileEntry, ...] = tuple(gone)
    (bundle / "manifest.json").write_text(dataclasses.replace(manifest, files=kept, left_out=left).to_json())
    unchanged(
        bundle, lambda: swap(drawn(1), bundle, "decoder"), contents, BundleError, "was packed without decoder.onnx"
    )


def test_two_swaps_at_once(drawn: Any, tmp_path: Path) -> None:
    """The one that ends last began with what is no longer there."""
    bundle = exported(drawn(), tmp_path / "bundle", "fp16")
    swapped = False

    def swap_meanwhile(_: object) -> None:
        nonlocal swapped
        if not swapped:
            swapped = True
            swap(drawn(2), bundle, "decoder")

    with pytest.raises(InputError, match="another process changed it meanwhile"):
        swap(drawn(1), bundle, "projector", on_progress=swap_meanwhile)
    want = exported(drawn(), tmp_path / "want", "fp16")
    swap(drawn(2), want, "decoder")
    assert (bundle / "manifest.json").read_bytes() == (want / "manifest.json").read_bytes()
