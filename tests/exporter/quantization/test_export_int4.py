"""Bundles with int4 decoders: what is stored, what it computes, and what is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest

from llava_deploy.engines.engine_manifest import read_engine_manifest
from llava_deploy.engines.errors import CheckpointError, InputError, OptionError
from llava_deploy.engines.manifest import DECODER_GRAPH, QuantizationRecipe, read_manifest
from llava_deploy.engines.names import HeadPrecision
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD
from llava_deploy.exporter.export import export
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.plan import round_to_nearest, with_head
from llava_deploy.exporter.quantization.prepare import prepare
from llava_deploy.exporter.quantization.request import QuantizeOptions, QuantizeRequest
from llava_deploy.exporter.quantization.rtn import quantize
from llava_deploy.exporter.quantization.stored import with_stored_decoder
from llava_deploy.exporter.quantization.weight import QuantizedSource, WeightFormat
from llava_deploy.exporter.verify import verify
from llava_deploy.runtime import Llava

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
VARIETIES = [
    (QuantizeOptions(32, symmetric=False, lm_head="fp16"), {}),
    (QuantizeOptions(32, symmetric=True, lm_head="int8"), {}),
    (QuantizeOptions(64, symmetric=False, lm_head="int4"), {"intermediate_size": 128, "vocab_size": 260}),
    (QuantizeOptions(32, symmetric=True, lm_head="int8"), {"tie_word_embeddings": True, "vocab_size": 260}),
    (QuantizeOptions(32, symmetric=False, lm_head="fp16"), {"tie_word_embeddings": True}),
    (QuantizeOptions(32, symmetric=False, lm_head="int8"), {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
]


def ids(value: Any) -> str:
    return value.lm_head if isinstance(value, QuantizeOptions) else "+".join(value) or "plain"


def weight_formats(checkpoint: Checkpoint) -> dict[str, WeightFormat]:
    return {name: s.format for name, s in checkpoint.tensors.items() if isinstance(s, QuantizedSource)}


def opened(make_llava: Any, **text: Any) -> Checkpoint:
    fields = {**TEXT, **text}
    tied = fields.get("tie_word_embeddings", False)
    return open_checkpoint(make_llava(text=fields, tie_word_embeddings=tied).directory)


@pytest.mark.parametrize(("options", "text"), VARIETIES, ids=ids)
def test_graphs_compute_what_the_stored_weights_stand_for(
    make_llava: Any, tmp_path: Path, options: QuantizeOptions, text: dict[str, Any]
) -> None:
    checkpoint = opened(make_llava, **text)
    manifest = export(round_to_nearest(checkpoint, options), tmp_path / "b", "int4")
    onnx.checker.check_model(str(tmp_path / "b" / DECODER_GRAPH), full_check=True)
    linears = decoder_linears(checkpoint.config)
    quantised = len(linears) + (options.lm_head != "fp16")
    want = QuantizationRecipe("rtn", options.group_size, options.symmetric, options.lm_head, quantised, 4)
    assert manifest.quantization == want
    assert manifest.decoder.dtype == "float16"

    stored = with_stored_decoder(checkpoint, tmp_path / "b").tensors
    for name in linears:
        rounded = quantize(checkpoint.tensors[name].read(), options.weight_format, name)
        np.testing.assert_array_equal(stored[name].read(), rounded.dequantized(), err_msg=name)
    if options.head_format is not None:
        head = checkpoint.tensors[LM_HEAD if LM_HEAD in checkpoint.tensors else EMBED_TOKENS]
        rounded = quantize(head.read(), options.head_format, "head")
        np.testing.assert_array_equal(stored[LM_HEAD].read(), rounded.dequantized())

    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    report = verify(checkpoint, tmp_path / "b", prompt="<s>a <image> b", picture=picture, max_new_tokens=4)
    assert report.ok, report.to_dict()


def test_same_checkpoint_same_bytes(make_llava: Any, tmp_path: Path) -> None:
    checkpoint = opened(make_llava)
    digests = []
    for name in "ab":
        export(round_to_nearest(checkpoint, VARIETIES[1][0]), tmp_path / name, "int4")
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((tmp_path / name).iterdir())])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quarter_of_the_bytes(demo_checkpoint: Path, tmp_path: Path, symmetric: bool) -> None:
    checkpoint = open_checkpoint(demo_checkpoint)
    export(round_to_nearest(checkpoint, QuantizeOptions(128, symmetric, "int4")), tmp_path / "b", "int4")
    weights = [checkpoint.tensors[name] for name in (*decoder_linears(checkpoint.config), LM_HEAD)]
    values = sum(int(np.prod(weight.shape)) for weight in weights)
    scales = values // 128 * 2 + (0 if symmetric else values // 128 // 2)
    size = (tmp_path / "b" / "decoder.onnx.data").stat().st_size
    rope = 4 * 512 * 32
    assert values // 2 + scales <= size <= values // 2 + scales + 2 * len(weights) * 4096 + rope


def test_quantised_weights_become_floats_again(demo_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = round_to_nearest(open_checkpoint(demo_checkpoint), QuantizeOptions(128, False, "fp16"))
    assert export(checkpoint, tmp_path / "b", "fp32").quantization is None
    stored = with_stored_decoder(checkpoint, tmp_path / "b").tensors
    name = decoder_linears(checkpoint.config)[3]
    np.testing.assert_array_equal(stored[name].read(), checkpoint.tensors[name].read())


def test_activations_in_8_bits_or_not(demo_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    checkpoint = round_to_nearest(open_checkpoint(demo_checkpoint), QuantizeOptions(128, False, "fp16"))
    export(checkpoint, bundle, "int4", accuracy_level=1)
    assert read_manifest(bundle).quantization.accuracy_level == 1  # type: ignore[union-attr]

    def logits(level: Any) -> tuple[np.ndarray, str]:
        llava = Llava.load(bundle, accuracy_level=level)
        llava.decoder.begin(1)
        embeds = np.load(bundle / "embed_tokens.npy")[None, 5:25]
        return llava.decoder.step(embeds, np.zeros(1, np.int64), np.array([19])).copy(), llava.backend

    exact, rough = logits(1)[0], logits(4)[0]
    np.testing.assert_array_equal(logits(None)[0], exact)
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()

    engine = build_onnxruntime(bundle, accuracy_level=4)
    assert read_engine_manifest(engine).key.accuracy_level == 4
    # The engine attends with another operator: what float16 rounds there, 8 bits round up to a step of theirs.
    for level, want, near, files in (
        (None, rough, 1e-2, "engine"),
        (4, rough, 1e-2, "engine"),
        (1, exact, 0, "built for accuracy level 4"),
    ):
        found, backend = logits(level)
        assert np.abs(found - want).max() <= near * np.abs(want).max()
        assert files in backend
        assert np.abs(found - exact).max() > 1e-3 * np.abs(exact).max() or level == 1
    assert read_engine_manifest(build_onnxruntime(bundle)).key.accuracy_level == 1
    assert np.abs(logits(None)[0] - exact).max() < 1e-3 * np.abs(exact).max()


def test_no_accuracy_level_without_quantised_weights(demo_bundle: Path) -> None:
    for call in (Llava.load, build_onnxruntime):
        with pytest.raises(OptionError, match="accuracy_level: want a bundle of int4 weights, found one in fp32"):
            call(demo_bundle, accuracy_level=4)


NOTHING = QuantizeRequest(None, symmetric=False, lm_head=None, calibration=None, device=None)


@pytest.mark.parametrize(
    ("precision", "request_", "message"),
    [
        ("fp16", replace(NOTHING, group_size=64), "--group-size: of use with --precision int4 or int4-awq only"),
        ("fp32", replace(NOTHING, symmetric=True, lm_head="int8"), "--symmetric, --lm-head: of use"),
        ("int4", replace(NOTHING, calibration="x.jsonl"), "--calibration: of use with --precision int4-awq only"),
        ("int4", replace(NOTHING, group_size=48), "group_size: want one of 32, 64, 128, got 48"),
        ("int4", replace(NOTHING, group_size=128), r"q_proj\.weight.*64 input features .* groups of 128"),
    ],
)
def test_requests_that_cannot_be_met(make_llava: Any, precision: Any, request_: QuantizeRequest, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(opened(make_llava), precision, request_, Path("unused"))


def test_not_quantised_twice(make_llava: Any) -> None:
    rounded = round_to_nearest(opened(make_llava), VARIETIES[0][0])
    assert prepare(rounded, "int4", NOTHING, Path("unused")) is rounded
    with pytest.raises(InputError, match=r"--group-size, --symmetric: .* quantised already"):
        prepare(rounded, "int4", replace(NOTHING, group_size=32), Path("unused"))
    with pytest.raises(CheckpointError, match="quantised already, to 4 bits"):
        prepare(rounded, "int4-awq", NOTHING, Path("unused"))


def test_the_output_layer_of_a_quantised_checkpoint(make_llava: Any) -> None:
    checkpoint = opened(make_llava, vocab_size=260)
    dense = round_to_nearest(checkpoint, QuantizeOptions(32, symmetric=False, lm_head="fp16"))
    for lm_head, want in (
        (replace(NOTHING, lm_head="int8"), WeightFormat(8, None, symmetric=True, permuted=False)),
        (replace(NOTHING, lm_head="int4", group_size=64), WeightFormat(4, 64, symmetric=False, permuted=False)),
    ):
        found = prepare(dense, "int4", lm_head, Path("unused"))
        assert weight_formats(found) == {**weight_formats(dense), LM_HEAD: want}
    rounded = round_to_nearest(checkpoint, QuantizeOptions(32, symmetric=False, lm_head="int4"))
    for precision in get_args(HeadPrecision):
        with pytest.raises(InputError, match=r"--lm-head: the output layer of .* is quantised already and stays"):
            prepare(rounded, "int4", replace(NOTHING, lm_head=precision), Path("unused"))


def test_only_the_output_layer(make_llava: Any, tmp_path: Path) -> None:
    checkpoint = with_head(opened(make_llava), WeightFormat(8, None, symmetric=True, permuted=False))
    recipe = export(checkpoint, tmp_path / "b", "int4").quantization
    assert recipe == QuantizationRecipe("rtn", None, symmetric=True, lm_head="int8", weights=1, accuracy_level=4)


def test_int4_of_floats_is_not_made_up(make_llava: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of its decoder's weights is quantised"):
        export(opened(make_llava), tmp_path / "b", "int4")


def test_a_scale_that_float16_cannot_hold(make_llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = round_to_nearest(opened(make_llava), VARIETIES[0][0])
    name = decoder_linears(checkpoint.config)[2]
    weight = checkpoint.tensors[name].read_quantized()  # type: ignore[attr-defined]
    scales = weight.scales.astype(np.float32)
    scales[1, 3] = 1e-9
    monkeypatch.setattr(type(checkpoint.tensors[name]), "read_quantized", lambda _: replace(weight, scales=scales))
    with pytest.raises(CheckpointError, match=r"as float16: 1 of \d+ scales are zero, the first in group 1, output 3"):
        export(checkpoint, tmp_path / "b", "int4")
    assert not (tmp_path / "b").exists()


def test_formats_are_the_classes_own() -> None:
    assert QuantizeOptions(64, True, "int8").head_format == WeightFormat(8, None, symmetric=True, permuted=False)


@pytest.mark.parametrize("level", [True, 4.0, "4", 5, -1])
def test_what_is_no_accuracy_level(make_llava: Any, tmp_path: Path, level: Any) -> None:
    export(round_to_nearest(opened(make_llava), VARIETIES[0][0]), tmp_path / "b", "int4")
    with pytest.raises(OptionError, match=f"accuracy_level: want 0 to 4, got {level!r}"):
        Llava.load(tmp_path / "b", accuracy_level=level)


def test_verify_with_another_models_checkpoint(make_llava: Any, tmp_path: Path) -> None:
    export(round_to_nearest(opened(make_llava), VARIETIES[0][0]), tmp_path / "b", "int4")
    other = open_checkpoint(make_llava("other", text={**TEXT, "intermediate_size": 128}).directory)
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=r"made from another model .*gate_proj\.weight' has shape \[128, 64\]"):
        verify(other, tmp_path / "b", prompt="<s>a <image> b", picture=picture, max_new_tokens=1)


@pytest.mark.parametrize(
    ("size", "group", "said"),
    [(96, 64, "groups of 64; take groups of 32$"), (80, 32, "none of 32, 64, 128 divides them: export it .* fp16$")],
)
def test_advice_on_groups(make_llava: Any, size: int, group: int, said: str) -> None:
    checkpoint = opened(make_llava, intermediate_size=size)
    with pytest.raises(InputError, match=f"down_proj.weight': its {size} input features cannot be cut into .*{said}"):
        round_to_nearest(checkpoint, QuantizeOptions(group, symmetric=False, lm_head="fp16"))
