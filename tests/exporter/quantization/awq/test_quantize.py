"""AWQ of whole checkpoints: what comes out, what it is worth, and what stays the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from llava_deploy.engines.errors import CheckpointError, InputError, OptionError
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import LM_HEAD
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.awq.embeddings import embed_samples
from llava_deploy.exporter.quantization.awq.quantize import awq, read_report
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.weight import QuantizedSource
from llava_deploy.exporter.reference.torch_decoder import layer_prefix
from llava_deploy.exporter.reference.torch_model import load_torch
from llava_deploy.exporter.sources.tensors import TensorSource

CPU = torch.device("cpu")


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_every_linear_layer_of_the_demo_model_has_less_error(
    demo: Checkpoint, demo_samples: Any, options: Any, work: Path, group_size: int, symmetric: bool
) -> None:
    wanted = options(group_size, symmetric=symmetric)
    result = awq(demo, wanted, demo_samples, work)
    report = read_report(work, demo).linears
    assert sorted(row.name for row in report) == sorted(decoder_linears(demo.config))
    for row in report:
        assert 0 < row.awq_error < row.rtn_error, row
    assert any(row.ratio > 0 for row in report)
    for name in decoder_linears(demo.config):
        source = result.tensors[name]
        assert isinstance(source, QuantizedSource)
        assert source.format == wanted.quantize.weight_format
        assert (source.method, source.shape) == ("awq", demo.tensors[name].shape)
        assert source.read_quantized().format == source.format


def test_reported_errors_are_those_of_the_outputs(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path
) -> None:
    """Of a layer whose scales all stay in the layer before: measured from activations, with the stored weights."""
    checkpoint = tiny()
    samples = make_samples(checkpoint)
    result = awq(checkpoint, options(), samples, work)
    name = layer_prefix(0) + "mlp.gate_proj"
    norm = layer_prefix(0) + "post_attention_layernorm.weight"
    (row,) = (row for row in read_report(work, checkpoint).linears if row.name == f"{name}.weight")

    model = load_torch(checkpoint).decoder
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for embeds in embed_samples(checkpoint, samples, 512, CPU):
            model.model(inputs_embeds=embeds[None])
    inputs = torch.cat(seen)
    rescaled = inputs * torch.from_numpy(result.tensors[norm].read() / checkpoint.tensors[norm].read())
    weights = {key: torch.from_numpy(c.tensors[f"{name}.weight"].read().astype(np.float32)) for key, c in (
        ("float", checkpoint), ("awq", result), ("rtn", round_to_nearest(checkpoint, options().quantize))
    )}  # fmt: skip
    want = inputs @ weights["float"].T
    for found, reported in ((rescaled @ weights["awq"].T, row.awq_error), (inputs @ weights["rtn"].T, row.rtn_error)):
        assert float((found - want).square().mean() / want.square().mean()) == pytest.approx(reported, rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_model_is_nearer_to_the_float_one(
    demo: Checkpoint, demo_samples: Any, options: Any, work: Path, symmetric: bool
) -> None:
    """On prompts that the search has not seen."""
    calibration, unseen = demo_samples[:8], demo_samples[8:]
    wanted = options(128, symmetric=symmetric)
    found = awq(demo, wanted, calibration, work)
    embeds = embed_samples(demo, unseen, 512, CPU)
    exact, nearest, searched = (logits(c, embeds) for c in (demo, round_to_nearest(demo, wanted.quantize), found))
    assert divergence(exact, searched) < 0.8 * divergence(exact, nearest)


def logits(checkpoint: Checkpoint, embeds: list[torch.Tensor]) -> torch.Tensor:
    model = load_torch(checkpoint).decoder
    with torch.inference_mode():
        return torch.cat([model(inputs_embeds=x[None]).logits[0].log_softmax(-1) for x in embeds])


def divergence(exact: torch.Tensor, found: torch.Tensor) -> float:
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize(
    "text", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}, {"num_key_value_heads": 1}]
)
def test_other_decoders(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path, text: dict[str, Any]
) -> None:
    checkpoint = tiny(**text)
    result = awq(checkpoint, options(), make_samples(checkpoint), work)
    assert result.tensors.keys() == checkpoint.tensors.keys()
    assert all(row.awq_error < row.rtn_error for row in read_report(work, checkpoint).linears)
    for name, source in result.tensors.items():
        original = checkpoint.tensors[name]
        assert (source.name, source.shape) == (name, original.shape)
        if name.endswith("layernorm.weight") and ".layers." in name and name.startswith("language_model"):
            values = source.read()
            assert np.array_equal(values, values.astype(np.float16))
        elif not isinstance(source, QuantizedSource) and not name.endswith(("v_proj.bias", "up_proj.bias")):
            assert source is original


def test_two_runs_give_the_same_files(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path
) -> None:
    checkpoint = tiny()
    samples = make_samples(checkpoint)
    for name in ("one", "two"):
        awq(checkpoint, options(), samples, work / name)
    found = {name: {p.name: p.read_bytes() for p in (work / name).iterdir()} for name in ("one", "two")}
    assert found["one"] == found["two"]
    assert {f"layer-000{index}.safetensors" for index in range(3)} < found["one"].keys()


def test_the_output_layer(tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path) -> None:
    checkpoint = tiny(tie_word_embeddings=True)
    result = awq(checkpoint, options(lm_head="int8"), make_samples(checkpoint), work)
    head = result.tensors[LM_HEAD]
    assert isinstance(head, QuantizedSource)
    assert head.format.bits == 8
    assert not result.config.decoder.tie_word_embeddings


def test_what_cannot_be_quantised(tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path) -> None:
    checkpoint = tiny()
    samples = make_samples(checkpoint)
    with pytest.raises(InputError, match=r"64 input features cannot be cut into groups of 128"):
        awq(checkpoint, options(128), samples, work)
    with pytest.raises(CheckpointError, match="is quantised already"):
        awq(round_to_nearest(checkpoint, options().quantize), options(), samples, work)
    with pytest.raises(InputError, match="samples: want one calibration prompt"):
        awq(checkpoint, options(), (), work)
    assert not work.exists()


def test_a_damaged_weight_is_named(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path
) -> None:
    checkpoint = tiny()
    name = layer_prefix(1) + "mlp.up_proj.weight"
    broken = Recorded(checkpoint.tensors[name], lambda _: None, scale=float("nan"))
    checkpoint = replace(checkpoint, tensors=MappingProxyType({**checkpoint.tensors, name: broken}))
    with pytest.raises(CheckpointError, match=name):
        awq(checkpoint, options(), make_samples(checkpoint), work)


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:x"}, "device"),
        ({"device": "cuda:"}, "device"),
        ({"device": "cuda:12345"}, "device"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_options_are_held_to_what_they_may_be(options: Any, fields: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        replace(options(), **fields)
    assert caught.value.option == option


@dataclass(frozen=True)
class Recorded:
    """A source that says when it is read."""

    source: TensorSource
    on_read: Callable[[str], None]
    scale: float = 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self) -> np.ndarray:
        self.on_read(self.source.name)
        return self.source.read() * np.float32(self.scale)


def test_memory_holds_one_layer(tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path) -> None:
    """Layers are read one after the other, each once, and nothing of one is alive when the next one is read."""
    peaks = {}
    for layers in (2, 6):
        checkpoint = tiny(num_hidden_layers=layers)
        witness = Witness([], [])
        tensors = {name: Recorded(source, witness.see) for name, source in checkpoint.tensors.items()}
        recorded = replace(checkpoint, tensors=MappingProxyType(tensors))
        before = live_bytes()
        awq(recorded, options(), make_samples(checkpoint)[:2], work / str(layers))
        assert witness.order == list(range(layers))
        peaks[layers] = max(witness.alive) - before
        layer_bytes = sum(s.nbytes for n, s in checkpoint.tensors.items() if n.startswith(layer_prefix(0)))
        assert peaks[layers] < 1.5 * layer_bytes  # room for the new layer, and the samples' hidden states
    assert peaks[6] == peaks[2]


@dataclass(frozen=True)
class Witness:
    """Notes which layer is read next, and the bytes of all tensors that are alive then."""

    order: list[int]
    alive: list[int]

    def see(self, name: str) -> None:
        if name.startswith("language_model.layers.") and self.order[-1:] != [int(name.split(".")[2])]:
            self.order.append(int(name.split(".")[2]))
            gc.collect()
            self.alive.append(live_bytes())


def live_bytes() -> int:
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
