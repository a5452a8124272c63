"""Goldens of random models are what the originals answer by themselves: transformers' LLaVA, and LLaVA's own class."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import CheckpointError, InputError
from llava_deploy.engines.goldens import Golden, Goldens, read_golden_array, read_goldens
from llava_deploy.engines.manifest import Manifest, read_manifest
from llava_deploy.exporter.checkpoint import Checkpoint, CheckpointOptions, open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.goldens import answers, layers
from llava_deploy.exporter.goldens.record import RecordOptions, record, record_goldens

PLACEHOLDER, NEW_TOKENS = "<image>", 16
LONG = {"max_position_embeddings": 1024}
HF: dict[str, dict[str, Any]] = {
    "plain": {"text": LONG},
    "tied, one key head": {"text": {**LONG, "tie_word_embeddings": True, "num_key_value_heads": 1},
                           "tie_word_embeddings": True, "seed": 3},
    "two feature layers, class token kept, biases": {
        "text": {**LONG, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3},
        "vision_feature_layer": [-3, -1], "vision_feature_select_strategy": "full", "seed": 5},
    "half as stored": {"text": {**LONG, "head_dim": 24}, "dtype": torch.bfloat16, "seed": 7},
}  # fmt: skip


def recorded(checkpoint: Checkpoint, bundle: Path, options: RecordOptions) -> tuple[Manifest, Goldens]:
    export(checkpoint, bundle, "fp32", record=lambda at, manifest: record_goldens(checkpoint, at, manifest, options))
    manifest = read_manifest(bundle)
    return manifest, read_goldens(bundle, manifest)


def pictures_of(golden: Golden, bundle: Path) -> list[Image.Image]:
    return [Image.open(bundle / path) for path in golden.pictures]


@pytest.mark.parametrize("case", HF)
def test_llava_hf_is_transformers_own(make_llava: Any, tmp_path: Path, case: str) -> None:
    """Its processor's pixels and ids, its features, and what its ``generate`` answers."""
    saved = make_llava(**HF[case])
    checkpoint = open_checkpoint(saved.directory)
    model = LlavaForConditionalGeneration.from_pretrained(saved.directory, dtype=torch.float32).eval()
    manifest, goldens = recorded(checkpoint, tmp_path / "bundle", RecordOptions())
    full = model.config.vision_feature_select_strategy == "full"
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(saved.directory),
        PreTrainedTokenizerFast.from_pretrained(saved.directory),
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=PLACEHOLDER,
    )
    assert [golden.name for golden in goldens.goldens] == ["one-picture", "two-pictures", "text-only"]
    for golden in goldens.goldens:
        given = processor(
            text=golden.prompt, images=pictures_of(golden, tmp_path / "bundle") or None, return_tensors="pt"
        )
        patches = manifest.vision.patches
        assert patches == 9 + full
        spread = [
            token
            for id_ in golden.input_ids
            for token in ([model.config.image_token_id] * patches if id_ == IMAGE_TOKEN_INDEX else [id_])
        ]
        assert given["input_ids"][0].tolist() == spread
        found = {name: read_golden_array(tmp_path / "bundle", manifest, golden, name) for name in names_of(golden)}
        if golden.pictures:
            np.testing.assert_array_equal(found["pixel_values"], given["pixel_values"].numpy())
            with torch.no_grad():
                features = model.get_image_features(pixel_values=given["pixel_values"])
            features = torch.stack(list(getattr(features, "pooler_output", features)))
            np.testing.assert_allclose(found["image_features"], features, atol=2e-5, rtol=1e-4)
        wanted = model.generate(
            **given, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=list(checkpoint.chat.stop_token_ids), pad_token_id=0,
        )  # fmt: skip
        assert golden.token_ids == tuple(wanted.sequences[0, len(spread) :].tolist())
        np.testing.assert_allclose(found["logits"], torch.cat(wanted.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields", [{}, {"mm_projector_type": "linear", "mm_vision_select_feature": "cls_patch", "seed": 4}], ids=str
)
def test_the_original_layout_is_llavas_own(make_original: Any, tmp_path: Path, fields: dict[str, Any]) -> None:
    saved = make_original(**LONG, **fields)
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(vision_tower=saved.tower))
    assert checkpoint.chat.tokenization == "split"
    manifest, goldens = recorded(checkpoint, tmp_path / "bundle", RecordOptions())
    processor = CLIPImageProcessorPil.from_pretrained(saved.tower)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved.directory)
    for golden in goldens.goldens:
        assert list(golden.input_ids) == tokenizer_image_token(golden.prompt, tokenizer)
        pixels = None
        if golden.pictures:
            pictures = [picture.convert("RGB") for picture in pictures_of(golden, tmp_path / "bundle")]
            pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        wanted = saved.model.generate(
            torch.tensor([golden.input_ids]), images=pixels, do_sample=False, max_new_tokens=NEW_TOKENS,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0,
            eos_token_id=list(checkpoint.chat.stop_token_ids),
        )  # fmt: skip
        assert golden.token_ids == tuple(wanted.sequences[0].tolist())
        found = read_golden_array(tmp_path / "bundle", manifest, golden, "logits")
        np.testing.assert_allclose(found, torch.cat(wanted.logits), atol=1e-4, rtol=1e-4)
        assert golden.prompt.count(PLACEHOLDER) == len(golden.pictures)


def tokenizer_image_token(prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """LLaVA's rule in other words: each stretch is a text of its own; of their BOS, only the first stays."""
    first, *rest = (tokenizer(stretch).input_ids for stretch in prompt.split(PLACEHOLDER))
    assert first[0] == tokenizer.bos_token_id
    return [*first, *(token for stretch in rest for token in [IMAGE_TOKEN_INDEX, *stretch[1:]])]


def names_of(golden: Golden) -> list[Any]:
    return [*(["pixel_values", "image_features"] if golden.pictures else []), "inputs_embeds", "logits"]


@pytest.mark.parametrize("case", [*HF, "a stop token in the middle"])
def test_layer_by_layer_is_the_whole_bit_by_bit(make_llava: Any, tmp_path: Path, case: str) -> None:
    checkpoint = open_checkpoint(make_llava(**HF.get(case, HF["plain"])).directory)
    export(checkpoint, tmp_path / "bundle", "fp32")
    if case not in HF:
        third = golden_tokens(record(checkpoint, tmp_path / "bundle"), tmp_path / "bundle")["two-pictures"][2]
        chat = replace(checkpoint.chat, stop_token_ids=(third,))
        checkpoint = replace(checkpoint, chat=chat)
        export(checkpoint, tmp_path / "bundle", "fp32", replace=True)
    sums = []
    for loading in ("whole", "layers"):
        manifest = record(checkpoint, tmp_path / "bundle", RecordOptions(loading=loading))
        sums.append({entry.path: entry.sha256 for entry in manifest.files})
    assert sums[0] == sums[1]
    lengths = {len(tokens) for tokens in golden_tokens(manifest, tmp_path / "bundle").values()}
    assert (lengths == {NEW_TOKENS}) == (case in HF)


def golden_tokens(manifest: Manifest, bundle: Path) -> dict[str, tuple[int, ...]]:
    return {golden.name: golden.token_ids for golden in read_goldens(bundle, manifest).goldens}


def test_one_layer_is_in_memory_at_a_time(make_llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_llava(text={**LONG, "num_hidden_layers": 5}).directory)
    alive: list[int] = []
    loaded: list[weakref.ref[Any]] = []
    load = layers.load_layer

    def watched(*args: Any) -> Any:
        alive.append(sum(layer() is not None for layer in loaded))
        layer = load(*args)
        loaded.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(layers, "load_layer", watched)
    monkeypatch.setattr(answers, "load_decoder", None)
    steps: list[tuple[int, int]] = []
    options = RecordOptions(max_new_tokens=2, loading="layers")
    export(checkpoint, tmp_path / "bundle", "fp32")
    record(checkpoint, tmp_path / "bundle", options, on_progress=lambda done, total: steps.append((done, total)))
    assert len(alive) == 2 * 5
    assert {*alive} == {0}
    assert steps == [(done, 1 + 2 * 5) for done in range(1 + 2 * 5 + 1)]


def test_what_does_not_fit_is_taken_layer_by_layer(
    make_llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_llava(text=LONG).directory)
    device = torch.device("cpu")
    decoder = sum(
        4 * int(np.prod(source.shape))
        for name, source in checkpoint.tensors.items()
        if not name.startswith(("vision_tower", "projector"))
    )
    room = 1 << 30
    free: dict[int | None, bool] = {decoder + room: True, decoder + room - 1: False, None: False}
    for available, fits in free.items():
        monkeypatch.setattr(answers, "available_memory", lambda available=available: available)
        assert answers.fits(checkpoint, device) is fits
    monkeypatch.setattr(answers, "load_decoder", None)
    export(checkpoint, tmp_path / "bundle", "fp32")
    record(checkpoint, tmp_path / "bundle")  # which would call None


def test_values_that_cannot_be_kept_are_refused(make_llava: Any, tmp_path: Path) -> None:
    """float16 holds 65504; and NaN is nobody's truth."""
    checkpoint = open_checkpoint(make_llava(text=LONG).directory)
    for factor, error, message in ((5e4, InputError, "outside the range of float16"), (np.nan, CheckpointError, "NaN")):
        bundle = tmp_path / f"bundle-{factor}"
        export(checkpoint, bundle, "fp16")
        scaled = scaled_weight(checkpoint, "projector.1.weight", factor)
        with pytest.raises(error, match=message):
            record_goldens(scaled, bundle, read_manifest(bundle))


def scaled_weight(checkpoint: Checkpoint, name: str, factor: float) -> Checkpoint:
    source = checkpoint.tensors[name]

    class Scaled:
        shape, files, nbytes = source.shape, source.files, source.nbytes

        def read(self) -> np.ndarray:
            return np.asarray(source.read(), np.float32) * np.float32(factor)

    return replace(checkpoint, tensors=MappingProxyType({**checkpoint.tensors, name: Scaled()}))  # type: ignore[dict-item]
