"""Packed checkpoints as bundles: the graph holds the values of the file, computes with them, and can be lowered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llava_deploy.engines.lowering.files import lower_file
from llava_deploy.engines.lowering.zero_points import LowerZeroPoints
from llava_deploy.engines.manifest import DECODER_GRAPH
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.verify import verify

ORDERED = "gptq, activation order"


def weight_in(graph: onnx.GraphProto, name: str) -> np.ndarray:
    """By ONNX's definitions: what the graph multiplies with, float32 ``[out_features, in_features]``."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    q, scale = (onnx.numpy_helper.to_array(tensors[f"{name}{end}"]).astype(np.float32) for end in ("", "_scale"))
    group = len(q) // len(scale)
    zero = tensors.get(f"{name}_zero_point")
    zeros = 0 if zero is None else np.repeat(onnx.numpy_helper.to_array(zero).astype(np.float32), group, axis=0)
    weight = (q - zeros) * np.repeat(scale, group, axis=0)
    order = tensors.get(f"{name}_permutation")
    if order is not None:
        weight = weight[np.argsort(onnx.numpy_helper.to_array(order))]
    return weight.T


@pytest.mark.parametrize(
    "format_name", ["awq", ORDERED, "gptq, symmetric, activation order, v2", "compressed-tensors, symmetric, bfloat16"]
)
def test_a_bundle_of_a_mixed_checkpoint(make_packed: Callable[..., Any], format_name: str, tmp_path: Path) -> None:
    packed = make_packed(format_name, dense=r"layers\.0\.mlp")
    checkpoint = open_checkpoint(packed.directory)
    recipe = export(checkpoint, tmp_path / "bundle", "int4").quantization
    assert recipe is not None
    assert recipe.weights == len(packed.wanted)
    graph = onnx.load(tmp_path / "bundle" / DECODER_GRAPH).graph
    for name, want in packed.wanted.items():
        np.testing.assert_array_equal(weight_in(graph, name), want, err_msg=name)
    assert sum(node.op_type == "Gather" and "permutation" in node.input[1] for node in graph.node) == (
        len(packed.wanted) if "activation order" in format_name else 0
    )
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    report = verify(checkpoint, tmp_path / "bundle", prompt="<s>a <image> b", picture=picture, max_new_tokens=4)
    assert report.ok, report.to_dict()


def test_permuted_inputs_can_be_lowered(make_packed: Callable[..., Any], tmp_path: Path) -> None:
    packed = make_packed(ORDERED)
    export(open_checkpoint(packed.directory), tmp_path / "bundle", "int4")
    (tmp_path / "lowered").mkdir()
    path = lower_file(tmp_path / "bundle" / DECODER_GRAPH, tmp_path / "lowered", [LowerZeroPoints()])
    onnx.checker.check_model(str(path), full_check=True)
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert [len(node.input) for node in nodes if node.op_type == "DequantizeLinear"] == [2] * len(packed.wanted)
