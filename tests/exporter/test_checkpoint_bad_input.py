"""Damaged and wrong checkpoints: one line that names the file, what is wrong, and what to do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint

UP_PROJ = "language_model.model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def refused() -> Callable[..., str]:
    """Open a checkpoint, and give the one line that says why it cannot be."""

    def refuse(directory: Path, *parts: str, options: CheckpointOptions | None = None) -> str:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(directory, options or CheckpointOptions())
        message = str(error.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, message
        return message

    return refuse


def test_no_directory(tmp_path: Path, refused: Any) -> None:
    refused(tmp_path / "nowhere", "nowhere/config.json", "found none")


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    ("option", "wanted"),
    [("vision_tower", "want a directory"), ("projector", "want a file"), ("lora", "want a directory")],
)
def test_an_option_that_names_nothing(
    make_llava: Any, make_original: Any, refused: Any, tmp_path: Path, option: str, wanted: str, original: bool
) -> None:
    directory = (make_original if original else make_llava)().directory
    options = CheckpointOptions(**{option: tmp_path / "nowhere"})
    flag = f"--{option.replace('_', '-')}"
    refused(directory, f"{flag} {tmp_path / 'nowhere'}: {wanted}, found nothing there; correct", options=options)


def test_an_option_that_names_the_wrong_kind(make_llava: Any, refused: Any, tmp_path: Path) -> None:
    directory = make_llava().directory
    wrong = {"projector": (tmp_path, "a directory"), "lora": (directory / "config.json", "a file")}
    for option, (path, found) in wrong.items():
        refused(directory, f"--{option} {path}: want", f"found {found}", options=CheckpointOptions(**{option: path}))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 10_000])
def test_config_that_is_no_json_object(make_llava: Any, refused: Any, text: str) -> None:
    saved = make_llava()
    (saved.directory / "config.json").write_text(text)
    refused(saved.directory, "config.json: want")


def test_config_that_is_not_text(make_llava: Any, refused: Any) -> None:
    saved = make_llava()
    (saved.directory / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(saved.directory, "config.json: want JSON")


@pytest.mark.parametrize("field", ["model_type", "vision_config", "text_config"])
def test_required_field_missing(make_llava: Any, edit_json: Any, refused: Any, field: str) -> None:
    saved = make_llava()
    edit_json(saved.directory / "config.json", lambda values: values.pop(field))
    refused(saved.directory, "config.json", field, "found none")


@pytest.mark.parametrize("kind", ["gpt2", "llava_next", "llava_onevision", "llava_qwen", "qwen2_vl"])
def test_unknown_model_type(make_llava: Any, edit_json: Any, refused: Any, kind: str) -> None:
    saved = make_llava()
    edit_json(saved.directory / "config.json", lambda values: values.update(model_type=kind))
    refused(saved.directory, "model_type", repr(kind), "'llava'")


def test_original_layout_without_its_fields(make_llava: Any, edit_json: Any, refused: Any) -> None:
    saved = make_llava()
    edit_json(saved.directory / "config.json", lambda values: values.update(model_type="llava_llama"))
    refused(saved.directory, "mm_vision_tower")


def test_no_weights(make_llava: Any, refused: Any) -> None:
    saved = make_llava()
    (saved.directory / "model.safetensors").unlink()
    refused(saved.directory, "want model.safetensors or pytorch_model.bin", "found config.json")


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -1])
def test_truncated_file(make_llava: Any, refused: Any, keep: int) -> None:
    saved = make_llava()
    path = saved.directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved.directory, "model.safetensors", "cut short", "fetch the file again")


@pytest.mark.parametrize("shard", range(2))
def test_missing_shard(make_llava: Any, refused: Any, shard: int) -> None:
    saved = make_llava(shard="100KB")
    path = sorted(saved.directory.glob("model-*.safetensors"))[shard]
    path.unlink()
    refused(saved.directory, INDEX, path.name, "not in")


def test_truncated_shard(make_llava: Any, refused: Any) -> None:
    saved = make_llava(shard="100KB")
    path = sorted(saved.directory.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    refused(saved.directory, path.name, "cut short")


def test_index_naming_a_file_that_is_not_there(make_llava: Any, edit_json: Any, refused: Any) -> None:
    saved = make_llava(shard="100KB")
    edit_json(saved.directory / INDEX, lambda values: values["weight_map"].update({UP_PROJ: "model-x.safetensors"}))
    refused(saved.directory, INDEX, "model-x.safetensors")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b"])
def test_index_leaving_the_directory(make_llava: Any, edit_json: Any, refused: Any, name: str) -> None:
    saved = make_llava(shard="100KB")
    edit_json(saved.directory / INDEX, lambda values: values["weight_map"].update({UP_PROJ: name}))
    refused(saved.directory, "leaves the directory")


def test_index_with_a_tensor_in_the_wrong_file(make_llava: Any, edit_json: Any, refused: Any) -> None:
    saved = make_llava(shard="100KB")
    shards = sorted(path.name for path in saved.directory.glob("model-*.safetensors"))
    places = json.loads((saved.directory / INDEX).read_text())["weight_map"]
    wrong = next(name for name in shards if name != places[UP_PROJ])
    edit_json(saved.directory / INDEX, lambda values: values["weight_map"].update({UP_PROJ: wrong}))
    refused(saved.directory, INDEX, UP_PROJ, wrong)


@pytest.mark.parametrize("places", [None, [], {}, {"a": 1}])
def test_index_without_a_map(make_llava: Any, edit_json: Any, refused: Any, places: Any) -> None:
    saved = make_llava(shard="100KB")
    edit_json(saved.directory / INDEX, lambda values: values.update(weight_map=places))
    refused(saved.directory, INDEX, "weight_map")


def test_tensor_in_two_shards(make_llava: Any, edit_tensors: Any, refused: Any) -> None:
    saved = make_llava(shard="100KB")
    places = json.loads((saved.directory / INDEX).read_text())["weight_map"]
    other = next(name for name in places.values() if name != places[UP_PROJ])
    edit_tensors(saved.directory / other, lambda tensors: tensors.update({UP_PROJ: torch.zeros(64, 48)}))
    refused(saved.directory, UP_PROJ, other, places[UP_PROJ])


@pytest.mark.parametrize(
    "key",
    [
        UP_PROJ,
        "vision_tower.encoder.layers.1.layer_norm1.bias",
        "vision_tower.pre_layrnorm.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
    ],
)
def test_missing_tensor(make_llava: Any, edit_tensors: Any, refused: Any, key: str) -> None:
    saved = make_llava()
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.pop(key))
    message = refused(saved.directory, str(saved.directory), "1 of")
    assert key.removeprefix("language_model.").removeprefix("model.").split("linear")[0].split(".", 1)[1] in message


@pytest.mark.parametrize(
    "key",
    [
        "vision_tower.head.probe",
        "vision_tower.encoder.layers.3.layer_norm1.bias",
        "language_model.model.layers.2.mlp.up_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "multi_modal_projector.linear_3.weight",
        "image_newline",
        "model.layers.0.mlp.up_proj.weight",
    ],
)
def test_tensor_left_over(make_llava: Any, edit_tensors: Any, refused: Any, key: str) -> None:
    saved = make_llava()
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.update({key: torch.zeros(3)}))
    refused(saved.directory, "1 tensors are left over", f"model.safetensors ({key})")


def test_tensor_twice_under_two_names(make_llava: Any, edit_tensors: Any, refused: Any) -> None:
    saved = make_llava()
    stale = "model.language_model.layers.0.mlp.up_proj.weight"
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.update({stale: tensors[UP_PROJ] * 2}))
    refused(saved.directory, UP_PROJ, stale)


@pytest.mark.parametrize("shape", [(48, 64), (64, 47), (64, 48, 1), ()])
def test_tensor_of_another_shape(make_llava: Any, edit_tensors: Any, refused: Any, shape: tuple[int, ...]) -> None:
    saved = make_llava()
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.update({UP_PROJ: torch.zeros(shape)}))
    refused(saved.directory, UP_PROJ, "want shape [64, 48]", f"found {list(shape)}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_tensor_of_another_dtype(make_llava: Any, edit_tensors: Any, refused: Any, dtype: torch.dtype) -> None:
    saved = make_llava()
    value = torch.zeros(64, 48, dtype=dtype)
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.update({UP_PROJ: value}))
    refused(saved.directory, UP_PROJ, "float32, float16, bfloat16")


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.fixture
def as_torch_file(make_llava: Any) -> tuple[Any, Path]:
    """A checkpoint whose weights are in pytorch_model.bin."""
    saved = make_llava()
    path = saved.directory / "model.safetensors"
    target = saved.directory / "pytorch_model.bin"
    torch.save(load_file(path), target)
    path.unlink()
    return saved, target


def test_pickle_with_code_is_refused(as_torch_file: Any, tmp_path: Path, refused: Any) -> None:
    saved, path = as_torch_file
    torch.save({"weight": torch.zeros(2), "payload": Payload(tmp_path / "ran")}, path)
    refused(saved.directory, "pytorch_model.bin", "would run code", "take the checkpoint as safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", ["plain pickle", "torch before 1.6"])
def test_old_pickles_are_refused(as_torch_file: Any, tmp_path: Path, refused: Any, legacy: str) -> None:
    saved, path = as_torch_file
    if legacy == "plain pickle":
        path.write_bytes(pickle.dumps({"payload": Payload(tmp_path / "ran")}))
    else:
        torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    refused(saved.directory, "pytorch_model.bin", "safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_truncated_torch_file(as_torch_file: Any, refused: Any, keep: int) -> None:
    saved, path = as_torch_file
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved.directory, "pytorch_model.bin")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, torch.zeros(2)])
def test_torch_file_of_something_else(as_torch_file: Any, refused: Any, content: Any) -> None:
    saved, path = as_torch_file
    torch.save(content, path)
    refused(saved.directory, "pytorch_model.bin", "want a mapping of names to tensors")


def test_sparse_tensor(as_torch_file: Any, refused: Any) -> None:
    saved, path = as_torch_file
    tensors = torch.load(path)
    tensors[UP_PROJ] = tensors[UP_PROJ].to_sparse()
    torch.save(tensors, path)
    refused(saved.directory, "pytorch_model.bin")


def test_no_preprocessor(make_llava: Any, refused: Any) -> None:
    saved = make_llava()
    (saved.directory / "preprocessor_config.json").unlink()
    refused(saved.directory, "preprocessor_config.json")


def test_no_tokenizer(make_llava: Any, refused: Any) -> None:
    saved = make_llava()
    (saved.directory / "tokenizer.json").unlink()
    refused(saved.directory, "tokenizer.json or tokenizer.model")


def test_damaged_tokenizer(make_llava: Any, refused: Any) -> None:
    saved = make_llava()
    (saved.directory / "tokenizer.json").write_text("{}")
    refused(saved.directory, "tokenizer.json: not a tokenizer")


def test_placeholder_of_another_id(make_llava: Any, edit_json: Any, refused: Any) -> None:
    saved = make_llava()
    edit_json(saved.directory / "config.json", lambda values: values.update(image_token_index=7))
    refused(saved.directory, "'<image>'", "7")


def test_vision_tower_option_with_llava_hf(make_llava: Any, refused: Any, tmp_path: Path) -> None:
    refused(make_llava().directory, "--vision-tower", options=CheckpointOptions(vision_tower=tmp_path))


def test_unknown_conversation(make_llava: Any, refused: Any) -> None:
    refused(make_llava().directory, "conversation", "vicuna_v1", options=CheckpointOptions(conversation="chatml"))


@pytest.mark.parametrize("option", ["projector", "lora", "vision_tower"])
def test_option_naming_nothing(make_original: Any, refused: Any, tmp_path: Path, option: str) -> None:
    options = CheckpointOptions(**{option: tmp_path / "nowhere"})
    refused(make_original().directory, "nowhere", options=options)


def test_projector_of_another_size(make_original: Any, refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "projector.safetensors"
    save_file({"0.weight": torch.zeros(48, 33), "0.bias": torch.zeros(48)}, path)
    options = CheckpointOptions(projector=path)
    refused(make_original().directory, "projector.safetensors", "[48, 33]", options=options)
