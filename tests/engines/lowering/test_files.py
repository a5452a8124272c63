"""Lowered models beside the weights that they share with the bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.lowering.files import lower_beside, lower_file
from llava_deploy.engines.lowering.zero_points import LowerZeroPoints


@pytest.fixture
def source(linear: Callable[..., object], linears_file: Callable[..., Path]) -> Path:
    """Two linear layers of four bits, of which one has zero points."""
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 16, (64, 8), np.uint8) for _ in range(2)]
    scales = rng.uniform(0.01, 0.02, (2, 8)).astype(np.float32)
    zeros = rng.integers(0, 16, (2, 8), np.uint8)
    return linears_file(linear(values[0], scales, zeros), linear(values[1], scales, None))


def content(model: Path, tensor: ir.TensorProtocol) -> bytes:
    """A tensor's bytes, read as TensorRT reads them: through a link as well, which onnx-ir does not follow."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.tobytes()
    assert tensor.offset is not None
    assert tensor.length is not None
    with model.with_name(tensor.location).open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.length)


def empty(place: Path) -> Path:
    place.mkdir()
    return place


def test_only_what_a_pass_computes_is_written(source: Path, tmp_path: Path) -> None:
    beside = lower_beside(source, empty(tmp_path / "beside"), [LowerZeroPoints()])
    link = beside.path.with_name("model.onnx.data")
    assert link.is_symlink()
    assert link.resolve() == source.with_name("model.onnx.data").resolve()
    tensors = {name: value.const_value for name, value in ir.load(beside.path).graph.initializers.items()}
    places = {
        name: Path(tensor.location).name for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)
    }
    assert {name for name, place in places.items() if place == "model.onnx.computed"} == {
        "w0",
        "w0.lowered.group_terms",
    }
    assert {name for name, place in places.items() if place == "model.onnx.data"} == {"w1", "w0_scale", "w1_scale"}


def test_it_is_the_model_that_a_copy_of_all_weights_gives(source: Path, tmp_path: Path) -> None:
    beside = lower_beside(source, empty(tmp_path / "beside"), [LowerZeroPoints()])
    copied = lower_file(source, empty(tmp_path / "copied"), [LowerZeroPoints()])
    first, second = (ir.load(path).graph for path in (beside.path, copied))
    assert [node.op_type for node in first] == [node.op_type for node in second]
    assert first.initializers.keys() == second.initializers.keys()
    for name, value in first.initializers.items():
        other = second.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        assert content(beside.path, value.const_value) == content(copied, other)


def test_it_counts_the_operators(source: Path, tmp_path: Path) -> None:
    plain = lower_beside(source, empty(tmp_path / "plain"), [])
    assert plain.operators == {"DequantizeLinear": 2, "MatMul": 2}
    lowered = lower_beside(source, empty(tmp_path / "lowered"), [LowerZeroPoints()])
    assert (lowered.operators["MatMul"], lowered.operators["Attention"]) == (3, 0)


def test_a_file_that_is_not_beside_the_graph(source: Path, tmp_path: Path) -> None:
    model = ir.load(source)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            f"../{source.parent.name}/{tensor.location}", tensor.offset, tensor.length, tensor.dtype,
            shape=tensor.shape, name=tensor.name, base_dir=source.parent,
        )  # fmt: skip
    astray = source.with_name("astray.onnx")
    ir.save(model, astray)
    with pytest.raises(BundleError, match=r"its file .*model\.onnx\.data' is not beside the graph"):
        lower_beside(astray, empty(tmp_path / "beside"), [])
