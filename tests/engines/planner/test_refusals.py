"""Which stages cannot be had where, and what is said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace

import pytest

from llava_deploy.engines.names import Backend
from llava_deploy.engines.planner.boards import BOARDS, find_board
from llava_deploy.engines.planner.model import PlannedModel
from llava_deploy.engines.planner.refusals import refusal

SevenB = Callable[..., PlannedModel]


@pytest.mark.parametrize("precision", ["fp16", "int4", "int4-awq"])
def test_cuda_takes_what_has_float16(seven_b: SevenB, precision: str) -> None:
    model = seven_b(precision)
    for name in ("rtx-3090", "rtx-4090", "rtx-5090", "a100-80gb", "h100", "t4", "dgx-spark"):
        assert refusal("build", "onnxruntime-cuda", model, find_board(name)) == ""
        assert refusal("run", "onnxruntime-cuda", model, find_board(name)) == ""


def test_cuda_rotates_heads_of_a_multiple_of_16(seven_b: SevenB) -> None:
    model = seven_b("fp16")
    model = replace(model, decoder=replace(model.decoder, head_dim=100))
    for stage in ("build", "run"):
        found = refusal(stage, "onnxruntime-cuda", model, find_board("rtx-4090"))
        assert found == "wants heads of a multiple of 16; these have 100"


def test_cuda_has_no_kernels_for_float32(seven_b: SevenB) -> None:
    words = "wants float16, which --precision fp16, int4 and int4-awq have; this is fp32"
    for stage in ("build", "run"):
        assert refusal(stage, "onnxruntime-cuda", seven_b("fp32"), find_board("h100")) == words  # type: ignore[arg-type]
    for backend in ("onnxruntime", "tensorrt"):
        assert refusal("run", backend, seven_b("fp32"), find_board("h100")) == ""  # type: ignore[arg-type]


def test_no_wheel_of_cuda_is_for_a_jetson(seven_b: SevenB) -> None:
    model = seven_b("int4")
    for board in BOARDS.values():
        found = refusal("run", "onnxruntime-cuda", model, board)
        is_jetson = board.title.startswith("Jetson ")
        assert found == (f"no wheel of onnxruntime-gpu on PyPI is for {board.capability}" if is_jetson else "")
        assert refusal("build", "onnxruntime-cuda", model, board) == ""


@pytest.mark.parametrize(
    ("capability", "expected"), [("sm52", "sm60 or later, found sm52"), ("sm60", ""), (None, "no")]
)
def test_cuda_wants_a_gpu_that_is_not_too_old(seven_b: SevenB, capability: str | None, expected: str) -> None:
    board = dataclasses.replace(find_board("t4"), capability=capability)
    found = refusal("run", "onnxruntime-cuda", seven_b("int4"), board)
    assert found == "" if expected == "" else expected in found
    assert refusal("build", "onnxruntime-cuda", seven_b("int4"), board) == ""


@pytest.mark.parametrize(
    ("board", "backend", "expected"),
    [
        ("h100", "tensorrt-rtx", "TensorRT for RTX 1.7 does not run on sm90"),
        ("agx-orin-64gb", "tensorrt-rtx", "TensorRT for RTX 1.7 does not run on sm87"),
        ("rtx-4090", "tensorrt-rtx", ""),
        ("a100-40gb", "tensorrt-rtx", ""),
        ("dgx-spark", "tensorrt-rtx", ""),
        ("h100", "tensorrt", ""),
        ("agx-orin-64gb", "tensorrt", ""),
        ("agx-orin-64gb", "onnxruntime", ""),
    ],
)
def test_other_backends(seven_b: SevenB, board: str, backend: Backend, expected: str) -> None:
    assert refusal("build", backend, seven_b("fp16"), find_board(board)) == expected
    assert refusal("run", backend, seven_b("fp16"), find_board(board)) == expected
