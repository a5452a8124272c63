"""What lowering costs in float16, where an accelerator rounds: every operator's result, after float32 accumulation.

The graphs themselves are evaluated, before and after, by a small interpreter of the operators in them that works in
float64 and rounds each result to the dtype it has in the graph; dequantised weights are rounded too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

DRAWS = 1000
WANTED = 2e-3  # norm-wise relative error, worst draw
FAMILIES = ("normal", "zero points 0 and 15", "one sign", "all zero points 0", "heavy tails")


class RoundingInterpreter:
    """Runs a graph operator by operator; the weights are dequantised once."""

    def __init__(self, path: Path) -> None:
        self._graph = ir.load(path).graph
        self._kinds = {v: t.elem_type for v, t in _types(path).items()}
        self._constants = {n: np.asarray(v.const_value.numpy()) for n, v in self._graph.initializers.items()}
        self._nodes = [*self._graph]

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        values: dict[str, np.ndarray] = {**self._constants, "x": x.astype(np.float64)}
        for node in self._nodes:
            output = str(node.outputs[0].name)
            if output in self._constants:
                continue
            inputs = [values[str(v.name)] for v in node.inputs if v is not None]
            kind = onnx.helper.tensor_dtype_to_np_dtype(self._kinds[output])
            values[output] = _apply(node, inputs).astype(kind).astype(np.float64)
            if node.op_type == "DequantizeLinear":
                self._constants[output] = values[output]
        return [values[str(v.name)] for v in self._graph.outputs]


def _types(path: Path) -> dict[str, Any]:
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    return {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.output]}


def _apply(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    a, b = inputs[0], inputs[-1]
    if node.op_type == "DequantizeLinear":
        repeat = [np.repeat(v.astype(np.float64), node.attributes["block_size"].as_int(), axis=0) for v in inputs[1:]]
        return (a.astype(np.float64) - sum(repeat[1:])) * repeat[0]
    if node.op_type == "Reshape":
        return a.reshape([a.shape[i] if size == 0 else int(size) for i, size in enumerate(b)])
    if node.op_type in ("ReduceMean", "ReduceSum"):
        reduce = a.mean if node.op_type == "ReduceMean" else a.sum
        return reduce(axis=tuple(int(axis) for axis in b), keepdims=True)
    if node.op_type == "Concat":
        return np.concatenate(inputs, axis=node.attributes["axis"].as_int())
    if node.op_type == "Cast":
        return a
    return {"MatMul": np.matmul, "Add": np.add, "Sub": np.subtract, "Mul": np.multiply}[node.op_type](a, b)


def draw_layer(linear: type, family: str, rows: int, columns: int, group: int, rng: np.random.Generator) -> Any:
    shape, groups = (rows, columns), (rows // group, columns)
    if family in ("zero points 0 and 15", "all zero points 0"):
        scales = rng.uniform(0.005, 0.02, groups).astype(np.float16)
        ends = np.array([0, 15] if family == "zero points 0 and 15" else [0], np.uint8)
        return linear(rng.integers(0, 16, shape, np.uint8), scales, rng.choice(ends, groups))
    weight = rng.standard_t(2.5, shape) if family == "heavy tails" else rng.normal(size=shape)
    blocks = 0.02 * weight.reshape(rows // group, group, columns)
    if family == "one sign":
        blocks = np.abs(blocks) * rng.choice([-1, 1], (rows // group, 1, columns))
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    values = np.clip(np.rint(blocks / scales[:, None]) + zeros[:, None], 0, 15)
    return linear(values.reshape(shape).astype(np.uint8), scales, zeros.astype(np.uint8))


def draw_activations(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Two tokens; a half per cent or so of the features 20 to 100 times as large, every other draw of one sign."""
    x = rng.normal(size=(1, 2, rows))
    outliers = rng.choice(rows, max(1, rows // 128), replace=False)
    factors = rng.uniform(20, 100, len(outliers))
    if rng.integers(2):
        x[..., outliers] *= factors
    else:
        x[..., outliers] += factors
    return x.astype(np.float16)


@pytest.mark.parametrize("group", [32, 128])
def test_the_lowered_form_is_the_zero_point_form_within_float16(
    linear: type, linears_file: Callable[..., Path], lower: Callable[[Path], Path], group: int
) -> None:
    rows, columns, per_file = 256, 24, 10
    worst = dict.fromkeys(FAMILIES, 0.0)
    for file in range(DRAWS // per_file**2):
        rng = np.random.default_rng((group, file))
        family = FAMILIES[file % len(FAMILIES)]
        source = linears_file(*(draw_layer(linear, family, rows, columns, group, rng) for _ in range(per_file)))
        before, after = RoundingInterpreter(source), RoundingInterpreter(lower(source))
        for _ in range(per_file):
            x = draw_activations(rows, rng)
            for want, got in zip(before.run(x), after.run(x), strict=True):
                error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
                worst[family] = max(worst[family], error)
    assert min(worst.values()) > 1e-4, "float16 leaves its mark: is anything rounded at all?"
    assert max(worst.values()) <= WANTED, worst


def test_the_plain_form_would_not_do(linear: type) -> None:
    """Why the group's mean is taken off first: where values lie near an end, two large terms cancel."""
    rng, rows, group = np.random.default_rng(0), 512, 128
    layer = draw_layer(linear, "heavy tails", rows, 32, group, rng)
    half: Callable[[np.ndarray], np.ndarray] = lambda a: a.astype(np.float16).astype(np.float64)  # noqa: E731
    x = (rng.normal(size=(4, rows)) + 0.5).astype(np.float16).astype(np.float64)
    scales = layer.scales.astype(np.float64)
    symmetric = half((layer.values.astype(np.float64) - 8) * np.repeat(scales, group, axis=0))
    sums = half(x.reshape(4, rows // group, group).sum(axis=-1))
    plain = half(half(x @ symmetric) + half(sums @ half((8.0 - layer.zero_points) * scales)))
    want = x @ layer.dense()
    assert np.linalg.norm(plain - want) > WANTED * np.linalg.norm(want)
