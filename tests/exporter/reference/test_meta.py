"""``initialize_vision_modules`` and the parts of the splice that need a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, DynamicCache

from llava_deploy.engines.errors import CheckpointError, PromptError
from llava_deploy.exporter.reference import (
    CLIPVisionTower,
    LlavaLlamaForCausalLM,
    LlavaMetaForCausalLM,
    LlavaMetaModel,
)

MakeModel = Callable[..., LlavaLlamaForCausalLM]
BARE = {"mm_vision_config": None, "mm_hidden_size": None}


def arguments(tower: Any, **changes: Any) -> Any:
    fields = {
        "vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "pretrain_mm_mlp_adapter": None,
    }
    return SimpleNamespace(**fields | changes)


def test_plain_decoder_has_no_tower(make_model: MakeModel) -> None:
    model = make_model(**BARE)
    assert isinstance(model.get_model(), LlavaMetaModel)
    assert model.get_vision_tower() is None
    assert not any("mm_projector" in name for name, _ in model.named_parameters())


def test_config_with_a_tower_builds_it_unloaded(make_config: Any, clip_directory: str) -> None:
    model = LlavaLlamaForCausalLM(make_config(mm_vision_config=None, mm_vision_tower=clip_directory))
    tower = model.get_vision_tower()
    assert isinstance(tower, CLIPVisionTower)
    assert not tower.is_loaded
    assert isinstance(model.get_model().mm_projector, nn.Sequential)


def test_modules_are_built_and_noted_on_the_config(make_model: MakeModel, clip_directory: str) -> None:
    model = make_model(**BARE)
    model.get_model().initialize_vision_modules(
        arguments(clip_directory, mm_vision_select_layer=-1, mm_vision_select_feature="cls_patch")
    )
    config, tower = model.config, model.get_vision_tower()
    assert tower is not None
    assert tower.is_loaded
    assert model.get_model().vision_tower is tower
    assert (config.use_mm_proj, config.mm_projector_type, config.mm_hidden_size) == (True, "mlp2x_gelu", 32)
    assert (config.mm_vision_select_layer, config.mm_vision_select_feature) == (-1, "cls_patch")
    assert config.mm_vision_tower == clip_directory
    assert model.encode_images(torch.randn(2, 3, 16, 16)).shape == (2, 5, 48)


def test_projector_type_defaults_to_linear(make_model: MakeModel, clip_directory: str) -> None:
    model = make_model(**BARE)
    args = arguments(clip_directory)
    del args.mm_projector_type
    model.get_model().initialize_vision_modules(args)
    assert model.config.mm_projector_type == "linear"
    assert isinstance(model.get_model().mm_projector, nn.Linear)


def test_tower_from_a_config_is_kept_on_the_model_config(make_model: MakeModel, clip_config: CLIPVisionConfig) -> None:
    model = make_model(**BARE)
    model.get_model().initialize_vision_modules(arguments(clip_config))
    assert model.config.mm_vision_config["hidden_size"] == 32
    assert model.get_vision_tower().is_loaded  # type: ignore[union-attr]


def test_under_fsdp_the_tower_is_held_in_a_list(make_model: MakeModel, clip_directory: str) -> None:
    model = make_model(**BARE)
    model.get_model().initialize_vision_modules(arguments(clip_directory), fsdp=["full_shard"])
    assert isinstance(model.get_model().vision_tower, list)
    assert isinstance(model.get_vision_tower(), CLIPVisionTower)
    assert not any("vision_tower" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("fsdp", "is_list"), [(None, False), ([], False), (["full_shard"], True)])
def test_delayed_tower_is_loaded_in_place(
    make_config: Any, clip_directory: str, fsdp: list[str] | None, is_list: bool
) -> None:
    model = LlavaLlamaForCausalLM(make_config(mm_vision_config=None, mm_vision_tower=clip_directory))
    tower = model.get_vision_tower()
    model.get_model().initialize_vision_modules(arguments(clip_directory), fsdp=fsdp)
    assert model.get_vision_tower() is tower
    assert tower is not None
    assert tower.is_loaded
    assert isinstance(model.get_model().vision_tower, list) == is_list
    # Once more, as when training is taken up again.
    model.get_model().initialize_vision_modules(arguments(clip_directory), fsdp=fsdp)
    assert model.get_vision_tower() is tower


def test_loaded_tower_selects_what_the_config_then_says(make_model: MakeModel, clip_directory: str) -> None:
    model = make_model()
    pixels = torch.randn(1, 3, 16, 16)
    model.get_model().initialize_vision_modules(
        arguments(clip_directory, mm_vision_select_layer=-1, mm_vision_select_feature="cls_patch")
    )
    tower: Any = model.get_vision_tower()
    want = tower.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.mm_vision_select_layer]
    assert torch.equal(tower(pixels), want)


def test_frozen_projector_is_made_trainable_and_kept(make_model: MakeModel, clip_directory: str) -> None:
    model = make_model()
    projector = model.get_model().mm_projector.requires_grad_(False)
    model.get_model().initialize_vision_modules(arguments(clip_directory))
    assert model.get_model().mm_projector is projector
    assert all(parameter.requires_grad for parameter in projector.parameters())


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
def test_pretrained_adapter_is_loaded(make_model: MakeModel, clip_directory: str, tmp_path: Path, prefix: str) -> None:
    model = make_model(**BARE)
    weights = {
        "0.weight": torch.randn(48, 32),
        "0.bias": torch.randn(48),
        "2.weight": torch.randn(48, 48),
        "2.bias": torch.randn(48),
    }
    others = {"model.embed_tokens.weight": torch.randn(2, 48)}
    torch.save({prefix + name: tensor for name, tensor in weights.items()} | others, tmp_path / "mm_projector.bin")
    args = arguments(clip_directory, pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"))
    model.get_model().initialize_vision_modules(args)
    for name, tensor in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mm_projector.weight": torch.zeros(48, 32)}, r"'bias'.*want shape \[48\], got None"),
        (
            {"mm_projector.weight": torch.zeros(48, 31), "mm_projector.bias": torch.zeros(48)},
            r"'weight'.*want shape \[48, 32\], got \[48, 31\]",
        ),
        (
            {f"mm_projector.{name}": torch.zeros(48) for name in ("bias", "extra")}
            | {"mm_projector.weight": torch.zeros(48, 32)},
            r"'extra'.*want shape None, got \[48\]",
        ),
    ],
)
def test_adapter_that_does_not_fit_is_refused(
    make_model: MakeModel, clip_directory: str, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    torch.save(tensors, tmp_path / "a.bin")
    args = arguments(clip_directory, mm_projector_type="linear", pretrain_mm_mlp_adapter=str(tmp_path / "a.bin"))
    with pytest.raises(CheckpointError, match=message):
        make_model(**BARE).get_model().initialize_vision_modules(args)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/nonexistent/evil"),))


def test_adapter_with_code_in_it_is_not_run(make_model: MakeModel, clip_directory: str, tmp_path: Path) -> None:
    torch.save({"mm_projector.weight": Evil()}, tmp_path / "a.bin")
    args = arguments(clip_directory, pretrain_mm_mlp_adapter=str(tmp_path / "a.bin"))
    with pytest.raises(CheckpointError, match="weights_only=True"):
        make_model(**BARE).get_model().initialize_vision_modules(args)


@pytest.mark.parametrize(("content", "message"), [(None, "found none at"), (b"not a file of torch", "tensors only")])
def test_adapter_that_cannot_be_read(
    make_model: MakeModel, clip_directory: str, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    args = arguments(clip_directory, pretrain_mm_mlp_adapter=str(tmp_path / "a.bin"))
    with pytest.raises(CheckpointError, match=message):
        make_model(**BARE).get_model().initialize_vision_modules(args)


def test_causal_lm_mixin_is_abstract() -> None:
    with pytest.raises(TypeError, match="get_model"):
        LlavaMetaForCausalLM()  # type: ignore[abstract]


def test_prepare_puts_encoded_images_between_embeddings(make_model: MakeModel) -> None:
    model = make_model()
    images = torch.randn(1, 3, 16, 16)
    past = DynamicCache()
    ids = torch.tensor([[1, -200, 5]])
    out = model.prepare_inputs_labels_for_multimodal(ids, None, None, past, None, images)
    embed = model.get_model().embed_tokens
    want = torch.cat([embed(ids[0, :1]), model.encode_images(images)[0], embed(ids[0, 2:])])
    assert out[:3] == (None, None, None)
    assert out[3] is past
    assert torch.equal(out[4][0], want)  # type: ignore[index]
    assert out[5] is None


@pytest.mark.parametrize("form", ["5-D", "list"])
def test_views_are_encoded_in_one_call(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    model = make_model()
    calls: list[int] = []
    encode = model.encode_images

    def counted(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(model, "encode_images", counted)
    pixels = torch.randn(4, 3, 16, 16)
    images: Any = pixels.view(2, 2, 3, 16, 16) if form == "5-D" else [pixels[:1], pixels[1:]]
    views = (2, 2) if form == "5-D" else (1, 3)
    out = model.prepare_inputs_labels_for_multimodal(torch.tensor([[-200, 5, -200]]), None, None, None, None, images)
    assert calls == [4]
    features = encode(pixels).flatten(0, 1)
    middle = model.get_model().embed_tokens(torch.tensor([5]))
    want = torch.cat([features[: 4 * views[0]], middle, features[4 * views[0] :]])
    torch.testing.assert_close(out[4][0], want)  # type: ignore[index]


@pytest.mark.parametrize("legacy", [True, False], ids=["tuple", "cache"])
def test_one_token_with_a_past(make_model: MakeModel, legacy: bool) -> None:
    cache: Any = DynamicCache()
    cache.update(torch.zeros(2, 2, 4, 12), torch.zeros(2, 2, 4, 12), 0)
    past = ((torch.zeros(2, 2, 4, 12),) * 2,) if legacy else cache
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    ids, images = torch.tensor([[5], [6]]), torch.zeros(1, 3, 16, 16)
    out = make_model().prepare_inputs_labels_for_multimodal(ids, None, mask, past, None, images)
    assert out[0] is ids
    assert out[1].tolist() == [[3], [4]]  # type: ignore[union-attr]
    assert out[2].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]  # type: ignore[union-attr]
    assert out[3] is past
    assert out[4] is None


def test_options_come_from_the_config(make_model: MakeModel) -> None:
    model = make_model(tokenizer_model_max_length=3, tokenizer_padding_side="left")
    ids, mask = torch.tensor([[1, -200, 5], [1, 2, 3]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    out = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, torch.zeros(2, 3, 16, 16))
    assert out[2].tolist() == [[1, 1, 1], [0, 1, 1]]  # type: ignore[union-attr]
    model.config.tokenizer_padding_side = "middle"
    with pytest.raises(PromptError, match="'middle'"):
        model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize(("tune", "markers"), [(True, False), (False, True), (True, True)])
def test_only_tuning_with_markers_is_not_implemented(make_model: MakeModel, tune: bool, markers: bool) -> None:
    model = make_model(tune_mm_mlp_adapter=tune, mm_use_im_start_end=markers)
    ids, images = torch.tensor([[1, -200]]), torch.zeros(1, 3, 16, 16)
    # Where there is nothing to splice, the original does not get as far as the check.
    assert model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, None)[0] is ids
    if tune and markers:
        with pytest.raises(NotImplementedError, match="mm_use_im_start_end"):
            model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)
    else:
        assert model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)[0] is None


def test_too_few_images(make_model: MakeModel) -> None:
    ids, images = torch.tensor([[1, 2, 3], [-200, 4, -200]]), torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"row 1: 2 image tokens found after 1 images .* only 2 images"):
        make_model().prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)
