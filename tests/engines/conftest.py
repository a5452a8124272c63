"""Random asymmetric linear layers in the canonical form, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

FLOATS = {np.dtype(np.float16): TensorProto.FLOAT16, np.dtype(np.float32): TensorProto.FLOAT}


@dataclass(frozen=True)
class Linear:
    """Unsigned values ``[K, N]``; scales, in the graph's dtype, and zero points ``[K / group_size, N]``."""

    values: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None

    @property
    def group_size(self) -> int:
        return len(self.values) // len(self.scales)

    def dense(self) -> np.ndarray:
        """float64 ``[K, N]``."""
        zeros = 8 if self.zero_points is None else np.repeat(self.zero_points, self.group_size, axis=0)
        scales = np.repeat(self.scales.astype(np.float64), self.group_size, axis=0)
        return (self.values.astype(np.float64) - zeros) * scales


def packed(values: np.ndarray) -> bytes:
    flat = values.astype(np.uint8).reshape(-1)
    return (flat[0::2] | flat[1::2] << 4).tobytes()


def write_linears(directory: Path, linears: Sequence[Linear], *, rank: int = 3) -> Path:
    """``y{i} = x @ linear i``, written to ``model.onnx`` with its weights in external data."""
    dtype = FLOATS[linears[0].scales.dtype]
    axes = ["batch", "seq"][: rank - 1]
    nodes, initializers, outputs, data = [], [], [], bytearray()

    def constant(name: str, kind: int, shape: tuple[int, ...], content: bytes) -> None:
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": "model.onnx.data", "offset": len(data), "length": len(content)}.items():
            tensor.external_data.add(key=key, value=str(value))
        data.extend(content)
        initializers.append(tensor)

    for i, linear in enumerate(linears):
        inputs = [f"w{i}", f"w{i}_scale"]
        if linear.zero_points is None:
            constant(f"w{i}", TensorProto.INT4, linear.values.shape, packed(linear.values ^ 8))
        else:
            constant(f"w{i}", TensorProto.UINT4, linear.values.shape, packed(linear.values))
            constant(f"w{i}_zero_point", TensorProto.UINT4, linear.scales.shape, packed(linear.zero_points))
            inputs.append(f"w{i}_zero_point")
        constant(f"w{i}_scale", dtype, linear.scales.shape, linear.scales.tobytes())
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"d{i}"], axis=0, block_size=linear.group_size))
        nodes.append(helper.make_node("MatMul", ["x", f"d{i}"], [f"y{i}"]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", dtype, [*axes, linear.values.shape[1]]))
    x = helper.make_tensor_value_info("x", dtype, [*axes, len(linears[0].values)])
    graph = helper.make_graph(nodes, "linears", [x], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "model.onnx.data").write_bytes(bytes(data))
    onnx.save(model, directory / "model.onnx")
    return directory / "model.onnx"


@pytest.fixture
def linear() -> type[Linear]:
    return Linear


@pytest.fixture
def linears_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a model with these linear layers on one input; its path."""
    count = 0

    def write(*linears: Linear, rank: int = 3) -> Path:
        nonlocal count
        count += 1
        return write_linears(tmp_path / f"source{count}", linears, rank=rank)

    return write


@pytest.fixture
def lower(tmp_path: Path) -> Callable[[Path], Path]:
    """Lower a model's zero points into a new directory; the new model's path."""
    from llava_deploy.engines.lowering.files import lower_file
    from llava_deploy.engines.lowering.zero_points import LowerZeroPoints

    count = 0

    def run(source: Path) -> Path:
        nonlocal count
        count += 1
        directory = tmp_path / f"lowered{count}"
        directory.mkdir()
        return lower_file(source, directory, [LowerZeroPoints()])

    return run
