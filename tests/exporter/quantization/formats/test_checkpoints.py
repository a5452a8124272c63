"""Packed checkpoints, whole: every weight is what its format says it is, bit for bit, and everything else as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint
from llava_deploy.exporter.inspect_report import describe
from llava_deploy.exporter.quantization.weight import QuantizedSource

DOWN_PROJ = "language_model.layers.1.mlp.down_proj.weight"


def assert_holds(checkpoint: Any, wanted: dict[str, np.ndarray]) -> None:
    for name, source in checkpoint.tensors.items():
        assert source.name == name
        assert source.shape == wanted[name].shape
        np.testing.assert_array_equal(source.read(), wanted[name], err_msg=name)


def test_every_weight_is_as_its_format_says(make_packed: Any, formats: Any, format_name: str) -> None:
    packed = make_packed(format_name)
    checkpoint = open_checkpoint(packed.directory)
    assert_holds(checkpoint, packed.dense | packed.wanted)
    assert checkpoint.unused_keys == ()
    quantised = {k: v for k, v in checkpoint.tensors.items() if isinstance(v, QuantizedSource)}
    assert quantised.keys() == packed.wanted.keys()
    for source in quantised.values():
        weight = source.read_quantized()
        assert weight.format == source.format
        assert source.method == formats[format_name].method
        assert source.format.permuted == formats[format_name].permuted == (weight.permutation is not None)
        assert source.format.symmetric == formats[format_name].draw.get("symmetric", False)
        assert source.format.group_size in (32, 64, 128)
        assert weight.scales.dtype in (np.float16, np.float32)
        assert source.nbytes > weight.data.nbytes


@pytest.mark.parametrize("format_name", ["awq", "gptq", "compressed-tensors"], indirect=False)
def test_mixed(make_packed: Any, format_name: str) -> None:
    packed = make_packed(format_name, dense=r"layers\.0\.|o_proj")
    checkpoint = open_checkpoint(packed.directory)
    assert_holds(checkpoint, packed.dense | packed.wanted)
    assert len(packed.wanted) == 6
    assert all(isinstance(checkpoint.tensors[name], QuantizedSource) for name in packed.wanted)


def test_tower_and_projector_may_be_packed_too(make_packed: Any) -> None:
    layers = re.compile(r".*(?:fc1|fc2|linear_2|down_proj)\.weight")
    packed = make_packed("awq", layers=layers, dense="fc2|layers.2.mlp")  # whose 48 inputs have no groups; left out
    wanted = {re.sub(r"^multi_modal_projector\.linear_2", "projector.1", k): v for k, v in packed.wanted.items()}
    checkpoint = open_checkpoint(packed.directory)
    quantised = {k for k, v in checkpoint.tensors.items() if isinstance(v, QuantizedSource)}
    assert quantised == {
        "projector.1.weight",
        *(f"vision_tower.encoder.layers.{i}.mlp.fc1.weight" for i in range(2)),
        *(f"language_model.layers.{i}.mlp.down_proj.weight" for i in range(2)),
    }
    for name in quantised:
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), wanted[name])


def test_sharded_and_config_inside_text_config(make_packed: Any, edit_json: Any) -> None:
    packed = make_packed("gptq, activation order")
    path = packed.directory / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    places = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(places.values()):
        save_file({key: tensors[key] for key, place in places.items() if place == name}, packed.directory / name)
    (packed.directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    def move(values: dict[str, Any]) -> None:
        values["text_config"]["quantization_config"] = values.pop("quantization_config")

    edit_json(packed.directory / "config.json", move)
    checkpoint = open_checkpoint(packed.directory)
    assert_holds(checkpoint, packed.dense | packed.wanted)
    assert {len(checkpoint.tensors[name].files) for name in packed.wanted} == {2}


def test_original_layout(make_original: Any, packers: Any, edit_json: Any, edit_tensors: Any, formats: Any) -> None:
    saved = make_original(hidden_size=64, intermediate_size=128)
    layer = packers.random_layer(0, 128, 64, 32)
    module = "model.layers.1.mlp.down_proj"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{module}.weight"]
        tensors.update({f"{module}.{part}": value for part, value in packers.awq(layer).items()})

    edit_tensors(saved.directory / "model.safetensors", pack)
    edit_json(saved.directory / "config.json", lambda v: v.update(quantization_config=formats["awq"].config))
    checkpoint = open_checkpoint(saved.directory)
    wanted = {name: value.numpy() for name, value in saved.canonical().items()}
    assert_holds(checkpoint, wanted | {DOWN_PROJ: layer.weight()})
    assert isinstance(checkpoint.tensors[DOWN_PROJ], QuantizedSource)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_tinychat_over_either_layout(
    make_llava: Any, make_original: Any, make_tinychat: Any, group: int, original: bool
) -> None:
    text = {"hidden_size": 64, "intermediate_size": 128}
    saved = make_original(**text) if original else make_llava(text=text)
    state = saved.canonical()
    part = {name: value for name, value in state.items() if name.startswith(("language_model.", "lm_head."))}
    path, wanted = make_tinychat(part, group=group)
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(quantized=path))
    assert_holds(checkpoint, {name: value.numpy() for name, value in state.items()} | wanted)
    quantised = {name for name, source in checkpoint.tensors.items() if isinstance(source, QuantizedSource)}
    assert quantised == {name for name in wanted if name.endswith("_proj.weight")}
    assert {checkpoint.tensors[name].method for name in quantised} == {"tinychat"}
    assert {checkpoint.tensors[name].format.group_size for name in quantised} == {group}


def test_tinychat_file_with_the_names_of_llava_hf(make_llava: Any, make_tinychat: Any) -> None:
    saved = make_llava(text={"hidden_size": 64, "intermediate_size": 128})
    part = {name: value for name, value in saved.canonical().items() if name.startswith("language_model.")}
    path, wanted = make_tinychat(part, prefix="language_model.model.")
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(quantized=path))
    assert_holds(checkpoint, {name: value.numpy() for name, value in saved.canonical().items()} | wanted)


def test_biases_of_zeros_are_left_out(make_packed: Any, edit_tensors: Any) -> None:
    packed = make_packed("gptq")
    key = "language_model.model.layers.1.mlp.down_proj.bias"
    edit_tensors(packed.directory / "model.safetensors", lambda tensors: tensors.update({key: torch.zeros(64)}))
    checkpoint = open_checkpoint(packed.directory)
    assert "a bias of zeros" in checkpoint.left_out[key]
    assert_holds(checkpoint, packed.dense | packed.wanted)


def test_compressed_tensors_g_idx_without_an_order(make_packed: Any, edit_tensors: Any) -> None:
    packed = make_packed("compressed-tensors")
    names = [name.replace("language_model.", "language_model.model.")[: -len("weight")] for name in packed.wanted]
    none = {
        f"{name}weight_g_idx": torch.full((128 if "down" in name else 64,), -1, dtype=torch.int32) for name in names
    }
    edit_tensors(packed.directory / "model.safetensors", lambda tensors: tensors.update(none))
    assert_holds(open_checkpoint(packed.directory), packed.dense | packed.wanted)


def test_opening_reads_no_packed_values(make_packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make_packed("gptq, activation order")

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(np, "memmap", read)
    assert len(open_checkpoint(packed.directory).tensors) > len(packed.wanted)


def test_description_says_what_is_quantised(make_packed: Any, invoke: Any) -> None:
    packed = make_packed("gptq, activation order", dense=r"layers\.0\.mlp\.down_proj")
    checkpoint = open_checkpoint(packed.directory)
    report = json.loads(json.dumps(describe(checkpoint)))
    quantised = report["quantized"]
    assert quantised["weights"].keys() == packed.wanted.keys()
    assert set(quantised["weights"].values()) == {"gptq, uint4, groups of 32, input features permuted"}
    assert quantised["dense"] == ["language_model.layers.0.mlp.down_proj.weight"]
    assert report["tensors"]["dtypes"]["uint4"] == len(packed.wanted)
    result = invoke("inspect", packed.directory)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "13 weights: gptq, uint4, groups of 32" in shown
    assert "1 linear layer of the decoder is dense" in shown
    assert Path(packed.directory).name in shown


def test_description_of_a_float_checkpoint(make_llava: Any) -> None:
    report = describe(open_checkpoint(make_llava().directory))
    assert report["quantized"] == {"weights": {}, "dense": []}


def test_inspect_with_tinychats_file(make_llava: Any, make_tinychat: Any, invoke: Any, error_line: Any) -> None:
    saved = make_llava(text={"hidden_size": 64, "intermediate_size": 128})
    part = {name: value for name, value in saved.canonical().items() if name.startswith("language_model.")}
    path, _ = make_tinychat(part)
    report = json.loads(invoke("inspect", saved.directory, "--quantized", path, "--json").stdout)
    assert set(report["quantized"]["weights"].values()) == {"tinychat, uint4, groups of 64"}
    assert str(path) in [file["path"] for file in report["files"]]
    content = torch.load(path)
    del content["model.layers.0.mlp.up_proj.scales"]
    torch.save(content, path)
    result = invoke("inspect", saved.directory, "--quantized", path)
    assert result.exit_code == 2
    assert f"{path} (model.layers.0.mlp.up_proj.qweight): want model.layers.0.mlp.up_proj.scales" in error_line(result)
