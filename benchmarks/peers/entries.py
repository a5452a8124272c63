"""What is compared: every peer and every form of ours, in the order of a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clock import Mode

Family = Literal["fp32", "bf16", "int4"]

CHECKPOINT, TEXT, GGUF, TOWER = "smol-llava", "smol-text", "smol-q4_0.gguf", "smol-mmproj-f16.gguf"


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        script: of this directory, without ``run_`` and ``.py``.
        environment: name of its virtual environment; ``None``: the one that the comparison runs in.
        model: file or directory among the models.
        family: what is compared with what.
        bits: of a weight of the decoder's layers and of its output layer, scales included; ``None`` where the process
            itself says how many bytes there are.
        options: of its script.
        files: other models that it reads, for its size on disk.
    """

    name: str
    label: str
    script: str
    environment: str | None
    model: str
    mode: Mode
    family: Family
    bits: tuple[float, float] | None
    options: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """Name of the entry whose tokens it should choose."""
        return f"transformers-fp32-{self.mode}"


@dataclass(frozen=True)
class Ours:
    """A bundle of ours: what ``llava-deploy export`` and ``llava-deploy build`` are given."""

    name: str
    label: str
    family: Family
    export: tuple[str, ...]
    build: tuple[str, ...]


# The one place that says how our bundles are made. 576 inputs are no multiple of 128, the default group.
INT4 = ("--precision", "int4", "--group-size", "32", "--lm-head", "int8")
SMALLEST = ("--precision", "int4", "--group-size", "64", "--lm-head", "int4")
INT8 = ("--int8", "vision", "--int8", "prefill")
OURS = (
    Ours("ours-fp32", "llava-deploy fp32", "fp32", ("--precision", "fp32"), ()),
    Ours("ours-int4", "llava-deploy int4", "int4", INT4, ()),
    Ours("ours-int4-int8", "llava-deploy int4, --int8 vision, prefill", "int4", INT4, INT8),
    Ours("ours-int4-g64", "llava-deploy int4, groups of 64, output layer in int4, --int8 vision", "int4", SMALLEST,
         ("--int8", "vision")),
    Ours("ours-int4-g64-int8", "llava-deploy int4, groups of 64, output layer in int4, --int8 vision, prefill", "int4",
         SMALLEST, INT8),
)  # fmt: skip

FP32, BF16 = (32.0, 32.0), (16.0, 16.0)
Q4_0 = (4.5, 8.5)  # 32 weights and a float16; SmolLM2's width makes llama.cpp take Q8_0 for the output layer
OPENVINO_INT4 = (4.5, 8.0)
ORT_INT4 = (5.0, 5.0)  # 32 weights and a float32

PEERS = (
    Entry("transformers-fp32-vlm", "transformers fp32", "transformers", "hf", CHECKPOINT, "vlm", "fp32", FP32,
          ("dtype=float32",)),
    Entry("transformers-bf16-vlm", "transformers bf16", "transformers", "hf", CHECKPOINT, "vlm", "bf16", BF16,
          ("dtype=bfloat16",)),
    Entry("transformers-fp32-text", "transformers fp32", "transformers", "hf", TEXT, "text", "fp32", FP32,
          ("dtype=float32",)),
    Entry("llamacpp-q4_0-vlm", "llama.cpp Q4_0", "llamacpp", "llamacpp", GGUF, "vlm", "int4", Q4_0,
          (f"tower={TOWER}",), (TOWER,)),
    Entry("llamacpp-q4_0-text", "llama.cpp Q4_0", "llamacpp", "llamacpp", GGUF, "text", "int4", Q4_0),
    Entry("openvino-int4-vlm", "OpenVINO GenAI int4", "openvino", "openvino", "openvino-int4", "vlm", "int4",
          OPENVINO_INT4),
    Entry("openvino-fp32-vlm", "OpenVINO GenAI fp32", "openvino", "openvino", "openvino-fp32", "vlm", "fp32", FP32,
          ("precision=f32", "cache=f32")),
    Entry("ortgenai-int4-text", "onnxruntime-genai int4", "ortgenai", "ortgenai", "ortgenai-int4", "text", "int4",
          ORT_INT4),
)  # fmt: skip

ENTRIES = (
    *PEERS,
    *(Entry(one.name, one.label, "ours", None, one.name, "vlm", one.family, None) for one in OURS),
)
