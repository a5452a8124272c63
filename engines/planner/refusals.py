"""Why a backend cannot be had on a board, in a few words.

Sources beside those of what is called here: the headers in the library of CUDA's provider, of the wheels of
onnxruntime-gpu 1.31.1 on PyPI. That for Linux on x86-64 holds machine code for sm75, 80, 86, 89, 90 and 120, and 1.26
(for CUDA 12) what sm60 and later can compile. That for Linux on arm64, which there is since 1.29, holds machine code
for sm89, 90, 120 and 121, and nothing that another GPU could compile: it serves DGX Spark, and no Jetson.
"""

from __future__ import annotations

from typing import Literal

from llava_deploy.engines.names import Backend
from llava_deploy.engines.onnxruntime_cuda import HEAD_DIM
from llava_deploy.engines.planner.boards import Board
from llava_deploy.engines.planner.model import PlannedModel
from llava_deploy.engines.tensorrt_module import rtx_runs_on

BackendStage = Literal["build", "run"]

_JETSONS = frozenset({"sm53", "sm62", "sm72", "sm87", "sm101", "sm110"})
"""Compute capabilities that no other machines have."""

_LEAST_OF_CUDA = 60


def refusal(stage: BackendStage, backend: Backend, model: PlannedModel, board: Board) -> str:
    """Why a stage cannot be had; empty where it can.

    An engine of onnxruntime-cuda is built without a GPU, and so on any board.
    """
    if backend == "onnxruntime":
        return ""
    if backend == "onnxruntime-cuda":
        return _of_bundle(model) or ("" if stage == "build" else _of_cuda(board))
    if board.capability is None:
        return "no NVIDIA GPU"
    if backend == "tensorrt-rtx" and not rtx_runs_on(board.capability):
        return f"TensorRT for RTX 1.7 does not run on {board.capability}"
    return ""


def _of_bundle(model: PlannedModel) -> str:
    if not (model.decoder.dtype == model.vision.dtype == "float16"):
        return f"wants float16, which --precision fp16, int4 and int4-awq have; this is {model.precision}"
    if model.decoder.head_dim % HEAD_DIM:
        return f"wants heads of a multiple of {HEAD_DIM}; these have {model.decoder.head_dim}"
    return ""


def _of_cuda(board: Board) -> str:
    if board.capability is None:
        return "no NVIDIA GPU"
    if board.capability in _JETSONS:
        return f"no wheel of onnxruntime-gpu on PyPI is for {board.capability}"
    if int(board.capability.removeprefix("sm")) < _LEAST_OF_CUDA:
        return f"ONNX Runtime on CUDA wants sm{_LEAST_OF_CUDA} or later, found {board.capability}"
    return ""
