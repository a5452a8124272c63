"""Packed checkpoints that are damaged or not read: one line that names the file and tensor, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint
from llava_deploy.exporter.quantization.weight import QuantizedSource

MODULE = "language_model.model.layers.1.mlp.down_proj"  # 128 inputs, 64 outputs
ACT = "gptq, activation order"
CT = "compressed-tensors"
CT_ACT = "compressed-tensors, activation order"
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def refused() -> Callable[..., str]:
    """Open a checkpoint and read all that is packed in it; the one line that says why it cannot be."""

    def refuse(directory: Path, *parts: str, options: CheckpointOptions | None = None) -> str:
        with pytest.raises(CheckpointError) as error:
            for source in open_checkpoint(directory, options or CheckpointOptions()).tensors.values():
                if isinstance(source, QuantizedSource):
                    source.read()
        message = str(error.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, message
        return message

    return refuse


def at(index: tuple[int, int], value: float) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(("value", "word"), [(0.0, "zero"), (float("inf"), "infinite"), (float("nan"), "NaN")])
@pytest.mark.parametrize(
    ("format_name", "part", "index"),
    [
        ("awq", "scales", (2, 5)),
        (ACT, "scales", (2, 5)),
        (CT, "weight_scale", (5, 2)),
        ("compressed-tensors, symmetric, bfloat16", "weight_scale", (5, 1)),
    ],
)
def test_scales(
    make_packed: Any, edit_tensors: Any, refused: Any, format_name: str, part: str, index: Any, value: float, word: str
) -> None:
    packed = make_packed(format_name)
    key = f"{MODULE}.{part}"
    edit_tensors(packed.directory / "model.safetensors", lambda t: t.update({key: at(index, value)(t[key])}))
    message = refused(packed.directory, f"model.safetensors ({key}): 1 of", word, "damaged")
    if part == "scales":
        assert "the first in group 2, output 5" in message


PARTS: list[tuple[str, str, Change]] = [
    ("awq", "qweight", lambda t: t[:-1]),
    ("awq", "qweight", lambda t: t[:-32]),
    ("awq", "qweight", lambda t: t.flatten()),
    ("awq", "qweight", lambda t: t.long()),
    ("awq", "qweight", lambda t: t[:0]),
    ("awq", "qzeros", lambda t: t[:-1]),
    ("awq", "qzeros", lambda t: t.half()),
    ("awq", "scales", lambda t: t[:, :-8]),
    ("awq", "scales", lambda t: t.int()),
    ("gptq", "qweight", lambda t: t[:, :-1]),
    ("gptq", "qzeros", lambda t: t.T),
    ("gptq", "scales", lambda t: t[:2]),
    ("gptq", "g_idx", lambda t: t[:-1]),
    (CT, "weight_packed", lambda t: t[:-1]),
    (CT, "weight_packed", lambda t: t[:, :-1]),
    (CT, "weight_scale", lambda t: t.T),
    (CT, "weight_zero_point", lambda t: t.char()),
    (CT, "weight_shape", lambda t: t[:1]),
    (CT, "weight_shape", lambda t: t.flip(0)),
]


@pytest.mark.parametrize(("format_name", "part", "change"), PARTS, ids=[f"{i}-{p[1]}" for i, p in enumerate(PARTS)])
def test_parts_of_the_wrong_shape(
    make_packed: Any, edit_tensors: Any, refused: Any, format_name: str, part: str, change: Change
) -> None:
    packed = make_packed(format_name)
    key = f"{MODULE}.{part}"
    edit_tensors(packed.directory / "model.safetensors", lambda t: t.update({key: change(t[key]).contiguous()}))
    refused(packed.directory, f"({MODULE}.", "want", "found")


def test_a_layer_of_another_size_than_the_config_says(
    make_packed: Any, edit_tensors: Any, refused: Any, packers: Any
) -> None:
    packed = make_packed("awq")
    wrong = packers.awq(packers.random_layer(0, 64, 64, 32))
    new = {f"{MODULE}.{part}": value for part, value in wrong.items()}
    edit_tensors(packed.directory / "model.safetensors", lambda t: t.update(new))
    refused(packed.directory, f"({MODULE}.qweight): want shape [64, 128]", "found [64, 64]")


@pytest.mark.parametrize(
    ("format_name", "size", "wanted"),
    [
        ("awq", 64, "group_size 64 say"),
        ("awq", 48, "want input features that groups of 48 divide"),
        ("awq", 16, "want groups of a multiple of 32"),
        ("awq", 0, "group_size: want -1 or a positive number"),
        ("awq", -1, "group_size -1 say"),
        ("gptq", 128, "group_size 128 say"),
        ("gptq", 64, "group_size 64 say"),
        ("gptq", -2, "group_size: want -1 or a positive number"),
    ],
)
def test_group_size(make_packed: Any, edit_json: Any, refused: Any, format_name: str, size: int, wanted: str) -> None:
    packed = make_packed(format_name)
    edit_json(packed.directory / "config.json", lambda v: v["quantization_config"].update(group_size=size))
    refused(packed.directory, wanted)


def test_group_size_of_compressed_tensors(make_packed: Any, edit_json: Any, refused: Any) -> None:
    packed = make_packed(CT)

    def change(values: dict[str, Any]) -> None:
        values["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64

    edit_json(packed.directory / "config.json", change)
    refused(packed.directory, "weight_scale", "group_size 64 of its config group say")


@pytest.mark.parametrize(
    ("format_name", "part", "where"),
    [
        ("awq", "qzeros", "qweight"),
        ("awq", "scales", "qweight"),
        ("awq", "qweight", "qzeros"),
        ("gptq", "qzeros", "qweight"),
        (ACT, "g_idx", "qweight"),
        (CT, "weight_scale", "weight_packed"),
        (CT, "weight_packed", "weight_"),
        (CT, "weight_zero_point", "weight_packed"),
        (CT_ACT, "weight_g_idx", "weight_packed"),
    ],
)
def test_a_part_is_missing(
    make_packed: Any, edit_tensors: Any, refused: Any, format_name: str, part: str, where: str
) -> None:
    packed = make_packed(format_name)
    edit_tensors(packed.directory / "model.safetensors", lambda tensors: tensors.pop(f"{MODULE}.{part}"))
    refused(packed.directory, f"({MODULE}.{where}", f"want {MODULE}.{part}", "found none")


def test_stray_qweight(make_packed: Any, edit_tensors: Any, refused: Any) -> None:
    packed = make_packed("awq")
    key = "language_model.model.layers.9.mlp.down_proj.qweight"
    extra = {key: torch.zeros(64, 8, dtype=torch.int32)}
    edit_tensors(packed.directory / "model.safetensors", lambda tensors: tensors.update(extra))
    refused(packed.directory, f"({key}): want", "qzeros", "scales", "found none")


def test_a_whole_layer_too_many(make_packed: Any, edit_tensors: Any, refused: Any, packers: Any) -> None:
    packed = make_packed("awq")
    module = "language_model.model.layers.9.mlp.down_proj"
    layer = packers.awq(packers.random_layer(0, 128, 64, 32))
    extra = {f"{module}.{part}": value for part, value in layer.items()}
    edit_tensors(packed.directory / "model.safetensors", lambda tensors: tensors.update(extra))
    refused(packed.directory, "left over", f"{module}.qweight")


def test_packed_and_dense_at_once(make_packed: Any, edit_tensors: Any, refused: Any) -> None:
    packed = make_packed("awq")
    dense = {f"{MODULE}.weight": torch.zeros(64, 128)}
    edit_tensors(packed.directory / "model.safetensors", lambda tensors: tensors.update(dense))
    refused(packed.directory, f"({MODULE}.qweight)", f"({MODULE}.weight)", "stale")


@pytest.mark.parametrize(("format_name", "other"), [("awq", "gptq"), ("gptq", "awq")])
def test_config_of_the_other_packing(
    make_packed: Any, edit_json: Any, refused: Any, formats: Any, format_name: str, other: str
) -> None:
    packed = make_packed(format_name)
    edit_json(packed.directory / "config.json", lambda v: v.update(quantization_config=formats[other].config))
    refused(packed.directory, "want", "found")


def test_config_of_another_set_of_parts(make_packed: Any, edit_json: Any, refused: Any, formats: Any) -> None:
    packed = make_packed("awq")
    edit_json(packed.directory / "config.json", lambda v: v.update(quantization_config=formats[CT].config))
    refused(packed.directory, "is part of a quantised layer, and not of the packing that", "weight_packed")


@pytest.mark.parametrize("format_name", ["awq", CT])
def test_packed_without_a_config(make_packed: Any, edit_json: Any, refused: Any, format_name: str) -> None:
    packed = make_packed(format_name)
    edit_json(packed.directory / "config.json", lambda values: values.pop("quantization_config"))
    refused(packed.directory, "is part of a quantised layer", "config.json has no quantization_config", "copy it")


def test_config_without_packed_layers(make_llava: Any, edit_json: Any, refused: Any, formats: Any) -> None:
    saved = make_llava()
    edit_json(saved.directory / "config.json", lambda v: v.update(quantization_config=formats["awq"].config))
    refused(saved.directory, "config.json: want packed layers (qweight, qzeros, scales), found none")


@pytest.mark.parametrize(
    ("format_name", "part", "index", "value", "wanted"),
    [
        (ACT, "g_idx", 3, 4, "want groups from 0 to 3, found 0 to 4"),
        (ACT, "g_idx", 3, -1, "want groups from 0 to 3, found -1 to 3"),
        (CT_ACT, "weight_g_idx", 3, 7, "want groups from 0 to 3, found 0 to 7"),
        ("gptq", "g_idx", 3, 1, "want groups of 32 in order"),
    ],
)
def test_g_idx(
    make_packed: Any,
    edit_tensors: Any,
    refused: Any,
    format_name: str,
    part: str,
    index: int,
    value: int,
    wanted: str,
) -> None:
    packed = make_packed(format_name)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}.{part}"][index] = value

    edit_tensors(packed.directory / "model.safetensors", change)
    refused(packed.directory, f"({MODULE}.{part}): {wanted}")


def test_unbalanced_g_idx(make_packed: Any, edit_tensors: Any, refused: Any) -> None:
    packed = make_packed(ACT)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        index = tensors[f"{MODULE}.g_idx"]
        index[np.flatnonzero(index.numpy() == 0)[0]] = 1

    edit_tensors(packed.directory / "model.safetensors", change)
    refused(
        packed.directory, f"({MODULE}.g_idx): want 32 input features in each group, found 31 in group 0", "unbalanced"
    )


@pytest.mark.parametrize("format_name", ["awq without zero points", "gptq, symmetric"])
def test_symmetric_with_other_zero_points(make_packed: Any, edit_tensors: Any, refused: Any, format_name: str) -> None:
    packed = make_packed(format_name)
    key = f"{MODULE}.qzeros"
    edit_tensors(packed.directory / "model.safetensors", lambda t: t.update({key: t[key] + 1}))
    refused(packed.directory, f"({MODULE}.qweight): want zero points of 8", "symmetric")


def test_symmetric_in_the_other_checkpoint_format(make_packed: Any, edit_json: Any, refused: Any) -> None:
    packed = make_packed("gptq, symmetric")
    edit_json(packed.directory / "config.json", lambda v: v["quantization_config"].update(checkpoint_format="gptq_v2"))
    refused(packed.directory, "want zero points of 8", "checkpoint_format")


def test_compressed_tensors_zero_points_of_a_symmetric_layer(make_packed: Any, edit_json: Any, refused: Any) -> None:
    packed = make_packed(CT)

    def change(values: dict[str, Any]) -> None:
        values["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True

    edit_json(packed.directory / "config.json", change)
    refused(packed.directory, "weight_zero_point): want no zero points")


@pytest.mark.parametrize("target", [MODULE, r"re:.*layers\.1\.mlp"])
def test_compressed_tensors_ignored_layer_that_is_packed(
    make_packed: Any, edit_json: Any, refused: Any, target: str
) -> None:
    packed = make_packed(CT)
    edit_json(packed.directory / "config.json", lambda v: v["quantization_config"]["ignore"].append(target))
    refused(packed.directory, "layers.1.mlp.", "want this layer dense, as the config's ignore list says")


def test_compressed_tensors_layer_in_no_group(make_packed: Any, edit_json: Any, refused: Any) -> None:
    packed = make_packed(CT)

    def change(values: dict[str, Any]) -> None:
        values["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]

    edit_json(packed.directory / "config.json", change)
    refused(packed.directory, "mlp.", "want a group of quantization_config.config_groups that names this layer")


def test_lora_over_a_packed_layer(make_packed: Any, refused: Any, tmp_path: Path) -> None:
    packed = make_packed("awq")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.ones(2, 128),
        f"base_model.model.{MODULE}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(factors, lora / "adapter_model.safetensors")
    refused(
        packed.directory,
        f"adapts '{MODULE}', which is quantised in",
        f"({MODULE}.qweight)",
        "merge the adapter into the unquantised checkpoint",
        options=CheckpointOptions(lora=lora),
    )


def test_a_bias_that_is_not_zero(make_packed: Any, edit_tensors: Any, refused: Any) -> None:
    packed = make_packed("gptq")
    key = f"{MODULE}.bias"
    edit_tensors(packed.directory / "model.safetensors", lambda tensors: tensors.update({key: torch.ones(64)}))
    refused(packed.directory, "left over", key)


def state_of(saved: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in saved.canonical().items() if name.startswith("language_model.")}


TINYCHAT: list[tuple[str, Change, str]] = [
    ("scales", at((0, 3), 0.0), "1 of 128 scales are zero, the first in group 0, output 3"),
    ("scales", at((1, 3), float("nan")), "1 of 128 scales are NaN"),
    ("scales", at((2, 3), 1.0), "want zeros after its 2 groups"),
    ("scales", lambda t: t[:4], "want 32 rows (groups of 32) or 16 rows (groups of 64) or 8 rows (groups of 128)"),
    ("scales", lambda t: t.float(), "want float16"),
    ("scaled_zeros", at((1, 3), 0.5), "want -(z * scale) with a whole z from 0 to 15, found 0.5"),
    ("scaled_zeros", lambda t: t[:, :-4], "want float16"),
    ("qweight", lambda t: t.int(), "want int16 values"),
    ("qweight", lambda t: t[:, :-32], "want a multiple of 64 input features"),
]


@pytest.mark.parametrize(("part", "change", "wanted"), TINYCHAT, ids=[f"{i}-{t[0]}" for i, t in enumerate(TINYCHAT)])
def test_tinychat(make_llava: Any, make_tinychat: Any, refused: Any, part: str, change: Change, wanted: str) -> None:
    saved = make_llava(text={"hidden_size": 64, "intermediate_size": 128})
    path, _ = make_tinychat(state_of(saved))
    key = f"model.layers.1.mlp.down_proj.{part}"
    content = torch.load(path)
    content[key] = change(content[key]).contiguous()
    torch.save(content, path)
    message = refused(saved.directory, wanted, options=CheckpointOptions(quantized=path))
    assert f"{path} (model.layers.1.mlp.down_proj." in message


def test_tinychat_first_packing(make_llava: Any, packers: Any, refused: Any, tmp_path: Path) -> None:
    saved = make_llava()
    path = tmp_path / "llava-w4-g128-awq.pt"
    layer = packers.awq(packers.random_layer(0, 128, 64, 32))
    torch.save({f"model.layers.1.mlp.down_proj.{part}": value for part, value in layer.items()}, path)
    wanted = "want TinyChat's second packing"
    refused(saved.directory, wanted, "offline-weight-repacker.py", options=CheckpointOptions(quantized=path))


def test_tinychat_file_of_nothing_packed(make_llava: Any, refused: Any, tmp_path: Path) -> None:
    saved = make_llava()
    path = tmp_path / "dense.pt"
    torch.save({"model.norm.weight": torch.ones(48)}, path)
    refused(saved.directory, f"--quantized {path}: want packed layers", options=CheckpointOptions(quantized=path))


def test_tinychat_file_that_is_not_there(make_llava: Any, refused: Any, tmp_path: Path) -> None:
    options = CheckpointOptions(quantized=tmp_path / "nowhere.pt")
    refused(make_llava().directory, f"--quantized {tmp_path / 'nowhere.pt'}: want a file", options=options)


def test_integers_where_no_config_speaks_of_them(make_llava: Any, refused: Any) -> None:
    saved = make_llava()
    path = saved.directory / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 48, dtype=torch.int8)
    save_file(tensors, path)
    refused(saved.directory, "found int8; quantised in a form that is not read")
