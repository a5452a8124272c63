"""All passes for ONNX Runtime in turn: decoders and towers of every precision say what their canonical graphs say."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from llava_deploy.engines.contract import DecoderShape
from llava_deploy.engines.lowering.group_query_attention import Form
from llava_deploy.engines.lowering.onnxruntime import attention_form, decoder_passes, vision_passes
from llava_deploy.exporter.config import DecoderConfig, RopeConfig
from llava_deploy.exporter.quantization.weight import WeightFormat
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions

SLOTS = 40
PLAIN = RopeConfig("default", 10_000.0, None, None, None, None)
BASE = DecoderConfig("llama", 64, 96, 2, 4, 2, 16, 50, 128, "silu", 1e-5, PLAIN, False, False, False)
BIASES = replace(BASE, attention_bias=True, mlp_bias=True)
TIED = replace(BASE, tie_word_embeddings=True)
ODD_HEADS = replace(BASE, head_dim=24)  # which stay canonical
SYMMETRIC, ZERO_POINTS = WeightFormat(4, 32, True, False), WeightFormat(4, 32, False, False)
PERMUTED = WeightFormat(4, 32, False, True)
HEAD = WeightFormat(8, None, True, False)
CASES: dict[str, tuple[DecoderConfig, str, WeightFormat | None, WeightFormat | None]] = {
    "fp32": (BASE, "fp32", None, None),
    "fp32, biases": (BIASES, "fp32", None, None),
    "fp16": (BASE, "fp16", None, None),
    "fp16, tied": (TIED, "fp16", None, None),
    "fp16, heads of 24": (ODD_HEADS, "fp16", None, None),
    "int4, symmetric": (BASE, "int4", SYMMETRIC, None),
    "int4, zero points": (BASE, "int4", ZERO_POINTS, HEAD),
    "int4, act-order": (BASE, "int4", PERMUTED, HEAD),
    "int4, biases": (BIASES, "int4", ZERO_POINTS, ZERO_POINTS),
    "int4, tied": (TIED, "int4", SYMMETRIC, None),
    "int4, heads of 24": (ODD_HEADS, "int4", ZERO_POINTS, HEAD),
}


def largest_error(found: np.ndarray, want: np.ndarray) -> float:
    want = want.astype(np.float64)
    return float(np.abs(found.astype(np.float64) - want).max() / np.abs(want).max())


def run_steps(models: list[ir.Model], shape: DecoderShape, directory: Path, seed: int) -> float:
    """Prompts in pieces, tokens and several rows through both; the largest relative error of logits and caches."""
    options = OnnxRuntimeOptions(threads=1, accuracy_level=0)  # products of floats
    sessions = []
    for index, model in enumerate(models):
        path = directory / f"{index}.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        sessions.append(OnnxRuntimeDecoder(path, shape, SLOTS, options))
    rng, worst = np.random.default_rng(seed), 0.0
    for batch in (1, 2):
        at = 0
        for session in sessions:
            session.begin(batch)
        for seq in (random.Random(seed).randint(2, 9), 3, 1, 1):
            embeds = rng.standard_normal((batch, seq, shape.hidden_size)).astype(shape.dtype)
            last = rng.integers(0, seq, batch)
            want, found = (session.step(embeds, np.full(batch, at), last).copy() for session in sessions)
            worst = max(worst, largest_error(found, want))
            at += seq
        for want, found in zip(*(session._caches.values() for session in sessions), strict=True):
            worst = max(worst, largest_error(found.numpy(), want.numpy()))
    return worst


def lowered(model: ir.Model, passes: list[ir.passes.InPlacePass]) -> ir.Model:
    copy = ir.from_proto(ir.to_proto(model))
    for each in passes:
        each(copy)
    return ir.from_proto(ir.to_proto(copy))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_logits_and_caches_are_the_canonical_graphs(
    draw_graphs: Callable[..., Any], tmp_path: Path, case: str, seed: int
) -> None:
    config, precision, weight, head = CASES[case]
    graphs = draw_graphs(config, precision, seed, weight, head)
    engine = lowered(graphs.decoder, decoder_passes(Form.ALONE))
    bound = 1e-5 if precision == "fp32" else 1e-2  # float16 rounds to 11 bits, in the canonical graph
    assert run_steps([graphs.decoder, engine], graphs.decoder_shape, tmp_path, seed) < bound


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] != "fp32"])
def test_nothing_is_rounded_but_at_the_ends(draw_graphs: Callable[..., Any], tmp_path: Path, case: str) -> None:
    """The engine is as near to the canonical graph in float32, of the same weights, as one of float32 would be."""
    config, precision, weight, head = CASES[case]
    graphs = draw_graphs(config, precision, 3, weight, head)
    wide, *rest = decoder_passes(Form.ALONE)
    canonical = lowered(graphs.decoder, [wide])
    engine = lowered(graphs.decoder, [wide, *rest])
    assert run_steps([canonical, engine], graphs.decoder_shape, tmp_path, 3) < 1e-5


@pytest.mark.parametrize(
    ("version", "form"),
    [
        ("1.25.0", Form.BRANCH),
        ("1.31.2", Form.BRANCH),
        ("1.32.0", Form.ALONE),
        ("1.33.0.dev1", Form.ALONE),
        ("2.0", Form.ALONE),
    ],
)
def test_old_releases_get_a_branch(version: str, form: Form) -> None:
    assert attention_form(version) is form


@pytest.mark.parametrize("case", CASES)
def test_what_an_engines_decoder_is_made_of(draw_graphs: Callable[..., Any], case: str) -> None:
    config, precision, weight, head = CASES[case]
    model = lowered(draw_graphs(config, precision, 0, weight, head).decoder, decoder_passes(Form.ALONE))
    onnx.checker.check_model(ir.to_proto(model))
    top = [node.op_type for node in model.graph]
    layers, fused = config.num_hidden_layers, weight is not None and not weight.permuted
    assert top.count("SkipSimplifiedLayerNormalization") == 2 * layers - 1
    assert top.count("MatMul") == 1 + layers * (4 if fused else 7)
    assert top.count("Cast") <= 4  # lengths, and the graph's ends
    if config is ODD_HEADS:
        assert top.count("Attention") == layers
    else:
        assert top.count("GroupQueryAttention") == layers
    packed = fused and config not in (BIASES, ODD_HEADS)
    splits = {"q, k, v": 0 if packed else layers, "gate, up": layers} if fused else {}
    assert top.count("Split") == sum(splits.values())
    queries = [node.inputs[1] for node in model.graph.all_nodes() if node.op_type == "GroupQueryAttention"]
    assert [key is None for key in queries] == [packed] * (0 if config is ODD_HEADS else layers)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("seed", range(3))
def test_features_are_the_canonical_towers(
    draw_graphs: Callable[..., Any], run_model: Callable[..., Any], precision: str, seed: int
) -> None:
    weight = ZERO_POINTS if precision == "int4" else None
    graphs = draw_graphs(BASE, precision, seed, weight)
    spec = graphs.vision_shape.spec()
    (pixels,) = spec.inputs
    sizes = [size if isinstance(size, int) else 2 for size in pixels.shape]
    feed = {pixels.name: np.random.default_rng(seed).standard_normal(sizes).astype(pixels.dtype)}
    want = run_model(graphs.vision, feed)
    found = run_model(lowered(graphs.vision, vision_passes()), feed)
    assert found["image_features"].dtype == want["image_features"].dtype
    bound = 1e-6 if precision == "fp32" else 1e-2
    assert largest_error(found["image_features"], want["image_features"]) < bound
