"""From what the command line asks for to the checkpoint that an export writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.names import Precision
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import LM_HEAD
from llava_deploy.exporter.quantization.held import quantized_in_decoder
from llava_deploy.exporter.quantization.request import QuantizeRequest

MOST_TOKENS = 2048
"""Of a calibration sample."""


def prepare(
    checkpoint: Checkpoint,
    precision: Precision,
    request: QuantizeRequest,
    work: Path,
    on_layer: Callable[[int, int], None] = lambda _done, _total: None,
) -> Checkpoint:
    """The checkpoint as ``precision`` wants it.

    Weights that are quantised already are kept, value for value, and what is a float beside them stays a float.

    Args:
        checkpoint: as it was opened.
        precision: what the bundle is to be.
        request: how to quantise.
        work: for AWQ: the directory of its search, where it goes on if it was stopped.
        on_layer: for AWQ: called with the layers that are done, and of how many.

    Raises:
        InputError: an option that this precision or this checkpoint has no use for.
        CheckpointError: the checkpoint is quantised already, and AWQ is asked for.
    """
    require_useful(checkpoint, precision, request)
    if precision in ("fp32", "fp16"):
        return checkpoint
    # These import torch, which takes its time and some 250 MB: an export of floats does without.
    from llava_deploy.exporter.quantization.awq.calibration import calibration_samples
    from llava_deploy.exporter.quantization.awq.quantize import AwqOptions, awq
    from llava_deploy.exporter.quantization.plan import require_float, round_to_nearest, with_head

    if precision == "int4-awq":
        require_float(checkpoint)
        device = "cpu" if request.device is None else request.device
        options = AwqOptions(request.options(), device, max_tokens=MOST_TOKENS)
        return awq(checkpoint, options, calibration_samples(request.calibration, checkpoint), work, on_layer)
    if quantized_in_decoder(checkpoint):
        return with_head(checkpoint, request.options().head_format)
    return round_to_nearest(checkpoint, request.options())


def require_useful(checkpoint: Checkpoint, precision: Precision, request: QuantizeRequest) -> None:
    """Refuse options that this precision or this checkpoint has no use for.

    Raises:
        InputError: one was given.
    """
    _refuse_useless(precision, request)
    if precision == "int4" and (held := quantized_in_decoder(checkpoint)):
        _refuse_rounding_again(checkpoint, request, is_head_held=LM_HEAD in held)


def _refuse_rounding_again(checkpoint: Checkpoint, request: QuantizeRequest, *, is_head_held: bool) -> None:
    if request.lm_head is not None and is_head_held:
        raise InputError(
            f"--lm-head: the output layer of {checkpoint.directory} is quantised already and stays as it is; "
            "leave the option out, or take the float checkpoint"
        )
    if (request.group_size is not None or request.symmetric) and request.lm_head != "int4":
        raise InputError(
            f"--group-size, --symmetric: {checkpoint.directory} is quantised already and keeps its own groups; "
            "leave them out, or take the float checkpoint (with --lm-head int4 they are the output layer's)"
        )


def _refuse_useless(precision: Precision, request: QuantizeRequest) -> None:
    quantising = {
        "--group-size": request.group_size is not None,
        "--symmetric": request.symmetric,
        "--lm-head": request.lm_head is not None,
    }
    searching = {"--calibration": request.calibration is not None, "--device": request.device is not None}
    for options, users in ((quantising, ("int4", "int4-awq")), (searching, ("int4-awq",))):
        given = [name for name, is_given in options.items() if is_given]
        if given and precision not in users:
            raise InputError(
                f"{', '.join(given)}: of use with --precision {' or '.join(users)} only, found --precision {precision}"
            )
