"""One decoder layer at a time: run in floats to see what its linear layers read, then scaled, clipped and rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llava_deploy.exporter.config import DecoderConfig
from llava_deploy.exporter.quantization import rtn
from llava_deploy.exporter.quantization.awq.clipping import clipped
from llava_deploy.exporter.quantization.awq.moments import Moments, relative_error, rounded
from llava_deploy.exporter.quantization.awq.scales import (
    FOLDS,
    INPUT_FOLD,
    MLP_FOLD,
    ONE_TO_ONE,
    UP_FOLD,
    VALUE_FOLD,
    Choice,
    HeadSharing,
    choose_scales,
    norm_candidates,
    row_candidates,
    settled_in_norm,
)
from llava_deploy.exporter.quantization.weight import QuantizedWeight, WeightFormat
from llava_deploy.exporter.reference.torch_decoder import layer_prefix
from llava_deploy.exporter.reference.torch_model import llama_config


@dataclass(frozen=True)
class LinearReport:
    """How one linear layer fared.

    Attributes:
        name: canonical name of its weight.
        rtn_error: mean squared error of its output over the calibration tokens, relative to the output's mean square,
            when its weight is rounded to the nearest.
        awq_error: the same with AWQ, in the units of the layer as it was: scales are taken off again.
        ratio: exponent of the activations' magnitudes in the scales of its inputs; 0: no scales.
    """

    name: str
    rtn_error: float
    awq_error: float
    ratio: float


@dataclass(frozen=True)
class QuantizedLayer:
    """What is kept of a layer, by canonical names.

    Attributes:
        weights: of its linear layers.
        floats: float32, what the scales changed beside the weights: norms, whose values are float16's, and biases.
        report: one entry a linear layer, in the layer's order.
    """

    weights: Mapping[str, QuantizedWeight]
    floats: Mapping[str, np.ndarray]
    report: tuple[LinearReport, ...]


def run_layer(
    layer: LlamaDecoderLayer, config: DecoderConfig, hidden: list[torch.Tensor], device: torch.device
) -> dict[str, Moments]:
    """Take the hidden states of all prompts, float32 ``[seq, hidden]`` on the CPU, through a layer, in place.

    Returns:
        The moments of what each fold's linear layers read, by the name of the first of them.
    """
    rotary = LlamaRotaryEmbedding(llama_config(config)).to(device)
    with _observed(layer, device) as moments:
        for index, states in enumerate(hidden):
            x = states[None].to(device)  # [1, seq, hidden]
            seq = x.shape[1]
            # Written out: an attention that is given no mask takes it for none or for a causal one as it likes.
            mask = torch.full((seq, seq), torch.finfo(x.dtype).min, device=device).triu(1)[None, None]
            position_embeddings = rotary(x, torch.arange(seq, device=device)[None])
            y = layer(x, attention_mask=mask, position_embeddings=position_embeddings)
            y = y if isinstance(y, torch.Tensor) else y[0]  # older versions give a tuple
            hidden[index] = y[0].cpu()
    return moments


@contextmanager
def _observed(layer: LlamaDecoderLayer, device: torch.device) -> Iterator[dict[str, Moments]]:
    modules = dict(layer.named_modules())
    moments = {fold.readers[0]: Moments(modules[fold.readers[0]].in_features, device) for fold in FOLDS}

    def observe(name: str) -> object:
        return modules[name].register_forward_pre_hook(lambda _, inputs: moments[name].add(inputs[0]))

    hooks = [observe(name) for name in moments]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]


def choose_all(
    layer: LlamaDecoderLayer, config: DecoderConfig, moments: Mapping[str, Moments], form: WeightFormat
) -> dict[str, Choice]:
    """The scales of every linear layer's inputs, by its module name; those of a fold have the same."""
    modules = dict(layer.named_modules())
    choices: dict[str, Choice] = {}
    for fold in FOLDS:
        seen = moments[fold.readers[0]]
        into = modules[fold.into]
        candidates = (
            norm_candidates(seen.magnitudes, into.weight)
            if fold in (INPUT_FOLD, MLP_FOLD)
            else row_candidates(seen.magnitudes, into.weight, into.bias, head_sharing(config)[fold.into])
        )
        choice = choose_scales([modules[name].weight for name in fold.readers], seen, form, candidates)
        choices |= dict.fromkeys(fold.readers, choice)
    return choices


def head_sharing(config: DecoderConfig) -> dict[str, HeadSharing]:
    """How the outputs of the linear layers that take scales into their rows are read."""
    groups = config.num_attention_heads // config.num_key_value_heads
    return {VALUE_FOLD.into: HeadSharing(groups, config.head_dim), UP_FOLD.into: ONE_TO_ONE}


def fold_scales(layer: LlamaDecoderLayer, config: DecoderConfig, choices: Mapping[str, Choice]) -> tuple[str, ...]:
    """Write the scales into a layer, which computes the same as before.

    Returns:
        The module-relative names of the float parameters that changed.
    """
    modules = dict(layer.named_modules())
    changed = []
    for fold in FOLDS:
        scales, into = choices[fold.readers[0]].scales, modules[fold.into]
        for name in fold.readers:
            modules[name].weight.data *= scales
        if fold in (INPUT_FOLD, MLP_FOLD):
            into.weight.data = settled_in_norm(scales, into.weight)[1]
            changed.append(f"{fold.into}.weight")
            continue
        rows = head_sharing(config)[fold.into].written(scales)
        into.weight.data /= rows[:, None]
        if into.bias is not None:
            into.bias.data /= rows
            changed.append(f"{fold.into}.bias")
    return tuple(changed)


def quantize_layer(
    layer: LlamaDecoderLayer,
    config: DecoderConfig,
    index: int,
    moments: Mapping[str, Moments],
    form: WeightFormat,
) -> QuantizedLayer:
    """Search, fold and round; the layer's own weights are changed on the way.

    Raises:
        CheckpointError: a weight is NaN, infinite or very large.
    """
    modules, prefix = dict(layer.named_modules()), layer_prefix(index)
    linears = [name for fold in FOLDS for name in fold.readers]
    choices = choose_all(layer, config, moments, form)
    inputs = {name: moments[fold.readers[0]] for fold in FOLDS for name in fold.readers}
    before = {name: modules[name].weight.detach().clone() for name in linears}
    floats = fold_scales(layer, config, choices)
    sharing = head_sharing(config)
    weights, report = {}, []
    for name in linears:
        scales, second, canonical = choices[name].scales, inputs[name].second, f"{prefix}{name}.weight"
        scaled = modules[name].weight.detach()
        scaled = clipped(scaled, second / scales / scales[:, None], form)
        weights[canonical] = rtn.quantize(scaled.cpu().numpy(), form, canonical)
        found = torch.from_numpy(weights[canonical].dequantized()).to(second.device) / scales
        for fold in (VALUE_FOLD, UP_FOLD):
            if fold.into == name:
                found *= sharing[name].written(choices[fold.readers[0]].scales)[:, None]
        original = before.pop(name)
        rtn_error = relative_error(original, rounded(original, form), second)
        report.append(LinearReport(canonical, rtn_error, relative_error(original, found, second), choices[name].ratio))
    parameters = dict(layer.named_parameters())
    changed = {prefix + name: parameters[name].detach().cpu().numpy() for name in floats}
    return QuantizedLayer(weights, changed, tuple(report))
