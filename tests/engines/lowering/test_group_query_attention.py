"""Lowered attention says what the canonical says: random decoders, random schedules, and where it copies nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from llava_deploy.engines.contract import DecoderShape, past_name
from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.lowering.files import lower_in_memory
from llava_deploy.engines.lowering.group_query_attention import Form, LowerGroupQueryAttention
from llava_deploy.exporter.config import DecoderConfig, LlavaConfig, ProjectorConfig, RopeConfig, VisionConfig
from llava_deploy.exporter.graphs import build_graphs
from llava_deploy.runtime.backend import step_mask, step_positions
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions

SLOTS = 61
COMPUTED = (Form.ALONE, Form.BRANCH)  # whose lengths follow from the canonical inputs
OPTIONS = OnnxRuntimeOptions(threads=1, accuracy_level=None)
PLAIN = RopeConfig("default", 10_000.0, None, None, None, None)
LLAMA3 = RopeConfig("llama3", 500.0, 4.0, 1.0, 4.0, 32)
BASE = DecoderConfig("llama", 64, 96, 2, 4, 2, 16, 40, 128, "silu", 1e-5, PLAIN, False, False, False)
CASES = {
    "grouped heads": BASE,
    "a key head for every head": replace(BASE, num_key_value_heads=4),
    "one key head": replace(BASE, num_key_value_heads=1, head_dim=32),
    "heads wider than hidden": replace(BASE, num_attention_heads=6, num_key_value_heads=3, head_dim=48),
    "biases, linear rope": replace(
        BASE, attention_bias=True, mlp_bias=True, rope=replace(PLAIN, rope_type="linear", factor=2.0)
    ),
    "llama3 rope, tied": replace(BASE, rope=LLAMA3, tie_word_embeddings=True, head_dim=80),
}


@dataclass(frozen=True)
class Pair:
    """One decoder in both forms."""

    shape: DecoderShape
    canonical: Path
    lowered: Path

    def sessions(self) -> tuple[OnnxRuntimeDecoder, OnnxRuntimeDecoder]:
        return tuple(OnnxRuntimeDecoder(path, self.shape, SLOTS, OPTIONS) for path in (self.canonical, self.lowered))  # type: ignore[return-value]


def decoder_model(config: DecoderConfig, dtype: Any, seed: int) -> tuple[ir.Model, DecoderShape]:
    """The canonical graph with random weights."""
    vision = VisionConfig("clip_vision_model", 16, 16, 1, 1, 16, 8, 3, "gelu", 1e-5)
    projector = ProjectorConfig((16, config.hidden_size), "gelu", True)
    whole = LlavaConfig("llava-hf", vision, projector, config, (-1,), "patch", None, None, None, "right")
    graphs = build_graphs(whole, dtype, {})
    rng = np.random.default_rng(seed)
    for value in graphs.decoder.graph.initializers.values():
        if value.const_value is None:
            assert value.shape is not None
            assert value.dtype is not None
            sizes = value.shape.numpy()
            values = rng.standard_normal(sizes) / np.sqrt(sizes[-1]) if len(sizes) > 1 else rng.uniform(0.5, 1, sizes)
            value.const_value = ir.tensor(values.astype(value.dtype.numpy()), name=value.name)
    return graphs.decoder, graphs.decoder_shape


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., Pair]:
    """Both forms of a decoder with random weights."""

    def make(config: DecoderConfig, dtype: Any = "fp32", seed: int = 0, form: Form = Form.BRANCH) -> Pair:
        model, shape = decoder_model(config, dtype, seed)
        canonical, lowered = tmp_path / "canonical.onnx", tmp_path / "lowered.onnx"
        ir.save(model, canonical, external_data="weights")
        lowered.write_bytes(lower_in_memory(canonical, [LowerGroupQueryAttention(form)]))
        return Pair(shape, canonical, lowered)

    return make


def schedules(rng: random.Random) -> Iterator[tuple[int, list[tuple[list[int], int]]]]:
    """Rows of a batch, and steps: where each row writes, and how many tokens."""
    for batch in (1, 1, 2, 3):
        steps: list[tuple[list[int], int]] = []
        at = [0] * batch
        for _ in range(rng.randint(1, 3)):  # prompts, in pieces
            seq = rng.choice([1, 2, 5, 9])
            steps.append((at, seq))
            at = [start + seq for start in at]
        at = [rng.randint(1, end) for end in at]  # rows end at different tokens, what is behind is written over
        for seq in rng.choices([1, 1, 1, 4], k=5):  # tokens; now and then a second turn
            steps.append((at, seq))
            at = [start + seq for start in at]
        yield batch, steps


def largest_error(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(found - want).max() / np.abs(want).max())


def run_both(pair: Pair, seed: int) -> float:
    """Random schedules through both; the largest relative error of a logit or of anything in the caches."""
    rng = np.random.default_rng(seed)
    sessions = pair.sessions()
    worst = 0.0
    for batch, steps in schedules(random.Random(seed)):
        for session in sessions:
            session.begin(1 if batch > 1 else 2)  # so that the next line gives fresh buffers
            session.begin(batch)
        for write, seq in steps:
            embeds = rng.standard_normal((batch, seq, pair.shape.hidden_size)).astype(pair.shape.dtype)
            last = rng.integers(0, seq, batch)
            want, found = (session.step(embeds, np.array(write), last).copy() for session in sessions)
            worst = max(worst, largest_error(found, want))
        for want, found in zip(*(session._caches.values() for session in sessions), strict=True):
            worst = max(worst, largest_error(found.numpy().astype(np.float64), want.numpy().astype(np.float64)))
    return worst


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", COMPUTED)
@pytest.mark.parametrize("seed", range(4))
def test_logits_and_caches_are_the_canonical_graphs(
    pair: Callable[..., Pair], case: str, form: Form, seed: int
) -> None:
    assert run_both(pair(CASES[case], seed=seed, form=form), seed) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", COMPUTED)
def test_float16_is_as_near(pair: Callable[..., Pair], case: str, form: Form) -> None:
    assert run_both(pair(CASES[case], "fp16", form=form), 5) < 1e-2


def test_alone_there_is_no_branch(pair: Callable[..., Pair]) -> None:
    made = pair(BASE, form=Form.ALONE)
    kinds = [node.op_type for node in ir.load(made.lowered).graph.all_nodes()]
    assert kinds.count("GroupQueryAttention") == made.shape.layers
    assert not {"If", "Attention", "TensorScatter", "RotaryEmbedding"} & {*kinds}


def test_the_errors_would_be_seen(pair: Callable[..., Pair]) -> None:
    made = pair(BASE)
    model = ir.load(made.lowered)
    (first, *_) = (node for node in model.graph.all_nodes() if node.op_type == "GroupQueryAttention")
    first.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)
    ir.save(model, made.lowered)
    assert run_both(made, 0) > 1e-2


def profile(model: Path, shape: DecoderShape, batch: int, write: int, seq: int, where: Path) -> list[dict[str, Any]]:
    """What the kernels of a step were called with, of a session that binds its caches in place."""
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling = True
    settings.profile_file_prefix = str(where)
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    starts = np.full(batch, write)
    feed = {
        "inputs_embeds": np.ones((batch, seq, shape.hidden_size), shape.dtype),
        "position_ids": step_positions(starts, seq),
        "write_indices": starts,
        "attention_mask": step_mask(starts, seq),
        "last_index": np.zeros(batch, np.int64),
    }
    caches = {
        past_name(layer, part): np.full((batch, shape.kv_heads, SLOTS, shape.head_dim), 2, shape.dtype)
        for layer in range(shape.layers)
        for part in ("key", "value")
    }
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in (feed | caches).items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
        if name in caches:
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    events = json.loads(Path(session.end_profiling()).read_text())
    for name, array in caches.items():
        # From a buffer to another the operator copies what is visible and clears the rest: that these are as they
        # were tells that it took the bound buffer for both.
        kept = np.delete(array, np.s_[write : write + seq], axis=2)
        assert (kept == 2).all(), name
        assert (array[:, :, write : write + seq] != 2).all(), name
    return [event["args"] for event in events if event["name"].endswith("_kernel_time")]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("form", COMPUTED)
def test_a_step_makes_nothing_of_the_caches_size(
    pair: Callable[..., Pair], tmp_path: Path, dtype: str, form: Form
) -> None:
    made = pair(BASE, dtype, form=form)
    write = 36  # 37 slots visible, of 61: no other axis is as long

    def cache_sized(model: Path, batch: int, seq: int) -> list[str]:
        """Operators with a result along the slots, visible or all."""
        return sorted(
            kernel["op_name"]
            for kernel in profile(model, made.shape, batch, write, seq, tmp_path / "profile")
            if any({SLOTS, write + seq} & {*sizes} for kind in kernel["output_type_shape"] for sizes in kind.values())
        )

    lowered = ["GroupQueryAttention"] * BASE.num_hidden_layers
    for batch, seq in ((1, 1), (3, 1), (1, 5), *([(2, 5)] if form is Form.ALONE else [])):
        assert [op for op in cache_sized(made.lowered, batch, seq) if op != "If"] == lowered
    assert {"Slice", "TensorScatter"} <= {*cache_sized(made.canonical, 1, 1)}
    if form is Form.BRANCH:
        assert {"Slice", "TensorScatter"} <= {*cache_sized(made.lowered, 2, 5)}


@pytest.mark.parametrize("form", COMPUTED)
def test_what_does_not_fit_the_cache_is_an_error(pair: Callable[..., Pair], form: Form) -> None:
    _, session = pair(BASE, form=form).sessions()
    for batch in (1, 2):
        session.begin(batch)
        with pytest.raises(Exception, match="ONNX Runtime failed in the decoder"):
            session.step(np.ones((batch, 1, 64), np.float32), np.full(batch, SLOTS), np.zeros(batch, np.int64))


@pytest.mark.parametrize("form", COMPUTED)
def test_names_are_kept(form: Form) -> None:
    model, shape = decoder_model(BASE, "fp32", 0)
    before = {str(value.name) for node in model.graph for value in node.outputs}
    assert LowerGroupQueryAttention(form)(model).modified
    spec = shape.spec()
    assert [value.name for value in model.graph.inputs] == [tensor.name for tensor in spec.inputs]
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        assert (value.name, value.dtype) == (tensor.name, ir.DataType.from_numpy(np.dtype(tensor.dtype)))
    after = {str(value.name) for node in model.graph for value in node.outputs}
    assert {name for name in before if name.startswith(("hidden_states.", "present.", "logits"))} <= after
    names = [str(value.name) for node in model.graph.all_nodes() for value in node.outputs]
    assert len(names) == len({*names})
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    assert not {"Slice", "TensorScatter", "Attention", "RotaryEmbedding"} & {node.op_type for node in model.graph}
    assert not LowerGroupQueryAttention(form)(model).modified


def attribute(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def another_user(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding"]:
        model.graph.insert_after(node, ir.node("Identity", inputs=[node.outputs[0]]))


def other_slots(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "TensorScatter":
            node.attributes["mode"] = ir.AttrString("mode", "circular")


def other_positions(model: ir.Model) -> None:
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    double = ir.node("Add", inputs=[positions, positions])
    model.graph.insert_before(model.graph[0], double)
    for node in model.graph:
        if node.op_type == "RotaryEmbedding":
            node.replace_input_with(3, double.outputs[0])


@pytest.mark.parametrize("change", [attribute, another_user, other_slots, other_positions])
def test_another_form_is_left_as_it_is(change: Callable[[ir.Model], None]) -> None:
    model, _ = decoder_model(BASE, "fp32", 0)
    change(model)
    assert not LowerGroupQueryAttention(Form.ALONE)(model).modified


def test_heads_that_the_operator_cannot_rotate_are_left(pair: Callable[..., Pair]) -> None:
    made = pair(replace(BASE, head_dim=24))
    assert "GroupQueryAttention" not in {node.op_type for node in ir.load(made.lowered).graph.all_nodes()}
    assert run_both(made, 0) < 1e-6


def test_the_engine_of_the_shipped_model_is_lowered(demo_bundle: Path) -> None:
    (path,) = demo_bundle.glob(f"{ENGINES}/*/decoder.onnx")
    top = [node.op_type for node in ir.load(path).graph]
    assert top.count("GroupQueryAttention") == 4
    assert not {"If", "Slice", "TensorScatter", "Attention"} & {*top}
