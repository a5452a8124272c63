"""Names of what is checked. Standard library only: the process that runs the others imports no more."""

from __future__ import annotations

from typing import Literal

BackendUnderTest = Literal["onnxruntime", "onnxruntime-cuda", "onnxruntime-cuda-canonical", "tensorrt", "tensorrt-rtx"]
"""The product's four; and, as a yardstick, ONNX Runtime on the GPU over the canonical graphs."""

ON_GPU: tuple[BackendUnderTest, ...] = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
"""The product's backends on a GPU, in the order in which they are checked."""

YARDSTICK: BackendUnderTest = "onnxruntime-cuda-canonical"

BUILT: tuple[BackendUnderTest, ...] = ("onnxruntime", *ON_GPU)
"""Those that an engine is built for."""

ShapeName = Literal["7b", "1b", "tiny"]
Weights = Literal["fp16", "int4", "int4-symmetric"]
"""Of the decoder; int4 as ``export`` makes it where nothing else is said, with zero points."""
