"""TensorRT's parser takes the graphs of both forms whole, makes no plugin of anything, and has nothing to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
import tensorrt_rtx

from llava_deploy.engines.lowering.tensorrt import decoder_passes, vision_passes
from llava_deploy.engines.tensorrt.constructs import parse_release
from llava_deploy.exporter.config import DecoderConfig, RopeConfig
from llava_deploy.exporter.quantization.weight import WeightFormat

PLAIN = RopeConfig("default", 10_000.0, None, None, None, None)
SMALL = DecoderConfig("llama", 32, 64, 2, 4, 2, 8, 20, 64, "silu", 1e-5, PLAIN, False, False, False)
WEIGHTS: dict[str, dict[str, Any]] = {
    "floats": {},
    "int4 asymmetric, int8 head": {
        "weight": WeightFormat(4, 32, False, False),
        "head": WeightFormat(8, None, True, False),
    },
    "int4 act-order, int4 head": {"weight": WeightFormat(4, 16, False, True), "head": WeightFormat(4, 32, True, False)},
}
HARMLESS = "Int64 binding"


class Log(tensorrt_rtx.ILogger):
    """Everything but information."""

    def __init__(self) -> None:
        tensorrt_rtx.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity not in (tensorrt_rtx.ILogger.INFO, tensorrt_rtx.ILogger.VERBOSE):
            self.lines.append(message)


@pytest.fixture(scope="module")
def parse() -> Callable[[ir.Model], Counter[str]]:
    """Layers of the network by type; anything that the parser says is an error."""
    builder = tensorrt_rtx.Builder(Log())
    flag = 1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def run(model: ir.Model) -> Counter[str]:
        log, network = Log(), builder.create_network(flag)
        parser = tensorrt_rtx.OnnxParser(network, log)
        parsed = parser.parse(ir.to_proto(model).SerializeToString())
        assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
        assert [line for line in log.lines if HARMLESS not in line] == []
        return Counter(network.get_layer(index).type.name for index in range(network.num_layers))

    return run


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["in-place", "growing"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_decoders(draw_graphs: Any, parse: Any, kind: str, form: Any, precision: str) -> None:
    config = replace(SMALL, attention_bias=kind != "floats")
    model = draw_graphs(config, precision, 1, **WEIGHTS[kind]).decoder
    for each in decoder_passes(form, 48):
        each(model)
    layers = parse(model)
    assert layers["KV_CACHE_UPDATE"] == (4 if form == "in-place" else 0)
    assert layers["ATTENTION_INPUT"] == (2 if form == "in-place" else 0)
    assert layers["SOFTMAX"] == (0 if form == "in-place" else 2)
    assert layers["DEQUANTIZE"] == (0 if kind == "floats" else 7 * 2 + 1)
    assert not {name for name in layers if "PLUGIN" in name}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("release", ["10.3", "10.15"])
def test_towers(draw_graphs: Any, parse: Any, release: str, precision: str) -> None:
    model = draw_graphs(SMALL, precision, 1).vision
    for each in vision_passes(parse_release(release)):
        each(model)
    layers = parse(model)
    assert (layers["SOFTMAX"], layers["ATTENTION_INPUT"]) == ((2, 0) if release == "10.3" else (0, 2))


def test_something_that_it_does_not_take_is_seen(draw_graphs: Any, parse: Any) -> None:
    model = draw_graphs(SMALL, "fp16", 1).decoder  # the cache's length is not known
    with pytest.raises(AssertionError, match="TensorScatter"):
        parse(model)
