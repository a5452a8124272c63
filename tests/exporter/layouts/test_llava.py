"""Checkpoints of the original layout against the reference classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, LlamaConfig

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.checkpoint import Checkpoint, CheckpointOptions, open_checkpoint
from llava_deploy.exporter.layouts import llava
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.recipes.image_recipe import image_recipe
from llava_deploy.exporter.sources.tower_source import find_tower
from llava_deploy.exporter.weights import expected_tensors

CONFIG = "config.json"


# config.json of the published LLaVA-1.5 7B.
PUBLISHED = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": 32000,
}


def test_published() -> None:
    fields = Fields(PUBLISHED, "config.json")
    tower = find_tower(fields, None, (), is_inside=True)
    config = llava.parse(fields, tower.vision)
    assert fields.unused(llava.NO_EFFECT) == ()
    assert (config.vision.hidden_size, config.vision.num_attention_heads, config.vision.patches) == (1024, 16, 576)
    assert config.projector.sizes == (1024, 4096, 4096)
    assert config.projector.kind == "mlp2x_gelu"
    assert config.image_features == 576
    assert tower.image is not None
    assert image_recipe(tower.image, 336, True).pad_color == (122, 116, 104)


def assert_holds(checkpoint: Checkpoint, want: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
    for name, source in checkpoint.tensors.items():
        np.testing.assert_array_equal(source.read(), want[name].numpy(), err_msg=name)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_projectors(make_original: Any, kind: str) -> None:
    saved = make_original(mm_projector_type=kind)
    checkpoint = open_checkpoint(saved.directory)
    assert_holds(checkpoint, saved.canonical())
    linears = 1 if kind == "linear" else int(kind[3])
    assert checkpoint.config.projector.sizes == (32, *[48] * linears)
    assert sum(name.startswith("projector.") for name in checkpoint.tensors) == 2 * linears


def test_identity(make_original: Any) -> None:
    saved = make_original(mm_projector_type="identity", vision={"hidden_size": 48})
    checkpoint = open_checkpoint(saved.directory)
    assert checkpoint.config.projector.sizes == (48,)
    assert_holds(checkpoint, saved.canonical())


@pytest.mark.parametrize("old", [True, False])
def test_tower_inside(make_original: Any, edit_tensors: Any, old: bool) -> None:
    """Its weights are the checkpoint's; the directory that mm_vision_tower names only says its sizes."""
    saved = make_original(tower="inside")

    def rename(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if not old and "vision_tower.vision_model." in key]:
            tensors[key.replace("vision_tower.vision_model.", "vision_tower.")] = tensors.pop(key)

    edit_tensors(saved.directory / "model.safetensors", rename)
    edit_tensors(saved.tower / "model.safetensors", lambda tensors: tensors.clear())
    assert_holds(open_checkpoint(saved.directory), saved.canonical())


def test_tower_inside_with_its_config(make_original: Any, edit_json: Any) -> None:
    saved = make_original(tower="inside")
    vision = json.loads((saved.tower / CONFIG).read_text())
    edit_json(saved.directory / CONFIG, lambda values: values.update(mm_vision_config=vision, mm_vision_tower=None))
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        open_checkpoint(saved.directory)
    shutil.copy(saved.tower / "preprocessor_config.json", saved.directory)
    shutil.rmtree(saved.tower)
    assert_holds(open_checkpoint(saved.directory), saved.canonical())


def test_known_tower_inside(make_original: Any, edit_json: Any) -> None:
    """OpenAI's towers are known by name; here the tensors are too small for that one, which shows it was taken."""
    saved = make_original(tower="inside")
    change = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    edit_json(saved.directory / CONFIG, lambda values: values.update(change))
    with pytest.raises(CheckpointError, match=r"tensors are missing: 'vision_tower\.encoder\.layers\.3\."):
        open_checkpoint(saved.directory)


@pytest.mark.parametrize("how", ["absolute", "relative", "option"])
def test_tower_beside(make_original: Any, edit_json: Any, how: str) -> None:
    saved = make_original()
    named = {"absolute": str(saved.tower), "relative": f"../{saved.tower.name}", "option": "openai/no-such-tower"}[how]
    edit_json(saved.directory / CONFIG, lambda values: values.update(mm_vision_tower=named))
    option = saved.tower if how == "option" else None
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(vision_tower=option))
    assert_holds(checkpoint, saved.canonical())
    assert "vision_tower.post_layernorm.weight" not in checkpoint.tensors


def test_tower_that_is_not_here(make_original: Any, edit_json: Any) -> None:
    saved = make_original()
    name = "openai/clip-vit-large-patch14-336"
    edit_json(saved.directory / CONFIG, lambda values: values.update(mm_vision_tower=name))
    with pytest.raises(CheckpointError, match=f"mm_vision_tower: .*{name}.*--vision-tower DIR"):
        open_checkpoint(saved.directory)


def test_whole_clip_model_beside(make_original: Any) -> None:
    """The vision part of a CLIPModel is the tower; its text side is left out by rule."""
    saved = make_original()
    vision = json.loads((saved.tower / CONFIG).read_text())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision)).save_pretrained(saved.tower.parent / "clip")
    whole = load_file(saved.tower.parent / "clip" / "model.safetensors")
    tower = {f"vision_model.{key}": value for key, value in load_file(saved.tower / "model.safetensors").items()}
    save_file(whole | tower, saved.tower.parent / "clip" / "model.safetensors")
    shutil.copy(saved.tower / "preprocessor_config.json", saved.tower.parent / "clip")
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(vision_tower=saved.tower.parent / "clip"))
    assert_holds(checkpoint, saved.canonical())
    for key in ("logit_scale", "text_projection.weight", "visual_projection.weight"):
        assert "CLIP" in checkpoint.left_out[key]


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "", "base_model.model.model.mm_projector."])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_projector_over_a_plain_llama(make_original: Any, tmp_path: Path, prefix: str, suffix: str) -> None:
    """A base model and a directory with config.json and mm_projector: the mm settings come from there."""
    saved = make_original()
    base, over = _plain_llama(saved, tmp_path)
    state = saved.model.get_model().mm_projector.state_dict()
    _save({prefix + key: value for key, value in state.items()}, over / f"mm_projector{suffix}")
    checkpoint = open_checkpoint(base, CheckpointOptions(projector=over / f"mm_projector{suffix}"))
    assert checkpoint.config.layout == "llava"
    assert_holds(checkpoint, saved.canonical())


def test_projector_replaces_the_checkpoints_own(make_original: Any, tmp_path: Path) -> None:
    saved, other = make_original(), make_original("other", seed=1)
    state = {f"model.mm_projector.{k}": v for k, v in other.model.get_model().mm_projector.state_dict().items()}
    _save(state, tmp_path / "mm_projector.bin")
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(projector=tmp_path / "mm_projector.bin"))
    projector = {key: value for key, value in other.canonical().items() if key.startswith("projector.")}
    assert_holds(checkpoint, saved.canonical() | projector)
    assert "laid over" in checkpoint.left_out["model.mm_projector.0.weight"]


def test_projector_file_with_something_else(make_original: Any, tmp_path: Path) -> None:
    saved = make_original()
    _save({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 48)}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"left over.*model\.layers\.0\.mlp\.up_proj\.weight"):
        open_checkpoint(saved.directory, CheckpointOptions(projector=tmp_path / "mm_projector.bin"))


def test_plain_llama_alone(make_original: Any, tmp_path: Path) -> None:
    base, _ = _plain_llama(make_original(), tmp_path)
    with pytest.raises(CheckpointError, match="--projector FILE or --lora DIR"):
        open_checkpoint(base)


def test_settings_for_pictures_and_the_splice(make_original: Any) -> None:
    fields = {"image_aspect_ratio": "pad", "tokenizer_model_max_length": 100, "tokenizer_padding_side": "left"}
    checkpoint = open_checkpoint(make_original(**fields, mm_vision_select_feature="cls_patch").directory)
    assert checkpoint.image.pad_to_square
    assert checkpoint.image.pad_color == (122, 116, 104)
    assert checkpoint.config.image_aspect_ratio == "pad"
    assert checkpoint.config.tokenizer_model_max_length == 100
    assert checkpoint.config.tokenizer_padding_side == "left"
    assert checkpoint.config.feature_select == "cls_patch"
    assert checkpoint.config.image_token_id is None
    assert checkpoint.chat.tokenization == "split"
    assert (checkpoint.chat.template, checkpoint.chat.conversation) == (None, "vicuna_v1")


def test_llamas_own_fields_have_llamas_defaults(make_original: Any, edit_json: Any) -> None:
    saved = make_original()
    gone = ("rms_norm_eps", "hidden_act", "rope_parameters", "head_dim", "attention_bias", "mlp_bias")
    edit_json(saved.directory / CONFIG, lambda values: [values.pop(key) for key in gone])
    decoder, default = open_checkpoint(saved.directory).config.decoder, LlamaConfig()
    assert decoder.rms_norm_eps == default.rms_norm_eps
    assert decoder.rope.theta == default.rope_parameters["rope_theta"]
    assert decoder.head_dim == 48 // 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_hidden_size", None),
        ("mm_hidden_size", 64),
        ("mm_projector_type", "resampler"),
        ("mm_projector_type", "identity"),
        ("mm_vision_select_layer", None),
        ("mm_vision_select_layer", 9),
        ("mm_vision_select_layer", [1, 2]),
        ("mm_vision_select_feature", "cls"),
        ("image_aspect_ratio", "anyres"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_use_im_start_end", True),
        ("mm_resampler_type", "perceiver"),
        ("s2", True),
        ("use_mm_proj", False),
        ("tokenizer_padding_side", "both"),
        ("quantization_config", {"load_in_4bit": True}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("mm_vision_tower", None),
        ("model_type", "llava_mpt"),
    ],
)
def test_refused_by_name(make_original: Any, edit_json: Any, key: str, value: Any) -> None:
    saved = make_original()
    edit_json(saved.directory / CONFIG, lambda values: values.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json, {key}[.:]"):
        open_checkpoint(saved.directory)


def test_training_leftovers_are_known(make_original: Any) -> None:
    fields = {"freeze_mm_mlp_adapter": True, "mm_projector_lr": 2e-5, "unfreeze_mm_vision_tower": True, "novel": 1}
    assert open_checkpoint(make_original(**fields).directory).unused_keys == ("novel",)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "language_model.layers.3.self_attn.q_proj.weight"),
        ("model.mm_projector.weight", "projector.0.weight"),
        ("model.mm_projector.4.bias", "projector.2.bias"),
        ("model.mm_projector.1.bias", None),
        ("model.image_newline", None),
        ("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("lm_head.weight", "lm_head.weight"),
        ("transformer.wte.weight", None),
    ],
)
def test_names(key: str, name: str | None) -> None:
    assert llava.canonical_name(key) == name


def _plain_llama(saved: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Split a checkpoint into a Llama's directory and one that has only a LLaVA's config."""
    base, over = tmp_path / "base", tmp_path / "over"
    shutil.copytree(saved.directory, base)
    over.mkdir()
    shutil.move(base / CONFIG, over / CONFIG)
    values = json.loads((over / CONFIG).read_text())
    plain = {key: value for key, value in values.items() if not key.startswith(("mm_", "use_mm", "tune_mm"))}
    (base / CONFIG).write_text(json.dumps(plain | {"model_type": "llama"}))
    tensors = load_file(base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "mm_projector" not in k}, base / "model.safetensors")
    return base, over


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    tensors = {key: value.clone() for key, value in tensors.items()}
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
