"""llava-hf checkpoints, every generation of key names, against the model that transformers saved."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava_deploy.exporter.checkpoint import Checkpoint, CheckpointOptions, open_checkpoint
from llava_deploy.exporter.inspect_report import describe
from llava_deploy.exporter.weights import expected_tensors


def assert_holds(checkpoint: Checkpoint, want: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
    for name, source in checkpoint.tensors.items():
        assert source.name == name
        np.testing.assert_array_equal(source.read(), want[name].numpy(), err_msg=name)


def test_every_generation_of_key_names(make_llava: Any, rename_tensors: Any, generation: Any) -> None:
    saved = make_llava()
    rename_tensors(saved.directory, generation)
    checkpoint = open_checkpoint(saved.directory)
    assert checkpoint.config.layout == "llava-hf"
    assert_holds(checkpoint, saved.canonical())
    assert {rule for key, rule in checkpoint.left_out.items() if "layers.2" in key} == {
        "a tower layer past the feature layer"
    }
    assert len(checkpoint.left_out) == 16 + 2  # the last tower layer, and post_layernorm


def test_sharded(make_llava: Any) -> None:
    saved = make_llava(shard="50KB")
    assert len(list(saved.directory.glob("*.safetensors"))) > 2
    assert_holds(open_checkpoint(saved.directory), saved.canonical())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(make_llava: Any, dtype: torch.dtype) -> None:
    saved = make_llava(dtype=dtype)
    checkpoint = open_checkpoint(saved.directory)
    name = "language_model.layers.1.mlp.down_proj.weight"
    values = checkpoint.tensors[name].read()
    assert values.dtype == {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}[dtype]
    np.testing.assert_array_equal(values.astype(np.float32), saved.canonical()[name].float().numpy())


def test_reading_copies_nothing(make_llava: Any) -> None:
    checkpoint = open_checkpoint(make_llava().directory)
    values = checkpoint.tensors["language_model.embed_tokens.weight"].read()
    assert isinstance(values, np.memmap)
    assert not values.flags.writeable


def test_opening_reads_no_values(make_llava: Any, edit_json: Any) -> None:
    """A file that claims 6 GB and has a hole in place of its values opens at once."""
    saved = make_llava()
    path = saved.directory / "model.safetensors"
    shapes = {key: list(value.shape) for key, value in load_file(path).items()}
    vocabulary = 16_000_000
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        shapes[key][0] = vocabulary
    header, at = {}, 0
    for key, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    edit_json(saved.directory / "config.json", lambda values: values["text_config"].update(vocab_size=vocabulary))
    start = time.perf_counter()
    checkpoint = open_checkpoint(saved.directory)
    assert time.perf_counter() - start < 2.0
    assert sum(source.nbytes for source in checkpoint.tensors.values()) > 6e9


# What transformers does with an output layer in the file of a model that says it is tied (tie_weights).
def test_tied_and_absent(make_llava: Any) -> None:
    saved = make_llava(text={"tie_word_embeddings": True})
    checkpoint = open_checkpoint(saved.directory)
    assert checkpoint.config.decoder.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.tensors
    assert_holds(checkpoint, saved.canonical())


def test_tied_and_equal(make_llava: Any, edit_tensors: Any) -> None:
    saved = make_llava(text={"tie_word_embeddings": True})
    table = "language_model.model.embed_tokens.weight"
    head = "language_model.lm_head.weight"
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.update({head: tensors[table].clone()}))
    checkpoint = open_checkpoint(saved.directory)
    assert checkpoint.config.decoder.tie_word_embeddings
    assert "equal" in checkpoint.left_out[head]
    assert_holds(checkpoint, saved.canonical())


def test_tied_and_different(make_llava: Any, edit_tensors: Any) -> None:
    saved = make_llava(text={"tie_word_embeddings": True})
    table, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.update({head: -tensors[table]}))
    theirs = LlavaForConditionalGeneration.from_pretrained(saved.directory).lm_head.weight
    checkpoint = open_checkpoint(saved.directory)
    assert not checkpoint.config.decoder.tie_word_embeddings
    np.testing.assert_array_equal(checkpoint.tensors["lm_head.weight"].read(), theirs.detach().numpy())
    np.testing.assert_array_equal(theirs.detach().numpy(), -saved.canonical()["lm_head.weight"].numpy())


def test_tied_and_only_the_head(make_llava: Any, edit_tensors: Any) -> None:
    saved = make_llava(text={"tie_word_embeddings": True})
    table, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.update({head: tensors.pop(table)}))
    theirs = LlavaForConditionalGeneration.from_pretrained(saved.directory).get_input_embeddings().weight
    checkpoint = open_checkpoint(saved.directory)
    source = checkpoint.tensors["language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(source.read(), theirs.detach().numpy())
    assert_holds(checkpoint, saved.canonical())


@pytest.mark.parametrize(
    ("fields", "depth"),
    [
        ({"vision_feature_layer": 0}, 0),
        ({"vision_feature_layer": -1}, 3),
        ({"vision_feature_layer": [-4, 1], "vision_feature_select_strategy": "full"}, 1),
        ({"vision_feature_layer": 3}, 3),
    ],
)
def test_tower_layers_up_to_the_deepest_feature_layer(make_llava: Any, fields: dict[str, Any], depth: int) -> None:
    saved = make_llava(**fields)
    checkpoint = open_checkpoint(saved.directory)
    assert_holds(checkpoint, saved.canonical())
    kept = {name.split(".")[3] for name in checkpoint.tensors if name.startswith("vision_tower.encoder")}
    assert kept == {str(layer) for layer in range(depth)}


def test_buffers_of_older_transformers_are_left_out(make_llava: Any, edit_tensors: Any) -> None:
    saved = make_llava()
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "language_model.model.rotary_emb.inv_freq": torch.ones(6),
    }
    edit_tensors(saved.directory / "model.safetensors", lambda tensors: tensors.update(buffers))
    checkpoint = open_checkpoint(saved.directory)
    assert buffers.keys() <= checkpoint.left_out.keys()
    assert_holds(checkpoint, saved.canonical())


def test_projector_file_over_llava_hf(make_llava: Any, tmp_path: Path) -> None:
    saved, other = make_llava(), make_llava("other", seed=1)
    projector = {key: value for key, value in other.canonical().items() if key.startswith("projector.")}
    names = {"0": "linear_1", "1": "linear_2"}
    state = {f"multi_modal_projector.{names[key[10]]}.{key[12:]}": v.clone() for key, v in projector.items()}
    torch.save(state, tmp_path / "projector.bin")
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(projector=tmp_path / "projector.bin"))
    assert_holds(checkpoint, saved.canonical() | projector)


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files(make_llava: Any, shards: int) -> None:
    """The same tensors from pytorch_model.bin, mapped; one of them is stored transposed."""
    saved = make_llava()
    path = saved.directory / "model.safetensors"
    tensors = load_file(path)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    path.unlink()
    keys = sorted(tensors)
    places = {key: f"pytorch_model-{i % shards}.bin" for i, key in enumerate(keys)}
    for shard in set(places.values()):
        torch.save({key: tensors[key] for key in keys if places[key] == shard}, saved.directory / shard)
    if shards == 1:
        (saved.directory / "pytorch_model-0.bin").rename(saved.directory / "pytorch_model.bin")
    else:
        (saved.directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_holds(open_checkpoint(saved.directory), saved.canonical())


def test_bfloat16_from_a_torch_file(make_llava: Any) -> None:
    saved = make_llava(dtype=torch.bfloat16)
    path = saved.directory / "model.safetensors"
    torch.save(load_file(path), saved.directory / "pytorch_model.bin")
    name = "language_model.embed_tokens.weight"
    want = open_checkpoint(saved.directory).tensors[name].read()
    path.unlink()
    got = open_checkpoint(saved.directory).tensors[name].read()
    assert got.dtype == want.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, want)


def test_safetensors_by_choice(make_llava: Any) -> None:
    saved = make_llava()
    (saved.directory / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_holds(open_checkpoint(saved.directory), saved.canonical())


def test_description_is_json(make_llava: Any, edit_json: Any) -> None:
    saved = make_llava(shard="100KB", dtype=torch.float16)
    edit_json(saved.directory / "config.json", lambda values: values.update(novel=3))
    checkpoint = open_checkpoint(saved.directory)
    report = json.loads(json.dumps(describe(checkpoint)))
    assert report["layout"] == "llava-hf"
    assert report["tensors"]["count"] == len(checkpoint.tensors)
    assert report["tensors"]["bytes"] == 2 * report["tensors"]["parameters"]
    assert report["tensors"]["dtypes"] == {"float16": len(checkpoint.tensors)}
    assert sum(file["bytes"] for file in report["files"]) > report["tensors"]["bytes"]
    assert report["config"]["projector"]["kind"] == "mlp2x_gelu"
    assert report["config"]["image_features"] == 9
    assert report["unused_keys"] == ["novel"]
    assert report["left_out"] == dict(checkpoint.left_out)
