"""What TensorRT for RTX makes of a decode step: its own list of kernels, and the bytes of the plan.

    python benchmarks/tensorrt_kernels.py benchmarks/results/tensorrt_kernels.json

Two decoder layers with heads of 128 and a small output layer (other sizes: ``--layers``, ``--hidden``, ``--inner``),
drawn weights, lowered by this project's passes and built for compute capability 8.9. No GPU is needed, and nothing is
timed: the builder lists what it will run. Kernels are counted in the decode profile, shape computations left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tensorrt_rtx as trt
from measuring import circumstances, save

from llava_deploy.engines.lowering.tensorrt import decoder_passes
from llava_deploy.engines.names import CacheForm
from llava_deploy.exporter.config import DecoderConfig, LlavaConfig, ProjectorConfig, RopeConfig, VisionConfig
from llava_deploy.exporter.graphs import build_graphs
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.weight import WeightFormat

MAX_LEN, USUAL, PIECE = 2048, 800, 640
STORED = {
    "fp16": None,
    "int4 symmetric": WeightFormat(4, 128, symmetric=True, permuted=False),
    "int4 asymmetric": WeightFormat(4, 128, symmetric=False, permuted=False),
}


@dataclass(frozen=True)
class Ranges:
    """What the profiles allow beside the usual."""

    rows: int
    whole: bool
    """Single tokens see the whole cache: their mask has as many slots as it."""


class Listener(trt.ILogger):
    """Keeps the lists of kernels that the builder writes into its log."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.kernels: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Take the lists and show what went wrong."""
        if message.startswith("Layers:"):
            names = (re.match(r"Name: (.+?), LayerType: ", line) for line in message.splitlines()[1:])
            self.kernels += [match[1] for match in names if match]
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            print(message, file=sys.stderr)


def drawn_decoder(layers: int, hidden: int, inner: int, weight: WeightFormat | None) -> ir.Model:
    """Layers of a Llama of these sizes, heads of 128."""
    rope, heads = RopeConfig("default", 10_000.0, None, None, None, None), hidden // 128
    decoder = DecoderConfig(
        "llama", hidden, inner, layers, heads, heads, 128, 1024, 4096, "silu", 1e-5, rope, False, False, False
    )
    vision = VisionConfig("clip_vision_model", 16, 24, 1, 1, 16, 8, 3, "gelu", 1e-5)
    projector = ProjectorConfig((16, hidden), "gelu", True)
    config = LlavaConfig("llava-hf", vision, projector, decoder, (-1,), "patch", None, None, None, "right")
    formats = {} if weight is None else dict.fromkeys(decoder_linears(config), weight)
    model = build_graphs(config, "fp16", formats).decoder
    rng = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        if value.const_value is None and value.shape is not None and value.dtype is not None:
            sizes = value.shape.numpy()
            if value.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
                packed = rng.integers(0, 256, int(np.prod(sizes)) // 2, np.uint8)
                value.const_value = ir.PackedTensor(packed, value.dtype, shape=ir.Shape(sizes), name=value.name)
            else:
                drawn = rng.standard_normal(sizes, np.float32) * np.float32(0.02)
                drawn = np.abs(drawn) + np.float32(0.001) if str(value.name).endswith("_scale") else drawn
                value.const_value = ir.tensor(drawn.astype(np.float16), name=value.name)
    return ir.from_proto(ir.to_proto(model))


def profiles(form: CacheForm, ranges: Ranges) -> list[dict[str, tuple[int, int, int]]]:
    """Least, usual and largest of each dim: for prompts, and for single tokens."""
    batch = (1, 1, ranges.rows)
    if form == "growing":
        return [
            {"batch": batch, "seq": (1, PIECE, PIECE), "past_len": (1, 1, MAX_LEN), "total": (2, PIECE + 1, 3000)},
            {"batch": batch, "seq": (1, 1, 1), "past_len": (1, USUAL, MAX_LEN), "total": (2, USUAL + 1, MAX_LEN + 1)},
        ]
    seen = (MAX_LEN, MAX_LEN, MAX_LEN) if ranges.whole else (1, USUAL, MAX_LEN)
    return [
        {"batch": batch, "seq": (1, PIECE, PIECE), "total": (1, PIECE, MAX_LEN)},
        {"batch": batch, "seq": (1, 1, 1), "total": seen},
    ]


def build(model: ir.Model, listener: Listener, wanted: list[dict[str, tuple[int, int, int]]]) -> dict[str, Any]:
    """Kernels of a decode step, and the plan's size."""
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        raise RuntimeError([parser.get_error(index).desc() for index in range(parser.num_errors)])
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for dims in wanted:
        profile = builder.create_optimization_profile()
        for value in (network.get_input(index) for index in range(network.num_inputs)):
            names = [value.get_dimension_name(axis) for axis in range(len(value.shape))]
            sizes = list(zip(value.shape, names, strict=True))
            shapes = [[dims[name][end] if size < 0 else size for size, name in sizes] for end in range(3)]
            profile.set_shape(value.name, *shapes)
        config.add_optimization_profile(profile)
    listener.kernels.clear()
    plan = builder.build_serialized_network(network, config)
    decode = [name for name in listener.kernels if re.search(r"_myl1_|profile 1", name)]
    shown = [re.sub(r"_myl1_\d+$", "", name) for name in decode if not re.match(r"__mye|cast_hvar|entry", name)]
    return {"plan_bytes": plan.nbytes, "kernels": len(shown), "of_decode": shown}


def main() -> None:
    """Build all and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    options = parser.parse_args()
    listener, found = Listener(), []
    cases: list[tuple[CacheForm, Ranges]] = [("in-place", Ranges(r, w)) for r in (2, 1) for w in (False, True)]
    for stored, weight in STORED.items():
        for form, ranges in [*cases, ("growing", Ranges(2, whole=False))]:
            model = drawn_decoder(options.layers, options.hidden, options.inner, weight)
            for each in decoder_passes(form, MAX_LEN):
                each(model)
            weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
            case = {"stored": stored, "cache": form, "rows": ranges.rows, "whole_cache": ranges.whole}
            found.append(case | {"weight_bytes": weights} | build(model, listener, profiles(form, ranges)))
            print(
                case, {key: value for key, value in found[-1].items() if key in ("plan_bytes", "kernels")}, flush=True
            )
            sizes = {"hidden": options.hidden, "inner": options.inner, "layers": options.layers, "max_len": MAX_LEN}
            made = {"tensorrt_rtx": trt.__version__, "compute_capability": "8.9", "sizes": sizes, "builds": found}
            save(options.output, circumstances() | made)


if __name__ == "__main__":
    main()
