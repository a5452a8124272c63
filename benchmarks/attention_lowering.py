"""What GroupQueryAttention over the cache saves: the canonical decoder beside the lowered one, ONNX Runtime on the CPU.

    python benchmarks/attention_lowering.py -o benchmarks/results/attention_lowering.json

The decoder is a Llama with random weights, 8 layers of 1024, 16 heads over 4 of keys and values, and over 16 as in
LLaVA-1.5; as fp32 and as int4 (fp16 activations, groups of 32, accuracy level 4). The two forms take turns, token by
token and prompt by prompt; a time is the median over the turns and a ratio the median of the turns' ratios: compare
ratios.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
from measuring import circumstances, save

from llava_deploy.engines.contract import DecoderShape
from llava_deploy.engines.lowering.files import lower_in_memory
from llava_deploy.engines.lowering.group_query_attention import LowerGroupQueryAttention
from llava_deploy.engines.lowering.onnxruntime import attention_form
from llava_deploy.exporter.config import DecoderConfig, LlavaConfig, ProjectorConfig, RopeConfig, VisionConfig
from llava_deploy.exporter.graphs import build_graphs
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.weight import WeightFormat
from llava_deploy.runtime.generation import prefill
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions

CONTEXTS = (200, 1000, 2000)
PRECISIONS: tuple[Literal["fp32", "int4"], ...] = ("fp32", "int4")
KV_HEADS = (4, 16)
FORMS = ("canonical", "lowered")
SLOTS = 2304
ROPE = RopeConfig("default", 10_000.0, None, None, None, None)
DECODER = DecoderConfig("llama", 1024, 2816, 8, 16, 4, 64, 8192, 4096, "silu", 1e-5, ROPE, False, False, False)


def write_decoder(directory: Path, precision: Literal["fp32", "int4"], kv_heads: int) -> DecoderShape:
    """The canonical graph with random weights, and beside it the lowered one, which refers to the same file."""
    decoder = replace(DECODER, num_key_value_heads=kv_heads)
    vision = VisionConfig("clip_vision_model", 16, 16, 1, 1, 16, 8, 3, "gelu", 1e-5)
    projector = ProjectorConfig((16, DECODER.hidden_size), "gelu", True)
    config = LlavaConfig("llava-hf", vision, projector, decoder, (-1,), "patch", None, None, None, "right")
    form = WeightFormat(4, 32, symmetric=False, permuted=False)
    graphs = build_graphs(
        config, precision, dict.fromkeys(decoder_linears(config) if precision == "int4" else (), form)
    )
    rng = np.random.default_rng(0)
    for value in graphs.decoder.graph.initializers.values():
        if value.const_value is None:
            value.const_value = random_tensor(value, rng)
    canonical, lowered = (directory / f"{name}.onnx" for name in FORMS)
    ir.save(graphs.decoder, canonical, external_data="weights")
    form = attention_form(onnxruntime.__version__)
    lowered.write_bytes(lower_in_memory(canonical, [LowerGroupQueryAttention(form)]))
    return graphs.decoder_shape


def random_tensor(value: ir.Value, rng: np.random.Generator) -> ir.TensorProtocol:
    """Of a size that keeps activations where a trained model has them."""
    if value.shape is None or value.dtype is None:
        raise ValueError(f"initializer {value.name!r} has no type")
    sizes, kind = value.shape.numpy(), value.dtype
    if kind == ir.DataType.UINT4:
        packed = rng.integers(0, 256, int(np.prod(sizes)) // 2, np.uint8)
        return ir.PackedTensor(packed, kind, shape=ir.Shape(sizes), name=value.name)
    if str(value.name).endswith("_scale"):
        values = np.full(sizes, 0.005)
    elif len(sizes) == 1:
        values = np.ones(sizes)
    else:
        values = rng.standard_normal(sizes, np.float32) / np.float32(np.sqrt(sizes[-1]))
    return ir.tensor(values.astype(kind.numpy()), name=value.name)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(
    decoders: dict[str, OnnxRuntimeDecoder], shape: DecoderShape, context: int, *, tokens: int, prompts: int
) -> dict[str, Any]:
    """Prompts of ``context`` tokens, then tokens behind them, each by both forms in turn."""
    rng = np.random.default_rng(context)
    embeds = rng.standard_normal((1, context + tokens, shape.hidden_size)).astype(shape.dtype)
    length, last = np.array([context]), np.zeros(1, np.int64)
    reading: dict[str, list[float]] = {form: [] for form in FORMS}
    decoding: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(prompts + 1):
        for form, decoder in decoders.items():
            took = seconds(partial(prefill, decoder, embeds[:, :context], 0, length))
            reading[form] += [took] if turn else []  # the first runs are slower
    for at in range(context, context + tokens):
        step = embeds[:, at : at + 1]
        for form, decoder in decoders.items():
            decoding[form].append(seconds(partial(decoder.step, step, np.array([at]), last)))
    return {"prefill": summary(reading), "decode": summary(decoding)}


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    ratios = [after / before for before, after in zip(times["canonical"], times["lowered"], strict=True)]
    medians = {f"{form}_ms": round(statistics.median(times[form]) * 1e3, 3) for form in FORMS}
    return {**medians, "ratio": round(statistics.median(ratios), 3)}


def table(results: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'':32}{'canonical':>12}{'lowered':>12}{'ratio':>8}"]
    for decoder, contexts in results.items():
        for context, kinds in contexts.items():
            for kind, row in kinds.items():
                name = f"{decoder} {context:>5} {kind}"
                lines.append(f"{name:32}{row['canonical_ms']:>9} ms{row['lowered_ms']:>9} ms{row['ratio']:>8}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=100, help="decoded by each form at each context (100)")
    parser.add_argument("--prompts", type=int, default=5, help="read by each form at each context (5)")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for precision, kv_heads in itertools.product(PRECISIONS, KV_HEADS):
        with tempfile.TemporaryDirectory() as place:
            shape = write_decoder(Path(place), precision, kv_heads)
            options = OnnxRuntimeOptions(arguments.threads, 4 if precision == "int4" else None)
            paths = {form: Path(place, f"{form}.onnx") for form in FORMS}
            decoders = {form: OnnxRuntimeDecoder(path, shape, SLOTS, options) for form, path in paths.items()}
            for decoder in decoders.values():
                decoder.begin(1)
            results[f"{precision}, 16/{kv_heads} heads"] = {
                str(context): measure(decoders, shape, context, tokens=arguments.tokens, prompts=arguments.prompts)
                for context in CONTEXTS
            }
    shown = {"layers": 8, "hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64, "vocab_size": 8192}
    save(arguments.output, {**circumstances(), "decoder": shown, "threads": arguments.threads, "slots": SLOTS,
                            "tokens": arguments.tokens, "prompts": arguments.prompts, "results": results})  # fmt: skip
    print(table(results))


if __name__ == "__main__":
    main()
