"""Scales that are folded into the operation before change nothing, whatever the layer looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.quantization.awq import layers, scales
from llava_deploy.exporter.quantization.awq.scales import FOLDS, Choice, settled_in_norm
from llava_deploy.exporter.reference.torch_decoder import load_layer

CPU = torch.device("cpu")

CONFIGS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8},
    "multi-query": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32, "attention_bias": True},
    "gelu": {"hidden_act": "gelu"},
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def loaded(checkpoint: Checkpoint) -> tuple[Any, list[torch.Tensor], dict[str, Any]]:
    """The second layer, what comes out of it, and the moments of its inputs, whose channels differ in size."""
    config = checkpoint.config.decoder
    layer = load_layer(config, checkpoint.tensors, 1, CPU)
    hidden = states(config.hidden_size)
    moments = layers.run_layer(layer, config, hidden, CPU)
    return layer, hidden, moments


def states(size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    channels = torch.logspace(-1, 1, size)
    return [torch.randn(seq, size, generator=generator) * channels for seq in (9, 5)]


def strongest(layer: Any, config: Any, moments: Any) -> dict[str, Choice]:
    """The last candidate of each fold: the one that scales most."""
    modules = dict(layer.named_modules())
    choices = {}
    for fold in FOLDS:
        magnitudes, into = moments[fold.readers[0]].magnitudes, modules[fold.into]
        if fold.into.endswith("norm"):
            *_, last = scales.norm_candidates(magnitudes, into.weight)
        else:
            *_, last = scales.row_candidates(magnitudes, into.weight, into.bias, layers.head_sharing(config)[fold.into])
        choices |= dict.fromkeys(fold.readers, last)
    return choices


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folded_layer_computes_the_same(tiny: Callable[..., Checkpoint], name: str) -> None:
    checkpoint = tiny(**CONFIGS[name])
    config = checkpoint.config.decoder
    layer, before, moments = loaded(checkpoint)
    old = {key: value.clone() for key, value in layer.named_parameters()}
    choices = strongest(layer, config, moments)
    assert {choice.ratio for choice in choices.values()} == {0.95}

    changed = layers.fold_scales(layer, config, choices)

    after = states(config.hidden_size)
    layers.run_layer(layer, config, after, CPU)
    for want, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    new = dict(layer.named_parameters())
    different = {key for key in new if not torch.equal(new[key], old[key])}
    weights = {f"{reader}.weight" for fold in FOLDS for reader in fold.readers}
    assert different == weights | set(changed)
    for fold in FOLDS:
        assert float(choices[fold.readers[0]].scales.max() / choices[fold.readers[0]].scales.min()) > 1.5


@pytest.mark.parametrize("name", ["grouped-query", "multi-query"])
def test_query_heads_that_share_values_share_scales(tiny: Callable[..., Checkpoint], name: str) -> None:
    checkpoint = tiny(**CONFIGS[name])
    config = checkpoint.config.decoder
    layer, _, moments = loaded(checkpoint)
    found = strongest(layer, config, moments)["self_attn.o_proj"].scales
    kv = config.num_key_value_heads
    by_head = found.view(kv, config.num_attention_heads // kv, config.head_dim)
    assert torch.equal(by_head, by_head[:, :1].expand_as(by_head))
    assert len(by_head.unique()) > config.head_dim / 2


def test_norms_hold_float16_values_and_the_scales_make_up_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, generator=generator)
    wanted = torch.rand(512, generator=generator) * 10 + 0.01
    found, folded = settled_in_norm(wanted, weight)
    assert torch.equal(folded.half().float(), folded)
    torch.testing.assert_close(found * folded, weight, rtol=2e-7, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("weight", "wanted"), [(0.0, 5.0), (1e-9, 30.0), (6e4, 1e-3), (-6e4, 1e-3), (1.0, 1e9), (1e5, 1.0), (-2e-5, 4.0)]
)
def test_a_norm_neither_overflows_nor_vanishes(weight: float, wanted: float) -> None:
    found, folded = settled_in_norm(torch.tensor([wanted]), torch.tensor([weight]))
    assert torch.isfinite(folded.half()).all()
    assert float(found) > 0
    assert float(found * folded) == pytest.approx(weight, rel=1e-6)
    assert (float(folded) == 0) == (weight == 0)


def test_rows_stay_where_float16_is_precise() -> None:
    weight = torch.full((4, 32), 0.01)
    bias = torch.tensor([0.0, 3e4, 0.0, 0.0])
    magnitudes = torch.tensor([1e-3, 1e-3, 1.0, 1e3])
    for choice in scales.row_candidates(magnitudes, weight, bias, scales.ONE_TO_ONE):
        step = weight[:, 0] / choice.scales / 15
        assert float(step.min()) >= torch.finfo(torch.float16).smallest_normal * 0.999
        assert torch.isfinite((bias / choice.scales).half()).all()
