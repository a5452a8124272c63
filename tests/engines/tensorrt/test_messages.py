"""Which of TensorRT's warnings mean that an engine would compute something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_rtx

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.tensorrt.messages import Messages, make_logger, one_line
from llava_deploy.engines.tensorrt.network import module_path

NO_GPU = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 "
    "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("Unused Input: nonpad_kv_seqlen", "an input is not used"),
        ("ONNX parser: attribute 'softmax_precision' of node 7 will be ignored", "something is ignored"),
        ('TensorRT currently ignores the "seed" field in RandomUniform or RandomNormal op.', "something is ignored"),
        ("TopK (TOPK) doesn't support INT64 for inputs, will cast to INT32.", "a value changes its type"),
        ("Tensor x is being converted to INT32.", "a value changes its type"),
        ("One or more weights outside the range of FLOAT was clamped", "a value changes"),
        ("Attention scale is out of range. Clamping to: 0.125", "a value changes"),
        ("Weights w had the following issues when converted to FP16: - Subnormal values", "a value changes"),
        ("Profile kMAX values are not self-consistent. a.Add_6: 129 != 256.", "a profile contradicts itself"),
        ("Running layernorm after self-attention in FP16 may affect accuracy", "the numbers suffer"),
    ],
)
def test_a_warning_that_means_another_result(text: str, meaning: str) -> None:
    messages = Messages()
    messages.warning(text)
    assert messages.losses == [(meaning, text)]
    with pytest.raises(BackendError, match=rf"decoder\.onnx: .*than the graph says, {meaning}: ") as raised:
        messages.require_no_loss(Path("lowered/decoder.onnx"))
    assert text in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "ModelImporter.cpp:1071: Make sure input position_ids has Int64 binding.",
        "The logger passed into createInferBuilder differs from one already provided for an existing builder, runtime",
        "Skipping tactic 0x12 due to insufficient memory on requested size of 8589934592, ignoring tactic",
        "CUDA lazy loading is not enabled. Enabling it can significantly reduce device memory usage.",
    ],
)
def test_what_is_of_no_meaning_is_not_passed_on(text: str) -> None:
    messages = Messages()
    messages.warning(text)
    assert messages == Messages()


def test_the_rest_is_passed_on() -> None:
    messages = Messages()
    for _ in range(2):
        messages.warning("Detected  that the driver\n is slow")
    assert messages.warnings == ["Detected that the driver is slow"]
    messages.require_no_loss(Path("decoder.onnx"))


def test_the_first_error_is_the_cause_and_a_missing_gpu_is_none() -> None:
    messages = Messages()
    assert messages.cause() == "it does not say why"
    for text in (NO_GPU, f"no tactics {NO_GPU}", "then this"):
        messages.error(text)
    assert messages.cause() == "no tactics"
    assert len(one_line("x" * 1000)) < 500


def test_a_logger_tells_errors_and_warnings_apart() -> None:
    messages = Messages()
    logger = make_logger(tensorrt_rtx, messages)
    for level in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        logger.log(getattr(tensorrt_rtx.ILogger, level), level)
    assert (messages.errors, messages.warnings, messages.losses) == (["INTERNAL_ERROR", "ERROR"], ["WARNING"], [])


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("language_model/layers.0/mlp/up_proj/MatMul_node_3", "language_model.layers.0.mlp.up_proj"),
        ("language_model.layers.0.mlp.weight.lowered.MatMul_1", "language_model.layers.0.mlp.weight.lowered"),
        ("MatMul_3", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_a_nodes_name_says_which_module_it_is_of(node: str, module: str) -> None:
    assert module_path(node) == module
