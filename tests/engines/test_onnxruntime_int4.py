"""ONNX Runtime takes the canonical int4 graph as it stands: each quantised linear becomes one MatMulNBits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest

from llava_deploy.engines.names import HeadPrecision
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest

LINEARS = 7 * 4  # q, k, v, o, gate, up, down of each layer
FUSED_LINEARS = 4 * 4  # of which an engine has q, k, v in one, and gate and up


def optimised(path: Path, output: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(output)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(output, load_external_data=False).graph.node)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("lm_head", get_args(HeadPrecision))
def test_every_quantised_linear_is_fused(
    demo_checkpoint: Path, tmp_path: Path, symmetric: bool, lm_head: HeadPrecision
) -> None:
    options = QuantizeOptions(group_size=64, symmetric=symmetric, lm_head=lm_head)
    export(round_to_nearest(open_checkpoint(demo_checkpoint), options), tmp_path / "bundle", "int4")
    engine = onnx.load(build_onnxruntime(tmp_path / "bundle") / "decoder.onnx", load_external_data=False)
    for linears, found in (
        (LINEARS, optimised(tmp_path / "bundle" / "decoder.onnx", tmp_path / "optimised.onnx")),
        (FUSED_LINEARS, Counter(node.op_type for node in engine.graph.node)),
    ):
        assert found["DequantizeLinear"] == 0
        assert found["MatMulNBits"] == linears + (lm_head != "fp16")
        assert found["MatMul"] == (lm_head == "fp16")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_linears_of_either_precision_are_fused(
    linear: type, linears_file: Callable[..., Path], tmp_path: Path, dtype: type, group: int, symmetric: bool
) -> None:
    rng = np.random.default_rng(0)
    zeros = None if symmetric else rng.integers(0, 16, (256 // group, 64), np.uint8)
    scales = rng.uniform(0.01, 0.02, (256 // group, 64)).astype(dtype)
    layers = [linear(rng.integers(0, 16, (256, 64), np.uint8), scales, zeros) for _ in range(3)]
    found = optimised(linears_file(*layers), tmp_path / "optimised.onnx")
    assert (found["MatMulNBits"], found["DequantizeLinear"], found["MatMul"]) == (3, 0, 0)
