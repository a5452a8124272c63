"""Names that options and manifests take, and numbers that rooms share, stated once. Standard library only."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "fp16", "int4", "int4-awq"]
"""Of a bundle: fp32 and fp16 throughout, or fp16 with the decoder's weights in int4."""

Backend = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
"""What runs the graphs. ``onnxruntime`` is on the CPU, ``onnxruntime-cuda`` on an NVIDIA GPU, through CUDA's provider.
``tensorrt-rtx`` is TensorRT for RTX: the same API as TensorRT's, engines compiled for the GPU on it.
"""

CacheForm = Literal["in-place", "growing"]
"""How a decoder keeps keys and values: written into buffers of a fixed length, or each step's appended to the last's.

``growing`` is for versions of TensorRT without an operator that writes into a buffer.
"""

Conversation = Literal["vicuna_v1", "llama_2", "mistral", "plain"]
"""The built-in conversation formats, by LLaVA's names."""

QuantizationMethod = Literal["rtn", "awq", "autoawq", "tinychat", "gptq", "compressed-tensors"]
"""How weights came to be quantised: round to nearest or AWQ here, or elsewhere, in a format of that name."""

HeadPrecision = Literal["fp16", "int8", "int4"]
"""Of the output layer of a quantised decoder."""

AccuracyLevel = Literal[0, 1, 2, 3, 4]
"""What ONNX Runtime's ``MatMulNBits`` may multiply in: 0 and 1 float32, 2 float16, 3 bfloat16, 4 int8.

Where the processor has no kernel for a level it takes float32: on x86 levels 2 and 3 give the values of 1.
"""

DEFAULT_ACCURACY_LEVEL: AccuracyLevel = 4
"""Where nobody says otherwise."""

ACCURACY_LEVEL_ENTRY = "session.qdq_matmulnbits_accuracy_level"
"""ONNX Runtime's session option of it, for graphs that it fuses itself."""

PREFILL_TOKENS = 1024
"""Tokens of a prompt in one run of the decoder where nobody says otherwise: longer prompts are read in pieces, which
bounds the activations."""

LARGEST_PART = 1_750_000_000
"""Bytes of weights that a part of a TensorRT decoder has at most where nobody says how many parts there are to be.

A build has about twice that in the host's memory, and the full TensorRT as much again in the GPU's: so a 7B model in
int4 is built on a board where both have 8 GB together, at all its positions. Each part more costs a build some seconds,
and a step the launch of one more engine, so there are no more of them than that takes.
"""

Int8Part = Literal["vision", "prefill"]
"""What an ONNX Runtime engine may compute in 8-bit integers throughout: the vision tower, and the decoder's steps of
many tokens at once, prompts above all."""

INT8_FROM_TOKENS = 8
"""Tokens of one step, of all rows, from which on products of 8-bit integers are faster than those of int4 weights."""

SwapPart = Literal["projector", "decoder"]
"""What of a bundle's weights can be replaced: the projector's, or those of the decoder with its embeddings."""

FEATURES_KEPT = 16
"""Pictures whose features the runtime keeps; the one used longest ago goes first."""
