"""What a swap refuses: anything in which the checkpoint's graph would be another one than the bundle's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.manifest import QuantizationRecipe, read_manifest
from llava_deploy.engines.names import Precision, QuantizationMethod, SwapPart
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import RopeConfig
from llava_deploy.exporter.export import export
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.quantization.weight import QuantizedSource, QuantizedWeight, WeightFormat
from llava_deploy.exporter.swap.parts import swapped_model
from llava_deploy.exporter.swap.swap import swap

Changes = dict[str, dict[str, Any]]
TIED: Changes = {"decoder": {"tie_word_embeddings": True}}
OTHERS: dict[str, tuple[Changes, Changes, SwapPart, str]] = {
    "projector's width": ({}, {"projector": {"sizes": (32, 48, 64)}}, "projector", r"projector.0.weight: want .*"),
    "projector's depth": ({}, {"projector": {"sizes": (32, 64)}}, "projector", r"projector.1.weight: want .* none"),
    "one more projector": ({}, {"projector": {"sizes": (32, 64, 64, 64)}}, "projector", r"projector.2.*want none"),
    "projector's bias": ({}, {"projector": {"bias": False}}, "projector", r"projector.0.bias: want .*, found none"),
    "projector's activation": (
        {}, {"projector": {"hidden_act": "gelu_pytorch_tanh"}}, "projector",
        r"approximate of Gelu of projector: want None, found tanh",
    ),
    "feature layer": ({}, {"top": {"feature_layers": (-1,)}}, "projector", r"weight vision_tower.*want none, found"),
    "class token": ({}, {"top": {"feature_select": "cls_patch"}}, "projector", "patches: want 9, found 10"),
    "tower's epsilon": (
        {}, {"vision": {"layer_norm_eps": 1e-6}}, "projector",
        r"epsilon of LayerNormalization of vision_tower.pre_layrnorm: want .*, found",
    ),
    "tower's activation": ({}, {"vision": {"hidden_act": "gelu"}}, "projector", r"quick_gelu_slope: want .* none"),
    "tower's heads": ({}, {"vision": {"num_attention_heads": 2}}, "projector", r"Reshape of vision_tower.*0, 0, 4, 8"),
    "hidden size": (
        {}, {"decoder": {"hidden_size": 96}, "projector": {"sizes": (32, 96, 96)}}, "projector",
        "hidden_size: want 64, found 96",
    ),
    "vocabulary": ({}, {"decoder": {"vocab_size": 700}}, "decoder", "vocab_size: want 640, found 700"),
    "layers": ({}, {"decoder": {"num_hidden_layers": 1}}, "decoder", "layers: want 2, found 1"),
    "positions": ({}, {"decoder": {"max_position_embeddings": 256}}, "decoder", "max_positions: want 128, found 256"),
    "heads": ({}, {"decoder": {"num_attention_heads": 8}}, "decoder", r"q_proj.weight: want .*64, 64.*found .*128, 64"),
    "MLP": ({}, {"decoder": {"intermediate_size": 128}}, "decoder", r"gate_proj.weight: want FLOAT16\[96, 64\], found"),
    "MLP's activation": ({}, {"decoder": {"hidden_act": "gelu"}}, "decoder", "want Sigmoid, found Gelu"),
    "attention's bias": ({}, {"decoder": {"attention_bias": True}}, "decoder", r"q_proj.bias: want none, found"),
    "norm's epsilon": (
        {}, {"decoder": {"rms_norm_eps": 1e-3}}, "decoder",
        r"epsilon of RMSNormalization of language_model.layers.0.input_layernorm: want 9.99.*, found 0.001",
    ),
    "rope's theta": (
        {}, {"decoder": {"rope": RopeConfig("default", 5e5, None, None, None, None)}}, "decoder",
        r"constant language_model.cos: want FLOAT16\[128, 8\] of 1.0",
    ),
    "rope's scale": (
        {}, {"decoder": {"rope": RopeConfig("linear", 1e4, 2.0, None, None, None)}}, "decoder", "constant language",
    ),
    "tied": ({}, TIED, "decoder", r"weight .*embed_tokens.weight: want none, found"),
    "not tied any more": (TIED, {}, "decoder", r"weight lm_head.weight: want none, found FLOAT16\[640, 64\]"),
}  # fmt: skip


def bundle_of(checkpoint: Checkpoint, output: Path, precision: Precision = "fp16") -> Path:
    export(checkpoint, output, precision)
    return output


def refused(checkpoint: Checkpoint, bundle: Path, part: SwapPart, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        swapped_model(checkpoint, bundle, read_manifest(bundle), part)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def plain_and_tied(drawn: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    return bundle_of(drawn(0), place / "plain"), bundle_of(drawn(0, TIED), place / "tied")


@pytest.mark.parametrize("what", OTHERS)
def test_another_model(drawn: Any, plain_and_tied: tuple[Path, Path], what: str) -> None:
    changes, others, part, match = OTHERS[what]
    bundle = plain_and_tied[changes is TIED]
    refused(drawn(1, others), bundle, part, f"another model than .*{match}")
    swapped_model(drawn(1, changes), bundle, read_manifest(bundle), part)


@pytest.fixture
def other_tokens(drawn: Any) -> Callable[[Callable[[Any], None]], Checkpoint]:
    def edited(change: Callable[[Any], None]) -> Checkpoint:
        checkpoint: Checkpoint = drawn(1)
        tokenizer = json.loads(checkpoint.tokenizer_json)
        change(tokenizer)
        return dataclasses.replace(checkpoint, tokenizer_json=json.dumps(tokenizer).encode())

    return edited


def test_other_tokens_of_as_many(drawn: Any, other_tokens: Any, tmp_path: Path) -> None:
    def exchange(tokenizer: Any) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        one, two = sorted(vocabulary, key=vocabulary.get)[10:12]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]

    bundle = bundle_of(drawn(), tmp_path / "bundle")
    refused(other_tokens(exchange), bundle, "decoder", "has other tokens than .*bundle: want .* for 10, found ")
    swapped_model(other_tokens(exchange), bundle, read_manifest(bundle), "projector")  # which no token is given to


def test_the_same_tokens_written_otherwise(drawn: Any, other_tokens: Any, tmp_path: Path) -> None:
    checkpoint = other_tokens(lambda tokenizer: tokenizer.update(truncation=None, padding=None))
    bundle = bundle_of(drawn(), tmp_path / "bundle")
    model = swapped_model(checkpoint, bundle, read_manifest(bundle), "decoder")
    assert model.checkpoint.tokenizer_json == (bundle / "tokenizer.json").read_bytes()


def test_what_stays_out_is_said(drawn: Any, tmp_path: Path) -> None:
    bundle, other = bundle_of(drawn(), tmp_path / "bundle"), drawn(1)
    manifest = read_manifest(bundle)
    chat = dataclasses.replace(other.chat, stop_strings=("###",))
    image = dataclasses.replace(other.image, pad_to_square=not other.image.pad_to_square)
    other = dataclasses.replace(other, chat=chat, image=image)
    tower, pictures = swapped_model(other, bundle, manifest, "projector").notes
    projector, prompts = swapped_model(other, bundle, manifest, "decoder").notes
    assert "its vision tower has other weights" in tower
    assert "prepares pictures in another way" in pictures
    assert "swap it too, --part projector" in projector
    assert "makes prompts in another way" in prompts


GPTQ = WeightFormat(4, 32, symmetric=False, permuted=True)


@dataclass(frozen=True)
class Packed(QuantizedSource):
    """A weight that came in int4, its input features in another order."""

    name: str
    shape: tuple[int, ...]
    seed: int
    format: WeightFormat = GPTQ
    method: ClassVar[QuantizationMethod] = "gptq"
    files: tuple[Path, ...] = ()
    nbytes: int = 1

    @property
    def key(self) -> str:  # type: ignore[override]
        return self.name

    @property
    def origin(self) -> str:
        return self.name

    def read_quantized(self) -> QuantizedWeight:
        rng, (columns, rows) = np.random.default_rng([self.seed, *self.name.encode()]), self.shape
        data = rng.integers(0, 256, (rows, columns // 2), np.uint8)
        scales = rng.uniform(0.01, 0.04, (rows // 32, columns)).astype(np.float16)
        zeros = rng.integers(0, 256, (rows // 32, columns // 2), np.uint8)
        order = rng.permutation(rows).astype(np.int64) if self.format.permuted else None
        return QuantizedWeight(self.format, data, scales, zeros, order)


def packed(checkpoint: Checkpoint, seed: int, form: WeightFormat = GPTQ) -> Checkpoint:
    names = decoder_linears(checkpoint.config)
    held = {name: Packed(name, checkpoint.tensors[name].shape, seed, form) for name in names}
    return dataclasses.replace(checkpoint, tensors=MappingProxyType({**checkpoint.tensors, **held}))


def test_integers_of_a_checkpoint_stay_as_they_are(drawn: Any, contents: Any, with_part: Any, tmp_path: Path) -> None:
    old, other = packed(drawn(0), 0), packed(drawn(1), 1)
    bundle = bundle_of(old, tmp_path / "bundle", "int4")
    swap(other, bundle, "decoder")
    want = bundle_of(with_part(old, other, ("language_model.", "lm_head.")), tmp_path / "want", "int4")
    assert contents(bundle) == contents(want)


def test_methods_that_are_more_than_rounding(drawn: Any, tmp_path: Path) -> None:
    gptq = bundle_of(packed(drawn(0), 0), tmp_path / "gptq", "int4")
    refused(drawn(1), gptq, "decoder", r"quantised by gptq: .* another, less exact model; quantise the checkpoint")
    awq = bundle_of(round_to_nearest(drawn(0), QuantizeOptions(32, False, "fp16")), tmp_path / "awq", "int4-awq")
    path = awq / "manifest.json"
    path.write_text(path.read_text().replace('"method": "rtn"', '"method": "awq"'))
    refused(drawn(1), awq, "decoder", r"by awq: .*search anew with: llava-deploy export .* int4-awq --force")
    plain = dataclasses.replace(GPTQ, permuted=False)
    refused(packed(drawn(1), 1, plain), awq, "decoder", "want weights by AWQ, as .* has them, found gptq")
    swapped_model(drawn(1), awq, read_manifest(awq), "projector")


def test_integers_for_a_bundle_of_rounded_weights(drawn: Any, tmp_path: Path) -> None:
    """Their method is the manifest's from then on; what has another form is another graph."""
    bundle = bundle_of(round_to_nearest(drawn(0), QuantizeOptions(32, False, "int8")), tmp_path / "bundle", "int4")
    refused(packed(drawn(1), 1), bundle, "decoder", r"weight .*q_proj.weight_permutation: want none, found INT64\[64\]")
    found = swap(packed(drawn(1), 1, dataclasses.replace(GPTQ, permuted=False)), bundle, "decoder").quantization
    assert found == QuantizationRecipe("gptq", 32, False, "int8", found.weights if found else 0, 4)


def test_a_quantised_checkpoint_for_a_bundle_of_floats(drawn: Any, contents: Any, tmp_path: Path) -> None:
    bundle = bundle_of(drawn(0), tmp_path / "bundle")
    swap(packed(drawn(0), 1), bundle, "decoder")
    assert contents(bundle) == contents(bundle_of(packed(drawn(0), 1), tmp_path / "want"))
