"""Goldens in bundles of the shipped model: read back, reproduced by the runtime, recorded again, never by halves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.errors import BundleError, InputError, LlavaDeployError, OptionError
from llava_deploy.engines.goldens import GOLDENS, Golden, golden_dtype, has_goldens, read_golden_array, read_goldens
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import MANIFEST_NAME, read_manifest
from llava_deploy.engines.names import Precision
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import Checkpoint, CheckpointOptions, open_checkpoint
from llava_deploy.exporter.goldens import record as recording
from llava_deploy.exporter.goldens.record import RecordOptions, is_golden, record
from llava_deploy.runtime import Llava
from llava_deploy.runtime.pictures import load_picture
from llava_deploy.runtime.prompt import render_chat
from llava_deploy.runtime.stages import INT8_TOLERANCE, TOLERANCE, pixel_stage, stage
from llava_deploy.runtime.tokenize import tokenize_prompt

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int4")
NAMES = ["one-picture", "two-pictures", "text-only"]
Shipped = Callable[[Precision], Path]


@pytest.fixture
def checkpoint(demo_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(demo_checkpoint)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_read_back(shipped_bundle: Shipped, precision: Precision) -> None:
    bundle = shipped_bundle(precision)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest.files, Integrity.FULL, remedy="")
    goldens = read_goldens(bundle, manifest)
    assert [golden.name for golden in goldens.goldens] == NAMES
    assert goldens.decoder_weights == ("stored" if precision == "int4" else "checkpoint")
    assert {"torch", "transformers", "tokenizers", "pillow"} <= set(goldens.tools)
    on_disk = {path.relative_to(bundle).as_posix() for path in (bundle / GOLDENS).rglob("*") if path.is_file()}
    assert on_disk == {entry.path for entry in manifest.files if is_golden(entry.path)}
    for golden in goldens.goldens:
        for name in arrays_of(golden):
            values = read_golden_array(bundle, manifest, golden, name)
            assert values.dtype == (np.float32 if name == "pixel_values" else golden_dtype(manifest))
            assert np.isfinite(values).all()
        logits = read_golden_array(bundle, manifest, golden, "logits")
        assert logits.argmax(-1).tolist() == list(golden.token_ids)
        assert golden.token_ids[-1] in manifest.chat.stop_token_ids or len(golden.token_ids) == 16
    sizes = [load_picture(bundle / path).size for golden in goldens.goldens for path in golden.pictures]
    assert len({*sizes}) == 3
    assert all(width != height and manifest.vision.image_width not in (width, height) for width, height in sizes)
    assert sum(width < height for width, height in sizes) == 1


def arrays_of(golden: Golden) -> list[Any]:
    return [*(["pixel_values", "image_features"] if golden.pictures else []), "inputs_embeds", "logits"]


def as_messages(golden: Golden, bundle: Path) -> list[dict[str, Any]]:
    pictures = iter(golden.pictures)

    def plain(text: str | None) -> dict[str, Any]:
        return {"type": "image", "image": bundle / next(pictures)} if text is None else {"type": "text", "text": text}

    return [{"role": m.role, "content": [plain(part.text) for part in m.content]} for m in golden.messages]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_runtime_says_the_same(shipped_bundle: Shipped, precision: Precision) -> None:
    bundle = shipped_bundle(precision)
    llava = Llava.load(bundle, threads=1)
    manifest = llava.manifest
    tolerance = TOLERANCE[precision]
    for golden in read_goldens(bundle, manifest).goldens:
        wanted = {name: read_golden_array(bundle, manifest, golden, name) for name in arrays_of(golden)}
        pictures = [load_picture(bundle / path) for path in golden.pictures]
        assert render_chat(as_messages(golden, bundle), manifest.chat) == golden.prompt
        assert tokenize_prompt(golden.prompt, llava.encoder.tokenizer, manifest.chat).tolist() == list(golden.input_ids)
        if pictures:
            pixels = llava.encoder.pixels(pictures)
            assert pixel_stage(pixels, wanted["pixel_values"], manifest.image).ok
            features = llava.encoder.vision.encode(wanted["pixel_values"])
            found = stage("features", "projector", np.stack([*features]), wanted["image_features"], tolerance)
            assert found.ok, found
        embeds = llava.encoder.encode([golden.prompt], [pictures], llava.max_len).tokens.on_host()[0]
        assert stage("splice", "splice", embeds, wanted["inputs_embeds"], tolerance).ok
        along = llava.logits_along([golden.prompt], [pictures], [golden.token_ids])
        logits = np.concatenate([row.copy() for row in along])
        rounds = INT8_TOLERANCE if precision == "int4" else tolerance
        found = stage("logits", "logits", logits, wanted["logits"], rounds)
        assert found.ok, found
        answer = llava.generate([golden.prompt], [pictures], max_new_tokens=16)[0]
        assert answer.token_ids == golden.token_ids


def test_the_same_bytes_again_and_engines_stay(own_bundle: Shipped, checkpoint: Checkpoint) -> None:
    bundle = own_bundle("fp32")
    build_onnxruntime(bundle)
    before = read_manifest(bundle)
    engines = sorted(path.relative_to(bundle) for path in (bundle / ENGINES).rglob("*"))
    (bundle / GOLDENS / "stale.npy").write_bytes(b"of an older version")
    assert record(checkpoint, bundle) == before == read_manifest(bundle)
    check_files(bundle, before.files, Integrity.FULL, remedy="")
    assert not (bundle / GOLDENS / "stale.npy").exists()
    assert sorted(path.relative_to(bundle) for path in (bundle / ENGINES).rglob("*")) == engines
    assert "engine" in Llava.load(bundle, threads=1).backend


def test_goldens_for_a_bundle_that_has_none(demo_bundle_fp16: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    bundle = Path(shutil.copytree(demo_bundle_fp16, tmp_path / "bundle"))
    assert not has_goldens(read_manifest(bundle))
    manifest = record(checkpoint, bundle, RecordOptions(max_new_tokens=2))
    assert has_goldens(manifest)
    assert {len(golden.token_ids) for golden in read_goldens(bundle, manifest).goldens} == {2}
    without = replace(manifest, files=tuple(entry for entry in manifest.files if not is_golden(entry.path)))
    assert without == read_manifest(demo_bundle_fp16)


def without_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "answer_prompts", None)  # what is refused is refused before


def test_another_model_is_refused(
    own_bundle: Shipped, checkpoint: Checkpoint, make_llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = own_bundle("fp32")
    without_answering(monkeypatch)
    other = open_checkpoint(make_llava().directory)
    with pytest.raises(InputError, match="made from a model of other sizes"):
        record(other, bundle)
    with pytest.raises(InputError, match="its chat recipe is not that of"):
        record(open_checkpoint(checkpoint.directory, CheckpointOptions(conversation="plain")), bundle)
    with pytest.raises(InputError, match="its tokenizer is not that of"):
        record(replace(checkpoint, tokenizer_json=checkpoint.tokenizer_json + b" "), bundle)
    with pytest.raises(InputError, match="its pictures' recipe is not that of"):
        record(replace(checkpoint, image=replace(checkpoint.image, resample=2)), bundle)


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        ("fp32", "language_model.layers.3.mlp.down_proj.weight"),
        ("fp16", "projector.1.weight"),
        ("int4", "vision_tower.encoder.layers.0.self_attn.q_proj.weight"),
        ("int4", "language_model.embed_tokens.weight"),
    ],
)
def test_another_models_weights_are_refused(
    own_bundle: Shipped,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    name: str,
) -> None:
    bundle = own_bundle(precision)
    without_answering(monkeypatch)
    source = checkpoint.tensors[name]

    class Tuned:
        shape, files = source.shape, source.files

        def read(self) -> np.ndarray:
            return np.asarray(source.read(), np.float32) * np.float32(1.01)

    tensors = MappingProxyType({**checkpoint.tensors, name: Tuned()})
    with pytest.raises(InputError, match=f"its weight '{name}' is not that of"):
        record(replace(checkpoint, tensors=tensors), bundle)  # type: ignore[arg-type]


def test_a_damaged_bundle_is_refused(
    own_bundle: Shipped, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch is given what a quantised bundle holds: a flipped bit would become the truth."""
    bundle = own_bundle("int4")
    without_answering(monkeypatch)
    path = bundle / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="the file was altered"):
        record(checkpoint, bundle)


@pytest.mark.parametrize(
    ("fields", "message"), [({"device": "tpu"}, "want cpu, cuda"), ({"max_new_tokens": 0}, "want 1 or more")]
)
def test_options_that_cannot_be(
    own_bundle: Shipped, checkpoint: Checkpoint, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        record(checkpoint, own_bundle("fp32"), RecordOptions(**fields))


def state_of(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_old_bundle(
    own_bundle: Shipped, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = own_bundle("fp32")
    before = state_of(bundle)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(LlavaDeployError, match="the disk is full"):
            record(checkpoint, bundle)
    assert state_of(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_a_bundle_that_changes_meanwhile_is_left_alone(
    own_bundle: Shipped, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = own_bundle("fp32")
    answers = recording._answers

    def slow(*args: Any) -> Any:
        manifest = read_manifest(bundle)
        changed = replace(manifest, model=replace(manifest.model, name="swapped"))
        (bundle / MANIFEST_NAME).write_text(changed.to_json())
        return answers(*args)

    monkeypatch.setattr(recording, "_answers", slow)
    with pytest.raises(LlavaDeployError, match="changed while its goldens were recorded"):
        record(checkpoint, bundle)
    assert read_manifest(bundle).model.name == "swapped"


def test_killed_at_any_time(own_bundle: Shipped, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old goldens or the new ones, whole; the next recording works and clears what was left."""
    bundle = own_bundle("fp32")
    old = read_manifest(bundle)
    shorter = RecordOptions(max_new_tokens=3)
    answers = recording._answers(checkpoint, bundle, old, shorter, lambda *_: None, lambda _: None)
    monkeypatch.setattr(recording, "_answers", lambda *_: answers)
    seen = []
    for name, calls in (("save", 0), ("save", 4), ("fsync", 0), ("fsync", 9), ("link", 3), ("write_text", 1)):
        child = os.fork()
        if child == 0:
            killing(name, calls)
            record(checkpoint, bundle)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, name
        seen.append(read_manifest(bundle))
        check_files(bundle, seen[-1].files, Integrity.FULL, remedy="")
    new = record(checkpoint, bundle)
    assert new != old
    assert {manifest.to_json() for manifest in seen} <= {old.to_json(), new.to_json()}
    assert seen[0] == old
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def killing(name: str, calls: int) -> None:
    """In a child: SIGKILL at the given call of a function that writes."""
    home: Any = {"save": np, "fsync": os, "link": os, "write_text": Path}[name]
    function, left = getattr(home, name), [calls]

    def dying(*args: Any, **options: Any) -> Any:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return function(*args, **options)

    setattr(home, name, dying)
