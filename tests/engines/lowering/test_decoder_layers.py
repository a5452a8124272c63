"""Parts of a decoder, run one after the other, give the numbers of the whole, in both dialects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from llava_deploy.engines.contract import DecoderShape, GraphSpec, TensorSpec
from llava_deploy.engines.decoder_parts import layer_ranges, part_spec
from llava_deploy.engines.lowering.decoder_layers import TakeLayers
from llava_deploy.engines.lowering.tensorrt import decoder_passes
from llava_deploy.exporter.config import DecoderConfig, RopeConfig
from llava_deploy.exporter.quantization.weight import WeightFormat

SLOTS = 24
PLAIN = RopeConfig("default", 10_000.0, None, None, None, None)
LLAMA3 = RopeConfig("llama3", 500.0, 4.0, 1.0, 4.0, 32)
BASE = DecoderConfig("llama", 64, 96, 3, 4, 2, 16, 40, 64, "silu", 1e-5, PLAIN, False, False, False)
KINDS: dict[str, tuple[DecoderConfig, dict[str, Any]]] = {
    "plain": (BASE, {}),
    "one key head, tied, gelu": (
        replace(BASE, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, hidden_act="gelu"), {},
    ),
    "biases, llama3 rope": (replace(BASE, attention_bias=True, mlp_bias=True, rope=LLAMA3), {}),
    "int4, int4 head": (
        BASE, {"weight": WeightFormat(4, 32, True, False), "head": WeightFormat(4, 64, True, False)},
    ),
    "int4 asymmetric, int8 head, biases": (
        replace(BASE, attention_bias=True),
        {"weight": WeightFormat(4, 32, False, False), "head": WeightFormat(8, None, True, False)},
    ),
    "int4 act-order": (BASE, {"weight": WeightFormat(4, 16, False, True)}),
}  # fmt: skip
FORMS = ("canonical", "in-place", "growing")
Session = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def lowered(model: ir.Model, layers: range, form: str) -> ir.Model:
    """A part of a copy, in one of the dialects or as it stands."""
    model = copy(model)
    passes = [] if form == "canonical" else decoder_passes("growing" if form == "growing" else "in-place", SLOTS)
    for each in (TakeLayers(layers), *passes):
        each(model)
    return model


def spec_of(shape: DecoderShape, form: str) -> GraphSpec:
    return shape.growing_spec() if form == "growing" else shape.spec()


def in_a_row(parts: Sequence[Any]) -> Session:
    """Sessions of parts as one: each is given what it takes of the feed and of what those before it gave."""

    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = dict(feed)
        for part in parts:
            names = [output.name for output in part.get_outputs()]
            found = part.run(names, {each.name: known[each.name] for each in part.get_inputs()})
            known |= dict(zip(names, found, strict=True))
        return {name: value for name, value in known.items() if name == "logits" or name.startswith("present.")}

    return run


def step(spec: GraphSpec, dtype: str, *, batch: int, seq: int, past: int, seed: int) -> dict[str, np.ndarray]:
    """A feed for ``seq`` new tokens after ``past`` others; rows of an in-place cache write at different slots."""
    rng = np.random.default_rng(seed)
    write = past - np.arange(batch)
    sizes = {"batch": batch, "seq": seq, "total": past + seq, "past_len": past, "max_len": SLOTS}
    mask = np.arange(past + seq) <= (write[:, None] + np.arange(seq))[:, None, :, None]
    feed = {
        "position_ids": write[:, None] + np.arange(seq),
        "write_indices": write,
        "attention_mask": mask,
        "last_index": rng.integers(0, seq, batch),
    }
    for each in spec.inputs:
        if each.name not in feed:
            shape = [sizes[size] if isinstance(size, str) else size for size in each.shape]
            feed[each.name] = rng.standard_normal(shape).astype(dtype)
    return {each.name: feed[each.name] for each in spec.inputs}


def largest_difference(graphs: Any, session_of: Any, form: str, splits: Sequence[tuple[int, ...]]) -> float:
    """Between parts in a row and the whole, over logits and caches, relative to the largest value."""
    shape, worst = graphs.decoder_shape, 0.0
    whole = in_a_row([session_of(lowered(graphs.decoder, range(3), form))])
    for parts in splits:
        row = in_a_row([session_of(lowered(graphs.decoder, layers, form)) for layers in layer_ranges(parts)])
        for batch, seq, past in ((1, 5, 6), (3, 1, 9)):
            feed = step(spec_of(shape, form), shape.dtype, batch=batch, seq=seq, past=past, seed=seq)
            want, found = whole(feed), row(feed)
            assert found.keys() == want.keys()
            for name, value in want.items():
                difference = np.abs(found[name].astype(np.float64) - value.astype(np.float64)).max()
                worst = max(worst, float(difference / np.abs(value.astype(np.float64)).max()))
    return worst


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_in_a_row_are_the_whole(draw_graphs: Any, session_of: Any, kind: str, form: str) -> None:
    config, weights = KINDS[kind]
    graphs = draw_graphs(config, "fp32", 1, **weights)
    assert largest_difference(graphs, session_of, form, [(1, 2), (2, 1), (1, 1, 1)]) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "int4 asymmetric, int8 head, biases"])
def test_in_halves_too(draw_graphs: Any, session_of: Any, kind: str, form: str) -> None:
    """ONNX Runtime computes them in float32 on a CPU, and rounds a value that leaves a part: 2^-11 a boundary."""
    config, weights = KINDS[kind]
    graphs = draw_graphs(config, "fp16", 1, **weights)
    assert largest_difference(graphs, session_of, form, [(1, 1, 1)]) <= 5e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_are_the_contracts_and_weights_are_in_one_part(
    draw_graphs: Any, kind: str, form: str
) -> None:
    config, weights = KINDS[kind]
    graphs = draw_graphs(config, "fp16", 1, **weights)
    shape, matrices = graphs.decoder_shape, []
    for layers in layer_ranges((1, 1, 1)):
        model = lowered(graphs.decoder, layers, form)
        spec = part_spec(spec_of(shape, form), shape, layers)
        for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
            assert [described(value) for value in values] == [stated(tensor, form) for tensor in tensors]
        assert all(value.uses() for value in model.graph.inputs)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        names = [name for name in model.graph.initializers if name.endswith(("proj.weight", "lm_head.weight"))]
        assert len(names) == 7 + (layers.stop == 3 and not config.tie_word_embeddings)
        matrices += names
    assert len({*matrices}) == len(matrices)


def described(value: ir.Value) -> tuple[str, Any, list[str]]:
    return str(value.name), value.dtype, [str(dim) for dim in value.shape or ()]


def stated(tensor: TensorSpec, form: str) -> tuple[str, Any, list[str]]:
    sizes = [str(SLOTS if dim == "max_len" and form == "in-place" else dim) for dim in tensor.shape]
    return tensor.name, ir.DataType.from_numpy(np.dtype(tensor.dtype)), sizes


def test_all_layers_are_the_decoder_itself(draw_graphs: Any) -> None:
    model = draw_graphs(BASE, "fp32").decoder
    before = ir.to_proto(model).SerializeToString()
    assert not TakeLayers(range(3))(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def without_names(graph: ir.Graph) -> None:
    for node in graph:
        for value in node.outputs:
            value.name = str(value.name).replace("hidden_states.", "x.")


def without_embeddings(graph: ir.Graph) -> None:
    graph.inputs[0].name = "x"


def past_a_boundary(graph: ir.Graph) -> None:
    """The second layer adds what came into the first one."""
    node = next(node for node in graph if node.outputs[0].name == "hidden_states.2")
    node.replace_input_with(0, graph.inputs[0])


@pytest.mark.parametrize(
    ("layers", "change", "kind", "problem"),
    [
        (range(2, 4), lambda _: None, ir.passes.PreconditionError, "want layers 2 to 3 of a decoder, found 3 layers"),
        (range(1, 1), lambda _: None, ir.passes.PreconditionError, "want layers 1 to 0"),
        (range(1), without_names, ir.passes.PreconditionError, r"want a value 'hidden_states\.1' to cut at"),
        (range(1), without_embeddings, ir.passes.PreconditionError, "want a decoder with an input inputs_embeds"),
        (range(1, 2), past_a_boundary, ir.passes.PostconditionError, r"hidden states .* found .*'inputs_embeds'"),
    ],
)
def test_another_graph_is_refused(
    draw_graphs: Any, layers: range, change: Callable[[ir.Graph], None], kind: type[Exception], problem: str
) -> None:
    model = draw_graphs(BASE, "fp32").decoder
    change(model.graph)
    with pytest.raises(kind, match=problem):
        TakeLayers(layers)(model)
