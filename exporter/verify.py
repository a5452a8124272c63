"""PyTorch and the built graphs side by side on the same input, stage by stage.

Imports the runtime, as few files of this room do: it is where both sides meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_deploy.engines.contract import hidden_state_name, past_name
from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.halves import TOWER_FEATURES
from llava_deploy.exporter.inner_values import all_outputs
from llava_deploy.exporter.made_from import require_sizes_of
from llava_deploy.exporter.quantization.held import quantized_in_decoder
from llava_deploy.exporter.quantization.stored import with_stored_decoder
from llava_deploy.exporter.reference.pixels import reference_pixels
from llava_deploy.exporter.reference.splice import SpliceOptions
from llava_deploy.exporter.reference.splice import splice as reference_splice
from llava_deploy.exporter.reference.torch_decoder import greedy_answer
from llava_deploy.exporter.reference.torch_model import TorchLlava, exact_float32, load_torch
from llava_deploy.runtime import Llava
from llava_deploy.runtime.backend import step_mask, step_positions
from llava_deploy.runtime.backend_choice import BackendName
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeVision
from llava_deploy.runtime.pictures import PictureSource, load_picture
from llava_deploy.runtime.stages import (
    INT8_TOLERANCE,
    QUANTIZED_TOLERANCE,
    TOLERANCE,
    StageKind,
    StageResult,
    first_failure,
    pixel_stage,
    stage,
    token_stage,
)
from llava_deploy.runtime.tokenize import tokenize_prompt


@dataclass(frozen=True)
class VerifyReport:
    """All stages, in the order in which data passes them."""

    backend: str
    prompt: str
    stages: tuple[StageResult, ...]

    @property
    def first_failure(self) -> str | None:
        """The first stage that left its tolerance: where to look."""
        return first_failure(self.stages)

    @property
    def ok(self) -> bool:
        """Whether every stage is within its tolerance."""
        return self.first_failure is None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        stages = [stage.to_dict() for stage in self.stages]
        first = self.first_failure
        return {"ok": self.ok, "first_failure": first, "backend": self.backend, "prompt": self.prompt, "stages": stages}


@dataclass(frozen=True)
class VerifyOptions:
    """What both sides are given.

    Attributes:
        prompt: as for :meth:`Llava.generate`, with one placeholder.
        picture: the picture for it.
        max_new_tokens: greedy tokens to compare.
        device: where PyTorch computes, by PyTorch's name: ``cpu`` or ``cuda``.
    """

    prompt: str
    picture: PictureSource
    max_new_tokens: int = 32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device != "cpu" and not torch.cuda.is_available():
            raise OptionError("device", f"want a device that PyTorch has, got {self.device!r} and it sees no GPU")


def verify(
    checkpoint: Checkpoint,
    bundle: Path,
    *,
    prompt: str,
    picture: PictureSource,
    max_new_tokens: int = 32,
    backend: BackendName = "auto",
    on_stage: Callable[[StageResult], None] = lambda _: None,
) -> VerifyReport:
    """Compare a bundle, loaded for a backend, with the checkpoint it was made from; see :func:`verify_loaded`.

    Raises:
        InputError: the bundle was made from a model of other sizes.
        BackendError: the backend cannot run it here.
    """
    llava = Llava.load(bundle, backend=backend)
    return verify_loaded(checkpoint, llava, VerifyOptions(prompt, picture, max_new_tokens), on_stage)


def verify_loaded(
    checkpoint: Checkpoint,
    llava: Llava,
    options: VerifyOptions,
    on_stage: Callable[[StageResult], None] = lambda _: None,
) -> VerifyReport:
    """Compare a bundle, loaded already, with the checkpoint it was made from.

    Layer by layer it is the canonical graphs that are compared; features, logits and tokens are also those of what
    is loaded: the logits after the prompt, and those after each token of PyTorch's answer, which are decode's. PyTorch
    runs in float32. Of a quantised bundle PyTorch's decoder gets the weights that the bundle's stand for, after a stage
    that tells whether these are this checkpoint's: exactly where it holds them quantised itself, roughly where it holds
    floats. What quantisation costs is ``eval``'s to say.

    Args:
        checkpoint: the original.
        llava: a bundle made from it.
        options: what both are given.
        on_stage: called with each result as it is known.

    Raises:
        InputError: the bundle was made from a model of other sizes.
    """
    require_sizes_of(checkpoint, llava.directory, llava.manifest)
    stages = []
    with torch.inference_mode(), exact_float32():
        for result in _stages(llava, checkpoint, options):
            stages.append(result)
            on_stage(result)
    return VerifyReport(llava.backend, options.prompt, tuple(stages))


def _stages(llava: Llava, checkpoint: Checkpoint, options: VerifyOptions) -> Iterator[StageResult]:
    manifest, device = llava.manifest, options.device
    for graph in (VISION_GRAPH, DECODER_GRAPH):
        manifest.entry(graph)  # an archive may have been packed without them
    # The checkpoint with the decoder's weights of a quantised bundle.
    stored = None if manifest.quantization is None else with_stored_decoder(checkpoint, llava.directory)
    model = load_torch(checkpoint).to(device)
    tolerance = TOLERANCE[manifest.model.precision]
    image = load_picture(options.picture)
    pixels = llava.encoder.pixels([image])  # [1, 3, height, width]
    yield pixel_stage(pixels, reference_pixels(image, checkpoint.image), manifest.image)

    found = all_outputs(llava.directory / VISION_GRAPH, {"pixel_values": pixels.astype(manifest.vision.dtype)})
    states = model.hidden_states(torch.from_numpy(pixels).to(device))
    for index in range(len(states)):
        if (name := hidden_state_name(index)) in found:
            yield _compared(f"tower {name}", "tower", found[name], states[index], tolerance)
    selected = model.select(states)
    yield _compared("tower features", "tower", found[TOWER_FEATURES], selected, tolerance)
    features = model.projector(selected)  # [1, patches, hidden]
    yield _compared("projector", "projector", found["image_features"], features, tolerance)
    (loaded,) = llava.encoder.vision.encode(pixels)
    loaded = loaded if isinstance(loaded, np.ndarray) else loaded.numpy()
    vision = llava.encoder.vision
    seen = INT8_TOLERANCE if isinstance(vision, OnnxRuntimeVision) and vision.rounds else tolerance
    yield _compared("features of what is loaded", "projector", loaded, features[0], seen)

    ids = torch.from_numpy(tokenize_prompt(options.prompt, llava.encoder.tokenizer, manifest.chat)).to(device)
    embeds = llava.encoder.encode([options.prompt], [[image]], llava.max_len).tokens.on_host()  # [1, seq, hidden]
    spliced = reference_splice(ids[None], None, None, None, list(features), embed=model.embed, options=SpliceOptions())
    want = spliced.inputs_embeds
    yield _compared("splice", "splice", embeds, want, seen)

    if stored is not None:
        own_logits = _decoder_states(model, want)[1]
        del model  # before the other one comes
        model = load_torch(stored).to(device)
        close = tolerance if quantized_in_decoder(checkpoint) else QUANTIZED_TOLERANCE
        stored_logits = _decoder_states(model, want)[1].cpu().numpy()
        yield _compared("decoder weights", "weights", stored_logits, own_logits, close)

    found = all_outputs(llava.directory / DECODER_GRAPH, _prompt_feed(llava, want.cpu().numpy()))
    layers, logits = _decoder_states(model, want)
    for index, state in enumerate(layers, start=1):
        name = hidden_state_name(index)
        yield _compared(f"decoder {name}", "decoder", found[name], state, tolerance)
    yield _compared("logits", "logits", found["logits"], logits, tolerance)

    rounds = isinstance(llava.decoder, OnnxRuntimeDecoder) and (stored is not None or llava.decoder.rounds)
    yield from _answer_stages(llava, model, options, want, INT8_TOLERANCE if rounds else seen)


def _prompt_feed(llava: Llava, embeds: np.ndarray) -> dict[str, np.ndarray]:
    """Everything that the canonical decoder takes, for a prompt ``[1, seq, hidden]`` at the start of its cache.

    The embeddings are PyTorch's: what the loaded tower rounds is none of this graph's.
    """
    shape, seq = llava.manifest.decoder, embeds.shape[1]
    start = np.zeros(1, np.int64)
    cache = np.zeros((1, shape.kv_heads, seq, shape.head_dim), shape.dtype)
    return {
        "inputs_embeds": embeds.astype(shape.dtype),
        "position_ids": step_positions(start, seq),
        "write_indices": start,
        "attention_mask": step_mask(start, seq),
        "last_index": np.array([seq - 1]),
        **{past_name(i, part): cache for i in range(shape.layers) for part in ("key", "value")},
    }


def _decoder_states(model: TorchLlava, embeds: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each layer's output, ``[1, seq, hidden]``, and the logits after the last token, ``[1, vocab]``."""
    states: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [layer.register_forward_hook(keep) for layer in model.decoder.model.layers]
    try:
        logits = model.decoder(inputs_embeds=embeds, logits_to_keep=1).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return states, logits


def _answer_stages(
    llava: Llava, model: TorchLlava, options: VerifyOptions, embeds: torch.Tensor, tolerance: float
) -> Iterator[StageResult]:
    """PyTorch's greedy answer: logits of what is loaded along it, and its own answer."""
    answer = greedy_answer(model.decoder, embeds, llava.manifest.chat.stop_token_ids, options.max_new_tokens)
    want, wanted = answer.token_ids, answer.logits
    along = want[: llava.max_len + 1 - embeds.shape[1]]
    images = [[load_picture(options.picture)]]
    found = np.concatenate([row.copy() for row in llava.logits_along([options.prompt], images, [along])])
    yield _compared("logits of what is loaded", "logits", found[:1], wanted[:1], tolerance)
    if len(along) > 1:
        decoded = _compared("logits of what is loaded, decode", "logits", found[1:], wanted[1 : len(along)], tolerance)
        yield replace(decoded, detail=f"{decoded.detail}, worst of {len(along) - 1} tokens one by one")
    logits = wanted.float().cpu().numpy()
    noise = float(np.abs(found - logits[: len(along)]).max())
    yield _token_stage(llava, options, want, logits, noise)


def _token_stage(
    llava: Llava, options: VerifyOptions, want: tuple[int, ...], logits: np.ndarray, noise: float
) -> StageResult:
    images: list[list[Image.Image]] = [[load_picture(options.picture)]]
    answer = llava.generate([options.prompt], images, max_new_tokens=options.max_new_tokens)[0]
    found, stop = answer.token_ids, llava.manifest.chat.stop_token_ids
    if answer.finish_reason == "context" or (answer.finish_reason == "stop" and found[-1] not in stop):
        want = want[: len(found)]  # PyTorch knows no stop strings and no end of the cache
    return token_stage("tokens", "tokens", found, want, logits, noise)


def _compared(name: str, kind: StageKind, found: np.ndarray, wanted: torch.Tensor, tolerance: float) -> StageResult:
    return stage(name, kind, found, wanted.float().cpu().numpy(), tolerance)
