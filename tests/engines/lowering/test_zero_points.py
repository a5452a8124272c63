"""Zero points lowered away: the same function, symmetric weights, shared group means, and nothing else touched."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.lowering.nibbles import FlippedNibbles, group_sums
from llava_deploy.engines.lowering.zero_points import LowerZeroPoints

Files = Callable[..., Path]
Lower = Callable[[Path], Path]


def random_linear(linear: type, rng: np.random.Generator, shape: tuple[int, int], group: int, **kind: Any) -> Any:
    """Values of all steps; zero points anywhere, or at the ends only, or (symmetric) none."""
    groups = (shape[0] // group, shape[1])
    zeros = {
        "anywhere": rng.integers(0, 16, groups, np.uint8),
        "ends": rng.choice(np.array([0, 15], np.uint8), groups),
        "none": None,
    }[kind.get("zeros", "anywhere")]
    scales = rng.uniform(0.005, 0.02, groups).astype(kind.get("dtype", np.float32))
    return linear(rng.integers(0, 16, shape, np.uint8), scales, zeros)


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def bytes_of(path: Path) -> dict[str, bytes]:
    return {str(name): value.const_value.tobytes() for name, value in ir.load(path).graph.initializers.items()}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.sampled_from([32, 64, 128]),
    groups=st.integers(1, 4),
    columns=st.integers(1, 20),
    seq=st.integers(1, 5),
    rank=st.sampled_from([2, 3]),
    zeros=st.sampled_from(["anywhere", "ends"]),
    seed=st.integers(0, 2**31),
)
def test_the_lowered_graph_is_the_same_function(
    linear: type, linears_file: Files, lower: Lower, group: int, groups: int, columns: int, seq: int, rank: int,
    zeros: str, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    layer = random_linear(linear, rng, (group * groups, 2 * columns), group, zeros=zeros)
    shape = (2, seq, group * groups)[3 - rank :]
    x = (rng.normal(size=shape) * rng.choice([1, 30], size=shape, p=[0.98, 0.02])).astype(np.float32)
    source = linears_file(layer, rank=rank)
    want = x.astype(np.float64) @ layer.dense()
    for path in (source, lower(source)):
        (got,) = run(path, x)
        assert np.linalg.norm(got - want) <= 3e-6 * np.linalg.norm(want)


def test_one_computation_of_group_means_for_all_linears_of_an_input(
    linear: type, linears_file: Files, lower: Lower
) -> None:
    rng = np.random.default_rng(0)
    three = [random_linear(linear, rng, (128, 2 * n), 32) for n in (4, 8, 6)]
    other_groups = random_linear(linear, rng, (128, 8), 64)
    source = linears_file(*three, other_groups)
    path = lower(source)
    found = operators(path)
    assert found == {
        "Reshape": 6, "ReduceMean": 2, "Sub": 4, "ReduceSum": 2, "Mul": 2, "Concat": 2,
        "DequantizeLinear": 4, "MatMul": 8, "Add": 4,
    }  # fmt: skip
    x = rng.normal(size=(1, 3, 128)).astype(np.float32)
    for want, got in zip(run(source, x), run(path, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_symmetric_linear_stays_as_it_was(linear: type, linears_file: Files, lower: Lower) -> None:
    rng = np.random.default_rng(1)
    symmetric = random_linear(linear, rng, (64, 8), 32, zeros="none")
    source = linears_file(symmetric, random_linear(linear, rng, (64, 8), 32))
    path = lower(source)
    before, after = (onnx.load(p, load_external_data=False).graph for p in (source, path))
    assert list(before.node[:2]) == list(after.node[:2])
    assert bytes_of(source)["w0"] == bytes_of(path)["w0"]

    alone = linears_file(symmetric)
    lowered = onnx.load(lower(alone), load_external_data=False).graph
    assert list(onnx.load(alone, load_external_data=False).graph.node) == list(lowered.node)


def test_weights_are_the_source_with_flipped_top_bits(linear: type, linears_file: Files, lower: Lower) -> None:
    layer = random_linear(linear, np.random.default_rng(2), (256, 34), 64)
    source = linears_file(layer)
    path = lower(source)
    flipped = bytes(byte ^ 0x88 for byte in bytes_of(source)["w0"])
    tensors = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    where = {entry.key: entry.value for entry in tensors["w0"].external_data}
    start = int(where["offset"])
    assert (path.parent / where["location"]).read_bytes()[start : start + int(where["length"])] == flipped
    assert tensors["w0"].data_type == onnx.TensorProto.INT4
    assert "w0_zero_point" not in tensors
    np.testing.assert_array_equal(ir.load(path).graph.initializers["w0"].const_value.numpy().astype(int),
                                  layer.values.astype(int) - 8)  # fmt: skip
    assert bytes_of(source)["w0_scale"] == bytes_of(path)["w0_scale"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_result_is_valid_onnx_with_the_same_interface(
    linear: type, linears_file: Files, lower: Lower, dtype: type
) -> None:
    rng = np.random.default_rng(3)
    source = linears_file(*(random_linear(linear, rng, (96, 6), 32, dtype=dtype) for _ in range(2)))
    path = lower(source)
    onnx.checker.check_model(str(path), full_check=True)
    before, after = (onnx.load(p, load_external_data=False).graph for p in (source, path))
    assert (list(before.input), list(before.output)) == (list(after.input), list(after.output))
    assert all(len(node.input) == 2 for node in after.node if node.op_type == "DequantizeLinear")
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_no_allocation_comes_near_a_weight(linear: type, linears_file: Files, lower: Lower) -> None:
    rng = np.random.default_rng(4)
    rows, columns, group = 8192, 8192, 128
    scales = np.full((rows // group, columns), 0.01, np.float16)
    layer = linear(np.zeros((rows, columns), np.uint8), scales, rng.integers(0, 16, scales.shape, np.uint8))
    source = linears_file(layer)
    weight = rows * columns // 2  # 32 MiB
    tracemalloc.start()
    try:
        path = lower(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.with_name("model.onnx.data").stat().st_size > weight
    assert peak < weight / 2


def test_a_flipped_tensor_reads_like_any_other() -> None:
    packed = np.arange(16, dtype=np.uint8) * 17
    source = ir.PackedTensor(packed, ir.DataType.UINT4, shape=ir.Shape([4, 8]), name="w")
    flipped = FlippedNibbles(source)
    assert (flipped.name, flipped.dtype, flipped.shape) == ("w", ir.DataType.INT4, (4, 8))
    np.testing.assert_array_equal(flipped.numpy().astype(int), source.numpy().astype(int) - 8)


def test_group_sums_do_not_overflow() -> None:
    packed = np.full((4096, 2), 0xFF, np.uint8)
    assert group_sums(packed, 4096).tolist() == [[15 * 4096] * 4]
    packed[:2048] = 0x21
    assert group_sums(packed, 2048).tolist() == [[2048, 4096] * 2, [15 * 2048] * 4]


def test_scales_too_large_for_the_sums_are_refused_by_name(linear: type, linears_file: Files, lower: Lower) -> None:
    values = np.full((128, 4), 15, np.uint8)
    source = linears_file(linear(values, np.full((1, 4), 60, np.float16), np.zeros((1, 4), np.uint8)))
    with pytest.raises(BundleError, match=r"weight 'w0': its scales, up to 60, are too large .* groups of 128"):
        lower(source)


def drop_block(node: onnx.NodeProto) -> None:
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("axis", 0))
    node.attribute.append(onnx.helper.make_attribute("block_size", 8))


def swap_inputs(node: onnx.NodeProto) -> None:
    if node.op_type == "MatMul":
        node.input[:] = reversed(node.input)


@pytest.mark.parametrize(
    ("index", "change", "problem"),
    [
        (0, drop_block, "want blocks on axis 0 of a multiple of 16 rows that divides 64, got blocks of 8"),
        (1, swap_inputs, "want the second input of a MatMul whose first has a known rank, got input 0 of MatMul"),
    ],
)
def test_what_the_rule_does_not_cover_is_refused_by_name(
    linear: type, linears_file: Files, lower: Lower, index: int, change: Callable[[Any], None], problem: str
) -> None:
    source = linears_file(random_linear(linear, np.random.default_rng(5), (64, 64), 32))
    model = onnx.load(source, load_external_data=False)
    change(model.graph.node[index])
    onnx.save(model, source)
    with pytest.raises(BundleError) as caught:
        lower(source)
    assert f"weight 'w0': its zero points cannot be lowered: {problem}" in str(caught.value)
    assert str(source) in str(caught.value)


def test_the_pass_alone_says_whether_it_changed_anything(linear: type, linears_file: Files) -> None:
    rng = np.random.default_rng(6)
    model = ir.load(linears_file(random_linear(linear, rng, (64, 8), 32)))
    assert LowerZeroPoints()(model).modified
    assert not LowerZeroPoints()(model).modified


def test_files_that_are_there_are_not_overwritten(linear: type, linears_file: Files) -> None:
    from llava_deploy.engines.lowering.files import lower_file

    source = linears_file(random_linear(linear, np.random.default_rng(7), (64, 8), 32))
    before = source.with_name("model.onnx.data").read_bytes()
    with pytest.raises(FileExistsError):
        lower_file(source, source.parent, [LowerZeroPoints()])
    assert source.with_name("model.onnx.data").read_bytes() == before
