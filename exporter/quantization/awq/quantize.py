"""AWQ of a whole decoder: a checkpoint in, a checkpoint with int4 weights out, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llava_deploy.engines.errors import CheckpointError, InputError, OptionError
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.awq.calibration import CalibrationSample
from llava_deploy.exporter.quantization.awq.embeddings import embed_samples
from llava_deploy.exporter.quantization.awq.layers import LinearReport, quantize_layer, run_layer
from llava_deploy.exporter.quantization.awq.state import WorkDirectory, open_work
from llava_deploy.exporter.quantization.plan import require_float, with_head
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.quantization.rtn import require_form
from llava_deploy.exporter.reference.torch_decoder import load_layer, require_device_name, torch_device

_VERSION = 1
"""Of the search: a run is not picked up by another version."""


@dataclass(frozen=True)
class AwqOptions:
    """How AWQ is done.

    Attributes:
        quantize: what the decoder becomes.
        device: of torch: ``cpu``, ``cuda`` or ``cuda:1``. A run can be picked up on another one.
        max_tokens: of a calibration sample, its pictures' features included; what is longer is cut.
    """

    quantize: QuantizeOptions
    device: str
    max_tokens: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise OptionError("max_tokens", f"want 1 or more, got {self.max_tokens}")
        require_device_name(self.device)


@dataclass(frozen=True)
class AwqReport:
    """How each linear layer fared, in the decoder's order."""

    linears: tuple[LinearReport, ...]


def awq(
    checkpoint: Checkpoint,
    options: AwqOptions,
    samples: Sequence[CalibrationSample],
    work: Path,
    on_layer: Callable[[int, int], None] = lambda _done, _total: None,
) -> Checkpoint:
    """The checkpoint with its decoder's linear layers in int4, and the norms and biases that the scales went into.

    Memory holds one decoder layer in float32, the second moments of its linear layers' inputs, and the samples' hidden
    states. While a layer is searched there is its original beside it, and some copies of its largest part: at the peak
    five times its float32 bytes or so (51 MB made 236). What is done stays in ``work``, from which the result reads its
    tensors: it must stay until they are exported. A run that was stopped goes on with the layer that it had reached,
    and ends in the same bytes; so do two runs on the same machine with the same number of threads.

    Args:
        checkpoint: of floats.
        options: see there.
        samples: calibration prompts.
        work: directory of the run, a new one or that of a run that was stopped.
        on_layer: called at the start and after each layer, with the layers that are done, and of how many.

    Raises:
        CheckpointError: the checkpoint is quantised already, or a weight is NaN, infinite or very large.
        InputError: a layer's size does not suit the group size, there are no samples, ``work`` is of another run, or
            torch has no such device.
        LlavaDeployError: ``work`` cannot be written.
    """
    require_float(checkpoint)
    form = options.quantize.weight_format
    for name in decoder_linears(checkpoint.config):
        source = checkpoint.tensors[name]
        require_form(source.shape, form, f"{source.origin}, {name!r}")
    if not samples:
        raise InputError("samples: want one calibration prompt at least, got none")
    device = torch_device(options.device)
    layers = checkpoint.config.decoder.num_hidden_layers
    tensors = dict(checkpoint.tensors)
    with open_work(work, _fingerprint(checkpoint, options, samples)) as state, torch.inference_mode():
        _run(checkpoint, options, samples, state, device, on_layer)
        for index in range(layers):
            tensors |= state.layer_tensors(index, form)
    return with_head(replace(checkpoint, tensors=MappingProxyType(tensors)), options.quantize.head_format)


def read_report(work: Path, checkpoint: Checkpoint) -> AwqReport:
    """The report of a run that :func:`awq` finished in ``work``."""
    state = WorkDirectory(work)
    layers = range(checkpoint.config.decoder.num_hidden_layers)
    return AwqReport(tuple(row for index in layers for row in state.layer_report(index)))


def _run(
    checkpoint: Checkpoint,
    options: AwqOptions,
    samples: Sequence[CalibrationSample],
    state: WorkDirectory,
    device: torch.device,
    on_layer: Callable[[int, int], None],
) -> None:
    config = checkpoint.config.decoder
    layers = config.num_hidden_layers
    resumed = state.resume(layers)
    if resumed is None:
        longest = min(options.max_tokens, config.max_position_embeddings)
        first, hidden = 0, embed_samples(checkpoint, samples, longest, device)
        _require_finite(hidden, samples, f"{checkpoint.directory}: embeddings and features")
        state.keep_hidden(0, hidden)
    else:
        first, hidden = resumed
    on_layer(first, layers)
    for index in range(first, layers):
        layer = load_layer(config, checkpoint.tensors, index, device)
        moments = run_layer(layer, config, hidden, device)
        result = quantize_layer(layer, config, index, moments, options.quantize.weight_format)  # names a weight of NaN
        _require_finite(hidden, samples, f"{checkpoint.directory}: output of decoder layer {index}")
        state.keep_layer(index, result)
        del layer, moments, result  # before the next layer comes
        state.keep_hidden(index + 1, hidden if index + 1 < layers else [])  # after the last, nobody asks
        on_layer(index + 1, layers)


def _require_finite(hidden: Sequence[torch.Tensor], samples: Sequence[CalibrationSample], what: str) -> None:
    """Scales searched with NaN are of no use, and the search takes long: say it at once."""
    for rows, sample in zip(hidden, samples, strict=True):
        if not bool(torch.isfinite(rows).all()):
            raise CheckpointError(
                f"{what}: NaN or infinite for {sample.origin}; the checkpoint is damaged, take it from its source again"
            )


def _fingerprint(checkpoint: Checkpoint, options: AwqOptions, samples: Sequence[CalibrationSample]) -> dict[str, Any]:
    """What a run is of; what it runs on is not in it."""
    files = sorted({path for source in checkpoint.tensors.values() for path in source.files})
    content = hashlib.sha256()
    for sample in samples:
        content.update(f"{sample.ids.shape} {sample.pixels.shape} ".encode())
        content.update(sample.ids.tobytes())
        content.update(sample.pixels.tobytes())
    quantize = options.quantize
    return {
        "version": _VERSION,
        "group size": quantize.group_size,
        "symmetric": quantize.symmetric,
        "max_tokens": options.max_tokens,
        "calibration": f"{len(samples)} samples, sha256 {content.hexdigest()}",
        "config": hashlib.sha256(repr(dataclasses.asdict(checkpoint.config)).encode()).hexdigest(),
        "checkpoint": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
