"""MatMulNBits: the constants that ONNX Runtime makes of the same weights, the same products, what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llava_deploy.engines.lowering.packed_products import PackProducts

IN, OUT = 192, 48


def packed(codes: np.ndarray) -> bytes:
    flat = codes.astype(np.uint8).reshape(-1) & 15
    return (flat[0::2] | flat[1::2] << 4).tobytes()


def product(block: int, *, signed: bool, axis: int = 0, used_twice: bool = False) -> onnx.ModelProto:
    """``y = x @ dequantized``; drawn weights."""
    rng = np.random.default_rng(block)
    kind = TensorProto.INT4 if signed else TensorProto.UINT4
    codes = rng.integers(0, 16, (IN, OUT))
    blocks = (IN // block, OUT) if axis == 0 else (IN, OUT // block)
    scales = rng.uniform(0.01, 0.1, blocks).astype(np.float16)
    constants = [
        TensorProto(name="w", data_type=kind, dims=codes.shape, raw_data=packed(codes)),
        numpy_helper.from_array(scales, "w_scale"),
    ]
    if not signed:
        points = rng.integers(0, 16, blocks)
        constants.append(TensorProto(name="w_zero", data_type=kind, dims=blocks, raw_data=packed(points)))
    nodes = [
        helper.make_node("DequantizeLinear", [each.name for each in constants], ["dense"], axis=axis, block_size=block),
        helper.make_node("MatMul", ["x", "dense"], ["y"]),
    ]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", "seq", OUT])]
    if used_twice:
        nodes.append(helper.make_node("Identity", ["dense"], ["z"]))
        outs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT16, [IN, OUT]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", "seq", IN])
    graph = helper.make_graph(nodes, "product", [x], outs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    assert PackProducts()(graph).modified
    return ir.to_proto(graph)


def as_onnxruntime_has_it(model: onnx.ModelProto, directory: Path) -> onnx.ModelProto:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.optimized_model_filepath = str(directory / "optimised.onnx")
    settings.add_session_config_entry("session.disable_prepacking", "1")
    onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return onnx.load(directory / "optimised.onnx")


def the_operator(model: onnx.ModelProto) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Attributes of the one MatMulNBits, and its constants; scales, which ONNX Runtime widens for a CPU, in float32."""
    (node,) = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    attributes.pop("weight_prepacked", None)  # its default, which not every release knows
    constants = [held[name] for name in node.input[1:] if name]
    return attributes, [each.astype(np.float32) if each.dtype == np.float16 else each for each in constants]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_it_is_the_operator_that_onnxruntime_makes(block: int, signed: bool, tmp_path: Path) -> None:
    """With 12, 6 and 3 blocks: of an odd number, the last nibble of each row of zero points is filled up."""
    model = product(block, signed=signed)
    attributes, constants = the_operator(lowered(model))
    want_attributes, want_constants = the_operator(as_onnxruntime_has_it(model, tmp_path))
    assert attributes == want_attributes
    assert len(constants) == len(want_constants) == (2 if signed else 3)
    for found, want in zip(constants, want_constants, strict=True):
        assert found.dtype == want.dtype
        assert found.shape == want.shape
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("signed", [False, True])
def test_the_product_is_the_same(signed: bool) -> None:
    model = product(32, signed=signed)
    x = np.random.default_rng(1).standard_normal((2, 3, IN)).astype(np.float16)

    def run(each: onnx.ModelProto) -> np.ndarray:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(each.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        (found,) = session.run(["y"], {"x": x})
        return np.asarray(found, np.float32)

    want = run(model)
    found = run(lowered(model))
    assert np.linalg.norm(found - want) < 0.01 * np.linalg.norm(want)  # the CPU's kernel rounds x to 8 bits


@pytest.mark.parametrize(
    "model",
    [
        product(8, signed=True),
        product(48, signed=False),
        product(16, signed=True, axis=1),
        product(32, signed=False, used_twice=True),
    ],
    ids=["small blocks", "blocks of no power of two", "blocks of columns", "a weight that others read"],
)
def test_what_is_not_covered_stays(model: onnx.ModelProto) -> None:
    graph = ir.from_proto(model)
    assert not PackProducts()(graph).modified
    assert [node.op_type for node in graph.graph][:2] == ["DequantizeLinear", "MatMul"]
