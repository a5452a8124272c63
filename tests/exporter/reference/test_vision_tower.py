from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.reference.vision_tower import CLIPVisionTower, build_vision_tower


def select(layer: int = -2, **fields: Any) -> Any:
    return SimpleNamespace(mm_vision_select_layer=layer, **fields)


@pytest.mark.parametrize("layer", [-2, -1, 0, 2])
@pytest.mark.parametrize(("feature", "first"), [("patch", 1), ("cls_patch", 0)])
def test_selected_layer_and_feature(clip_directory: str, layer: int, feature: str, first: int) -> None:
    tower = CLIPVisionTower(clip_directory, select(layer, mm_vision_select_feature=feature))
    pixels = torch.randn(2, 3, 16, 16)
    clip = CLIPVisionModel.from_pretrained(clip_directory)
    want = clip(pixels, output_hidden_states=True).hidden_states[layer][:, first:]
    torch.testing.assert_close(tower(pixels), want, rtol=0, atol=0)
    assert tower(pixels).shape == (2, 5 - first, 32)


def test_patch_is_the_default_feature(clip_config: CLIPVisionConfig) -> None:
    assert CLIPVisionTower(clip_config, select()).select_feature == "patch"


def test_unknown_feature_is_refused(clip_config: CLIPVisionConfig) -> None:
    with pytest.raises(CheckpointError, match="got 'cls'"):
        CLIPVisionTower(clip_config, select(mm_vision_select_feature="cls"))


def test_delayed_tower_knows_its_sizes_and_loads_once(clip_directory: str) -> None:
    tower = CLIPVisionTower(clip_directory, select(), delay_load=True)
    assert not tower.is_loaded
    assert list(tower.parameters()) == []
    assert (tower.hidden_size, tower.num_patches) == (32, 4)
    tower.load_model()
    assert tower.is_loaded
    model = tower.vision_tower
    tower.load_model()
    assert tower.vision_tower is model
    assert tower.dummy_feature.shape == (1, 32)


def test_loaded_tower_is_frozen_but_can_be_trained(clip_config: CLIPVisionConfig) -> None:
    tower = CLIPVisionTower(clip_config, select())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower(torch.randn(1, 3, 16, 16)).requires_grad
    tower.requires_grad_(True)
    tower(torch.randn(1, 3, 16, 16)).sum().backward()
    assert tower.vision_tower.get_input_embeddings().weight.grad is not None


def test_input_dtype_is_kept(clip_config: CLIPVisionConfig) -> None:
    tower = CLIPVisionTower(clip_config, select())
    assert tower(torch.randn(1, 3, 16, 16).half()).dtype == torch.float16


def test_list_of_pictures_gives_a_list(clip_config: CLIPVisionConfig) -> None:
    tower = CLIPVisionTower(clip_config, select())
    pixels = torch.randn(2, 3, 16, 16)
    first, second = tower([pixels[0], pixels[1]])
    torch.testing.assert_close(torch.cat([first, second]), tower(pixels))


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", forbidden)
    with pytest.raises(CheckpointError, match="found none at 'openai/clip-vit-large-patch14'"):
        CLIPVisionTower("openai/clip-vit-large-patch14", select(), delay_load=True)


def test_missing_tower_tensor_is_named(clip_directory: str) -> None:
    path = Path(clip_directory) / "model.safetensors"
    tensors = load_file(path)
    dropped = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    del tensors[dropped]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.fc1\.weight"):
        CLIPVisionTower(clip_directory, select())


def test_builder_takes_config_then_model_field_then_argument(
    clip_config: CLIPVisionConfig, clip_directory: str
) -> None:
    inside = build_vision_tower(select(mm_vision_config=clip_config.to_dict(), mm_vision_tower="/none"))
    assert inside.vision_tower_name is None
    assert build_vision_tower(select(mm_vision_tower=clip_directory)).vision_tower_name == clip_directory
    assert build_vision_tower(select(vision_tower=clip_directory)).vision_tower_name == clip_directory
    with pytest.raises(CheckpointError, match="want a vision tower"):
        build_vision_tower(select())
