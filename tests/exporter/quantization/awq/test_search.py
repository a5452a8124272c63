"""The parts of the search: errors from second moments, scales that worsen nothing, ranges cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llava_deploy.exporter.quantization import rtn
from llava_deploy.exporter.quantization.awq.clipping import clipped
from llava_deploy.exporter.quantization.awq.moments import Moments, output_energy, relative_error, rounded
from llava_deploy.exporter.quantization.awq.scales import Choice, candidates_from, choose_scales, norm_candidates
from llava_deploy.exporter.quantization.weight import WeightFormat

FORMS = [WeightFormat(4, 32, symmetric, permuted=False) for symmetric in (True, False)]


@pytest.fixture
def weight() -> torch.Tensor:
    """``[out_features, in_features]``, some of its values far out."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 96, generator=generator) * torch.randn(48, 96, generator=generator).abs()


@pytest.fixture
def inputs() -> torch.Tensor:
    """``[tokens, in_features]``, a few channels much larger than the rest."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 96, generator=generator)
    x[:, ::24] *= 20
    return x


@pytest.fixture
def moments(inputs: torch.Tensor) -> Moments:
    moments = Moments(96, torch.device("cpu"))
    for part in inputs.view(4, 50, 96):
        moments.add(part)
    return moments


def test_moments_are_those_of_all_tokens(inputs: torch.Tensor, moments: Moments) -> None:
    torch.testing.assert_close(moments.magnitudes, inputs.abs().mean(0))
    torch.testing.assert_close(moments.second, inputs.T @ inputs, rtol=1e-4, atol=1e-3)


def test_errors_are_those_of_the_outputs(weight: torch.Tensor, inputs: torch.Tensor, moments: Moments) -> None:
    approximation = weight + 0.01 * weight.roll(1, 0)
    outputs, found = inputs @ weight.T, inputs @ approximation.T
    torch.testing.assert_close(output_energy(weight, moments.second), outputs.square().sum(0))
    want = (found - outputs).square().mean() / outputs.square().mean()
    assert relative_error(weight, approximation, moments.second) == pytest.approx(float(want), rel=1e-4)
    assert relative_error(torch.zeros(2, 96), torch.ones(2, 96), moments.second) == 0.0


@pytest.mark.parametrize("form", FORMS, ids=["symmetric", "asymmetric"])
def test_rounding_here_is_the_rounding_of_what_is_stored(weight: torch.Tensor, form: WeightFormat) -> None:
    stored = rtn.quantize(weight.numpy(), form, "test").dequantized()
    assert torch.equal(rounded(weight, form), torch.from_numpy(stored))


def test_candidates() -> None:
    magnitudes = torch.tensor([0.0, 0.5, 8.0])
    found = dict(candidates_from(magnitudes))
    assert list(found) == [step / 20 for step in range(20)]
    assert torch.equal(found[0.0], torch.ones(3))
    for ratio, scales in found.items():
        torch.testing.assert_close(scales.max() * scales.min(), torch.tensor(1.0))
        torch.testing.assert_close(scales[2] / scales[1], torch.tensor(16.0**ratio))


@pytest.mark.parametrize("form", FORMS, ids=["symmetric", "asymmetric"])
def test_large_channels_are_found(weight: torch.Tensor, moments: Moments, form: WeightFormat) -> None:
    plain = relative_error(weight, rounded(weight, form), moments.second)
    choice = choose_scales([weight], moments, form, norm_candidates(moments.magnitudes, torch.ones(96)))
    assert choice.ratio > 0
    found = relative_error(weight, rounded(weight * choice.scales, form) / choice.scales, moments.second)
    assert found < 0.9 * plain


def test_no_layer_is_worse_for_what_helps_another(weight: torch.Tensor, moments: Moments) -> None:
    """Scales that would help the first layer, and all together, but leave the second one with more error."""
    form = FORMS[0]
    first = weight.clone()
    first[:, 5::24] *= 50  # the first layer's own large columns: shrinking them helps it
    shrink = torch.ones(96)
    shrink[5::24] = 1 / 50
    exact = rounded(weight, form)  # a second layer that has no error at all without scales
    choices = [Choice(0.0, torch.ones(96)), Choice(0.5, shrink)]
    assert choose_scales([first], moments, form, iter(choices)).ratio == 0.5
    assert choose_scales([first, exact], moments, form, iter(choices)).ratio == 0.0


@pytest.mark.parametrize("form", FORMS, ids=["symmetric", "asymmetric"])
def test_no_output_is_worse_for_the_cut(weight: torch.Tensor, moments: Moments, form: WeightFormat) -> None:
    cut = clipped(weight, moments.second, form)
    plain = output_energy(rounded(weight, form) - weight, moments.second)
    found = output_energy(rounded(cut, form) - weight, moments.second)
    assert bool((found <= plain).all())
    assert float(found.sum()) < 0.9 * float(plain.sum())
    assert bool((cut.abs() <= weight.abs()).all())
    groups, limits = weight.view(48, 3, 32), cut.view(48, 3, 32).abs().amax(2)
    assert bool((limits >= 0.54 * groups.abs().amax(2)).all())


@pytest.mark.parametrize("form", FORMS, ids=["symmetric", "asymmetric"])
def test_a_weight_of_zeros_or_of_one_sign(moments: Moments, form: WeightFormat) -> None:
    assert torch.equal(clipped(torch.zeros(2, 96), moments.second, form), torch.zeros(2, 96))
    ones = torch.full((2, 96), 7.0)
    torch.testing.assert_close(rounded(clipped(ones, moments.second, form), form), ones, rtol=1e-3, atol=0)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
