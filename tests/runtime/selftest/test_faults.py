"""One fault at a time: the self-test fails, and at the stage where the fault is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, read_engine_manifest
from llava_deploy.engines.goldens import GOLDENS_FILE
from llava_deploy.engines.manifest import (
    DECODER_GRAPH,
    EMBEDDING_TABLE,
    MANIFEST_NAME,
    TOKENIZER,
    VISION_GRAPH,
    Manifest,
    describe_file,
    read_manifest,
)
from llava_deploy.engines.names import Precision
from llava_deploy.runtime import new_tokens
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeVision
from llava_deploy.runtime.sampling import Sampler
from llava_deploy.runtime.selftest.report import SelftestReport

Copied = Callable[..., Path]
Own = Callable[[Path], Path]
Rewrite = Callable[..., None]
Scaled = Callable[[Path, str, float], None]
Tested = Callable[..., SelftestReport]


@pytest.fixture
def bundle(recorded_bundle: Path, copied: Copied) -> Path:
    """A copy without an engine, whose files may be replaced."""
    return copied(recorded_bundle, ENGINES)


def failed_at(report: SelftestReport) -> str:
    """Name of the first stage that failed, which the report has to tell in all of its ways."""
    assert not report.ok
    assert report.verdict == "fail"
    first = report.first_failure
    assert first is not None
    assert report.to_dict()["first_failure"] == first.result.kind
    assert report.sentence.startswith(f"{first} is the first stage out of tolerance: {first.result.detail}")
    return first.result.name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_one_byte_of_any_file(recorded_bundle: Path, copied: Copied, own: Own, tested: Tested) -> None:
    """Every file in turn; the manifest is the one that nothing hashes, and this byte makes it none."""
    bundle = copied(recorded_bundle)
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    assert {path.suffix for path in files} == {".onnx", ".data", ".npy", ".json", ".png"}
    for path in files:
        before = path.read_bytes()
        flip(own(path))
        report = tested(bundle)
        assert failed_at(report) == "files", path
        assert len(report.stages) == 1, path
        assert path.name in report.sentence or path.name == ENGINE_MANIFEST  # which hashes the others
        path.write_bytes(before)
    assert tested(bundle).ok
    text = own(bundle / MANIFEST_NAME).read_text(encoding="utf-8")
    (bundle / MANIFEST_NAME).write_text(text.replace('"format_version"', '"format-version"', 1), encoding="utf-8")
    report = tested(bundle)
    assert failed_at(report) == "files"
    assert report.bundle is None
    assert report.versions["python"]
    json.dumps(report.to_dict(), allow_nan=False)


def test_all_damaged_files_are_counted(bundle: Path, own: Own, tested: Tested) -> None:
    flip(own(bundle / TOKENIZER))
    (bundle / EMBEDDING_TABLE).unlink()
    report = tested(bundle)
    assert failed_at(report) == "files"
    assert report.sentence.endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("graph", "tensor", "stage"),
    [
        (VISION_GRAPH, "vision_tower.embeddings.patch_embedding.weight", "image features"),
        (VISION_GRAPH, "vision_tower.encoder.layers.0.self_attn.q_proj.bias", "image features"),
        (VISION_GRAPH, "projector.1.weight", "image features"),
        (DECODER_GRAPH, "language_model.layers.2.self_attn.k_proj.weight", "logits"),
        (DECODER_GRAPH, "language_model.norm.weight", "logits"),
        (DECODER_GRAPH, "lm_head.weight", "logits"),
    ],
)
def test_a_weight_off_by_a_percent(
    bundle: Path, scaled: Scaled, rewrite: Rewrite, tested: Tested, graph: str, tensor: str, stage: str
) -> None:
    scaled(bundle / graph, tensor, 1.01)
    rewrite(bundle)
    assert failed_at(tested(bundle)) == stage


@pytest.mark.parametrize(
    ("precision", "graph", "tensor", "stage"),
    [
        ("fp16", VISION_GRAPH, "projector.1.weight", "image features"),
        ("fp16", DECODER_GRAPH, "language_model.layers.1.mlp.down_proj.weight", "logits"),
        ("int4", DECODER_GRAPH, "language_model.layers.0.mlp.gate_proj.weight_scale", "logits, not rounded"),
    ],
)
def test_a_weight_off_by_a_percent_in_16_bits_and_4(
    recorded_in: Callable[[Precision], Path],
    copied: Copied,
    scaled: Scaled,
    rewrite: Rewrite,
    tested: Tested,
    precision: Precision,
    graph: str,
    tensor: str,
    stage: str,
) -> None:
    bundle = copied(recorded_in(precision), ENGINES)
    scaled(bundle / graph, tensor, 1.01)
    rewrite(bundle)
    assert failed_at(tested(bundle)) == stage


def test_a_weight_of_the_engine_off_by_a_percent(
    recorded_bundle: Path, copied: Copied, scaled: Scaled, tested: Tested
) -> None:
    bundle = copied(recorded_bundle)
    (engine,) = (bundle / ENGINES).iterdir()
    graph = onnx.load(engine / DECODER_GRAPH, load_external_data=False).graph
    largest = max((t for t in graph.initializer if t.external_data), key=lambda t: int(np.prod(t.dims)))
    scaled(engine / DECODER_GRAPH, largest.name, 1.01)
    manifest = read_engine_manifest(engine)
    files = tuple(describe_file(engine, entry.path) for entry in manifest.files)
    (engine / ENGINE_MANIFEST).unlink()
    (engine / ENGINE_MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    report = tested(bundle)
    assert failed_at(report) == "logits"
    assert report.backend is not None
    assert "engine onnxruntime-" in report.backend.reason


def test_embeddings_off_by_a_percent(bundle: Path, own: Own, rewrite: Rewrite, tested: Tested) -> None:
    table = np.load(own(bundle / EMBEDDING_TABLE), mmap_mode="r+")
    table *= table.dtype.type(1.01)
    table.flush()
    rewrite(bundle)
    assert failed_at(tested(bundle)) == "splice"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mean", lambda image: {"mean": (image.mean[0] + 0.001, *image.mean[1:])}),
        ("std", lambda image: {"std": (*image.std[:2], image.std[2] + 0.001)}),
        ("resample", lambda _: {"resample": 2}),
        ("resize", lambda image: {"resize": ("shortest_edge", image.resize[1] + 1)}),
        ("rescale_factor", lambda image: {"rescale_factor": image.rescale_factor * 255 / 256}),
        ("pad_to_square", lambda _: {"pad_to_square": True}),
    ],
)
def test_a_preprocessing_constant_off(
    bundle: Path, rewrite: Rewrite, tested: Tested, name: str, change: Callable[[Any], dict[str, Any]]
) -> None:
    rewrite(bundle, lambda m: replace(m, image=replace(m.image, **change(m.image))))
    assert failed_at(tested(bundle)) == "pixels", name


def test_one_token_of_the_template_changed(bundle: Path, rewrite: Rewrite, tested: Tested) -> None:
    def change(manifest: Manifest) -> Manifest:
        assert manifest.chat.template is not None
        template = manifest.chat.template.replace("ASSISTANT:", "ASSISTANT;", 1)
        assert template != manifest.chat.template
        return replace(manifest, chat=replace(manifest.chat, template=template))

    rewrite(bundle, change)
    report = tested(bundle)
    assert failed_at(report) == "prompt"
    assert "'e? ASSISTANT; A purple c' instead of 'e? ASSISTANT: A purple c'" in report.sentence
    assert {stage.result.kind for stage in report.stages if not stage.result.ok} == {"prompt"}


def test_a_tokenizer_with_two_tokens_exchanged(bundle: Path, own: Own, rewrite: Rewrite, tested: Tested) -> None:
    path = own(bundle / TOKENIZER)
    data = json.loads(path.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    ids = set(json.loads((bundle / GOLDENS_FILE).read_text())["goldens"][0]["input_ids"])
    one, other = [token for token, number in vocab.items() if number in ids and len(token) > 3][:2]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    rewrite(bundle)
    report = tested(bundle)
    assert failed_at(report) == "prompt"
    assert "the ids differ from token" in report.sentence


def test_a_splice_that_puts_the_features_in_backwards(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tested: Tested
) -> None:
    right = new_tokens.splice

    def backwards(ids: Any, positions: Any, mask: Any, labels: Any, runs: Sequence[np.ndarray], **rest: Any) -> Any:
        return right(ids, positions, mask, labels, [run[::-1] for run in runs], **rest)

    monkeypatch.setattr(new_tokens, "splice", backwards)
    assert failed_at(tested(bundle)) == "splice"


def test_a_sampler_that_takes_the_second_best(bundle: Path, monkeypatch: pytest.MonkeyPatch, tested: Tested) -> None:
    monkeypatch.setattr(Sampler, "choose", lambda _, logits: np.argsort(logits, axis=-1)[:, -2].tolist())
    report = tested(bundle)
    assert failed_at(report) == "tokens"
    assert "PyTorch's choice leads by" in report.sentence


def test_answers_that_are_no_numbers(bundle: Path, monkeypatch: pytest.MonkeyPatch, tested: Tested) -> None:
    right = OnnxRuntimeDecoder.step
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeDecoder, "step", lambda *a, **b: np.full_like(right(*a, **b), np.nan))
        report = tested(bundle)
    assert failed_at(report) == "logits"
    json.dumps(report.to_dict(), allow_nan=False)
    seen = OnnxRuntimeVision.encode
    monkeypatch.setattr(OnnxRuntimeVision, "encode", lambda *a: np.full_like(seen(*a), np.nan))
    assert failed_at(tested(bundle)) == "image features"


def test_a_backend_that_is_right_in_rows_of_one_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tested: Tested
) -> None:
    right = OnnxRuntimeDecoder.step

    def step(self: Any, inputs_embeds: np.ndarray, *rest: Any) -> np.ndarray:
        logits = right(self, inputs_embeds, *rest)
        return logits if len(logits) == 1 else np.roll(logits, 1, axis=0)

    monkeypatch.setattr(OnnxRuntimeDecoder, "step", step)
    assert failed_at(tested(bundle)) == "tokens, in a batch of 3"


def test_a_backend_that_loses_its_cache_between_questions(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tested: Tested
) -> None:
    right = OnnxRuntimeDecoder.begin

    def begin(self: Any, batch: int) -> None:
        if batch == self._batch:
            self.clear()
        right(self, batch)

    monkeypatch.setattr(OnnxRuntimeDecoder, "begin", begin)
    assert failed_at(tested(bundle)) == "tokens, asked again"


def test_another_models_goldens(
    bundle: Path, recorded_in: Callable[[Precision], Path], own: Own, rewrite: Rewrite, tested: Tested
) -> None:
    """Of other sizes, they are no goldens of this bundle; of the same, the first stage that computes tells."""
    goldens = json.loads((bundle / GOLDENS_FILE).read_text(encoding="utf-8"))["goldens"]
    for golden in goldens:
        for path in (bundle / "goldens" / golden["name"]).glob("*.npy"):
            values = np.load(path)
            if path.name in ("image_features.npy", "logits.npy"):
                np.save(own(path), np.roll(values, 1, axis=-1))
    rewrite(bundle)
    assert failed_at(tested(bundle)) == "image features"
    other = recorded_in("fp16") / "goldens"
    for path in bundle.rglob("logits.npy"):
        np.save(own(path), np.load(other / path.relative_to(bundle / "goldens")))
    rewrite(bundle)
    report = tested(bundle)
    assert failed_at(report) == "files"
    assert "logits.npy: want float32" in report.sentence


def test_the_first_failure_is_the_earliest_stage_whatever_the_golden(
    bundle: Path, scaled: Scaled, rewrite: Rewrite, tested: Tested
) -> None:
    scaled(bundle / DECODER_GRAPH, "lm_head.weight", 1.01)
    rewrite(bundle, lambda m: replace(m, image=replace(m.image, resample=2)))
    report = tested(bundle)
    assert failed_at(report) == "pixels"
    failures = {stage.result.kind for stage in report.stages if not stage.result.ok}
    assert {"pixels", "logits"} <= failures
    assert not {"image features", "splice", "prompt"} & failures  # each is given what was recorded before it
    assert read_manifest(bundle).image.resample == 2
