"""Both checkpoint layouts, and equality with transformers' own LLaVA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.reference import LlavaLlamaForCausalLM, from_checkpoint, save_hf, save_original

MakeModel = Callable[..., LlavaLlamaForCausalLM]


def assert_same_weights(model: LlavaLlamaForCausalLM, other: LlavaLlamaForCausalLM) -> None:
    got, want = other.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def rename(directory: Path, *pairs: tuple[str, str]) -> None:
    """Rename each tensor by the first prefix that it starts with."""
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        old, new = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        tensors[new + name[len(old) :]] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


CONFIGS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "rope_theta": 5000.0},
    {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=["plain", "tied", "biases", "cls"])
def test_published_layout_round_trip_and_equality_with_transformers(
    make_model: MakeModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = make_model(**changes)
    save_hf(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    families = (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.vision_model.",
        "multi_modal_projector.linear_",
    )
    assert all(name.startswith(families) for name in names)
    assert ("language_model.lm_head.weight" in names) != bool(changes.get("tie_word_embeddings"))
    loaded = from_checkpoint(tmp_path)
    assert_same_weights(model, loaded)

    both: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    hf, report = both[0].eval(), both[1]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    patches = 5 if changes.get("mm_vision_select_feature") == "cls_patch" else 4
    images = torch.randn(3, 3, 16, 16)
    ids = torch.tensor([[1, 5, -200, 7, -200, 9], [0, 0, 0, 1, -200, 4]])
    mask = (ids != 0).long()
    rows = [[1, 5, *[63] * patches, 7, *[63] * patches, 9], [*[0] * (2 + patches), 1, *[63] * patches, 4]]
    hf_ids = torch.tensor(rows)
    hf_mask = (hf_ids != 0).long()
    loaded.config.tokenizer_padding_side = "left"
    positions = torch.zeros_like(ids)
    got = loaded(input_ids=ids, attention_mask=mask, position_ids=positions, images=images).logits
    hf_positions = (hf_mask.cumsum(1) - 1).clamp(min=0)
    want = hf(input_ids=hf_ids, attention_mask=hf_mask, position_ids=hf_positions, pixel_values=images).logits
    torch.testing.assert_close(got[hf_mask.bool()], want[hf_mask.bool()], rtol=1e-5, atol=1e-5)

    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    want_tokens = hf.generate(input_ids=hf_ids, attention_mask=hf_mask, pixel_values=images, **options)
    got_tokens = loaded.generate(ids, images=images, attention_mask=mask, **options)
    assert got_tokens.tolist() == want_tokens[:, hf_ids.shape[1] :].tolist()
    assert len(set(got_tokens[0].tolist())) > 2


@pytest.mark.parametrize(
    "pairs",
    [
        [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("", "model."),
        ],
        [("vision_tower.vision_model.", "vision_tower.")],
        [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.vision_model.", "model.vision_tower."),
            ("", "model."),
        ],
    ],
    ids=["4.52", "5.23", "5.23 under model."],
)
def test_later_generations_of_llava_hf_names(
    make_model: MakeModel, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    model = make_model()
    save_hf(model, tmp_path)
    rename(tmp_path, *pairs)
    assert_same_weights(model, from_checkpoint(tmp_path))


def test_what_transformers_itself_saves(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    save_hf(model, tmp_path / "ours")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs", max_shard_size="60KB"
    )
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    assert_same_weights(model, from_checkpoint(tmp_path / "theirs"))


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu", "mlp2x_gelu"])
@pytest.mark.parametrize("tower_prefix", ["vision_model.", ""])
def test_original_layout_with_the_tower_inside(
    make_model: MakeModel, tmp_path: Path, kind: str, tower_prefix: str
) -> None:
    model = make_model(mm_projector_type=kind)
    save_original(model, tmp_path)
    tower = "model.vision_tower.vision_tower."
    rename(tmp_path, (tower + "vision_model.", tower + tower_prefix))
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= names
    loaded = from_checkpoint(tmp_path)
    assert_same_weights(model, loaded)
    assert not any(parameter.requires_grad for parameter in loaded.get_vision_tower().parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("named_by", ["config", "argument"])
def test_original_layout_with_the_tower_beside(
    make_model: MakeModel, tmp_path: Path, clip_directory: str, named_by: str
) -> None:
    model = make_model(mm_vision_config=None, mm_vision_tower=clip_directory)
    save_original(model, tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    config = json.loads(path.read_text())
    config["mm_vision_config"] = None
    config["mm_vision_tower"] = clip_directory if named_by == "config" else "openai/clip-vit-large-patch14"
    path.write_text(json.dumps(config))
    safetensors = tmp_path / "llava" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(safetensors).items() if "vision_tower" not in name}
    save_file(kept, safetensors, metadata={"format": "pt"})
    loaded = from_checkpoint(tmp_path / "llava", vision_tower=clip_directory if named_by == "argument" else None)
    beside = load_file(Path(clip_directory) / "model.safetensors")
    state = loaded.get_vision_tower().vision_tower.state_dict()  # type: ignore[union-attr]
    patches = next(name for name in beside if name.endswith("patch_embedding.weight"))
    assert torch.equal(next(t for name, t in state.items() if name.endswith("patch_embedding.weight")), beside[patches])
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_tower_inside_with_its_config_beside(make_model: MakeModel, tmp_path: Path, clip_directory: str) -> None:
    model = make_model(mm_vision_config=None, mm_vision_tower=clip_directory)
    save_original(model, tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mm_vision_config": None}))
    assert_same_weights(model, from_checkpoint(tmp_path / "llava"))


def test_tower_whose_sizes_are_nowhere(make_model: MakeModel, tmp_path: Path, clip_directory: str) -> None:
    save_original(make_model(mm_vision_config=None, mm_vision_tower=clip_directory), tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    changes = {"mm_vision_config": None, "mm_vision_tower": "openai/clip-vit-large-patch14"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match="found none at 'openai/clip-vit-large-patch14'"):
        from_checkpoint(tmp_path / "llava")


def test_dtype(make_model: MakeModel, tmp_path: Path) -> None:
    save_hf(make_model(), tmp_path)
    assert {p.dtype for p in from_checkpoint(tmp_path, dtype=torch.float16).parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "language_model.model.norm.weight",
            "language_model.model.extra",
            r"missing \['model\.norm\.weight'\].*model\.extra",
        ),
        ("vision_tower.vision_model.pre_layrnorm.bias", "odd", r"1 tensors missing.*pre_layrnorm\.bias.*\['odd'\]"),
    ],
)
def test_missing_and_left_over_tensors_are_named(
    make_model: MakeModel, tmp_path: Path, old: str, new: str, message: str
) -> None:
    save_hf(make_model(), tmp_path)
    rename(tmp_path, (old, new))
    with pytest.raises(CheckpointError, match=message):
        from_checkpoint(tmp_path)


def test_misshapen_tensor_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    save_hf(make_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["language_model.model.norm.weight"] = torch.zeros(47)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight': want shape \[48\].*got \[47\]"):
        from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llava_next"),
        ("projector_hidden_act", "silu"),
        ("multimodal_projector_bias", False),
        ("vision_feature_layer", [-2, -3]),
    ],
)
def test_config_that_is_not_supported_is_refused_by_name(
    make_model: MakeModel, tmp_path: Path, field: str, value: Any
) -> None:
    save_hf(make_model(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=field):
        from_checkpoint(tmp_path)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"mm_projector_type": "linear"}, {"image_token_id": None}, {"mm_vision_config": None}]
)
def test_hf_layout_cannot_say_everything(make_model: MakeModel, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="llava-hf layout"):
        save_hf(make_model(**changes), tmp_path)
