"""Names of what is checked. Standard library only: the process that runs the others imports no more."""

from __future__ import annotations

from typing import Literal

BackendUnderTest = Literal["onnxruntime", "onnxruntime-cuda", "onnxruntime-cuda-lowered", "tensorrt", "tensorrt-rtx"]
"""The product's three, and ONNX Runtime on the GPU, over the canonical and over the lowered decoder, as a yardstick."""

BUILT: tuple[BackendUnderTest, ...] = ("onnxruntime", "tensorrt", "tensorrt-rtx")
"""Those that an engine is built for."""

ShapeName = Literal["7b", "1b", "tiny"]
Weights = Literal["fp16", "int4", "int4-symmetric"]
"""Of the decoder; int4 as ``export`` makes it where nothing else is said, with zero points."""
