"""The headers that the planner reads itself, beside what onnx reads of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.planner.onnx_header import TensorSize, read_initializers

KINDS = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.BOOL),
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT64, TensorProto.INT4, TensorProto.UINT4),
)


def external(name: str, kind: int, shape: list[int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.data")
    return tensor


def save(path: Path, tensors: list[TensorProto]) -> Path:
    node = helper.make_node("Identity", ["x"], ["y"], name="node", doc_string="says nothing")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([node], "graph", values[:1], values[1:], tensors, "about it")
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 2_000), max_size=4)), min_size=1, max_size=5
    )
)
def test_names_shapes_and_bytes_are_those_that_onnx_ir_reads(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    save(path, [external(f"weight.{i}", kind, shape) for i, (kind, shape) in enumerate(sizes)])
    want = [value.const_value for value in ir.load(path).graph.initializers.values()]
    found = read_initializers(path)
    assert [(t.name, t.shape) for t in found] == [(t.name, tuple(t.shape.numpy())) for t in want if t is not None]
    assert [t.nbytes for t in found] == [t.nbytes for t in want if t is not None]


def test_short_vectors_of_integers_are_read(tmp_path: Path) -> None:
    tensors = [
        numpy_helper.from_array(np.array([0, 0, 16, -64]), "shape"),
        numpy_helper.from_array(np.arange(4, dtype=np.float32), "floats"),
        numpy_helper.from_array(np.arange(100), "long"),
    ]
    shape, floats, long = read_initializers(save(tmp_path / "model.onnx", tensors))
    assert shape == TensorSize("shape", (4,), 64, (0, 0, 16, -64))
    assert (floats.integers, long.integers) == ((), ())


@pytest.mark.parametrize("content", [b"", b"not an ONNX model", b"\x3a\xff\x01", b"\x3f" * 10])
def test_what_is_no_model_is_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "decoder.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.onnx: cannot be read as ONNX"):
        read_initializers(path)


def test_a_file_that_is_cut_short_anywhere_is_said_or_read_in_part(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.onnx", [external("weight", TensorProto.FLOAT, [3, 5])]).read_bytes()
    path = tmp_path / "short.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            read_initializers(path)
        except BundleError:
            continue
        onnx.load_from_string(path.read_bytes())  # whole messages, of which the last are missing


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"vision\.onnx"):
        read_initializers(tmp_path / "vision.onnx")
