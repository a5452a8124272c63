"""PyTorch and the built graphs side by side on the same input, stage by stage.

Imports the runtime, as few files of this room do: it is where both sides meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from PIL import Image

from llava_deploy.engines.contract import HIDDEN_STATES, hidden_state_name, past_name
from llava_deploy.engines.errors import InputError
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, Manifest
from llava_deploy.engines.names import ACCURACY_LEVEL_ENTRY, Precision
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.graphs import decoder_shape, vision_shape
from llava_deploy.exporter.halves import TOWER_FEATURES
from llava_deploy.exporter.quantization.held import quantized_in_decoder
from llava_deploy.exporter.quantization.stored import with_stored_decoder
from llava_deploy.exporter.reference.pixels import reference_pixels
from llava_deploy.exporter.reference.splice import SpliceOptions
from llava_deploy.exporter.reference.splice import splice as reference_splice
from llava_deploy.exporter.reference.torch_model import TorchLlava, load_torch
from llava_deploy.runtime import Llava
from llava_deploy.runtime.backend import step_mask, step_positions
from llava_deploy.runtime.generation import prefill
from llava_deploy.runtime.pictures import PictureSource, load_picture
from llava_deploy.runtime.tokenize import tokenize_prompt

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int4": 1e-2, "int4-awq": 1e-2}
"""Largest relative error ``|found - wanted| / |wanted|`` (2-norms) of a position, by the bundle's precision."""

QUANTIZED_TOLERANCE = 0.5
"""The same, for logits of the bundle's int4 weights against those of the checkpoint's floats: small enough to tell a
model from another one (unrelated logits are 1.4 apart), no measure of what quantisation costs, which is ``eval``'s."""

INT8_TOLERANCE = 1e-1
"""The same, for logits where ONNX Runtime rounds the activations of each product to 8 bits (accuracy level 4)."""


@dataclass(frozen=True)
class StageResult:
    """One stage: what differs between PyTorch and the bundle, and how far it may.

    ``kind`` is ``pixels``, ``tower``, ``projector``, ``splice``, ``weights``, ``decoder``, ``logits`` or ``tokens``.
    For pixels the error is in 8-bit levels; for tokens it is the tokens that differ; for the rest it is the relative
    error.
    """

    name: str
    kind: str
    max_abs_error: float
    error: float
    tolerance: float
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the stage is within its tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class VerifyReport:
    """All stages, in the order in which data passes them."""

    backend: str
    prompt: str
    stages: tuple[StageResult, ...]

    @property
    def first_failure(self) -> str | None:
        """The first stage that left its tolerance: where to look."""
        return next((stage.name for stage in self.stages if not stage.ok), None)

    @property
    def ok(self) -> bool:
        """Whether every stage is within its tolerance."""
        return self.first_failure is None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        stages = [{**dataclasses.asdict(stage), "ok": stage.ok} for stage in self.stages]
        first = self.first_failure
        return {"ok": self.ok, "first_failure": first, "backend": self.backend, "prompt": self.prompt, "stages": stages}


def verify(
    checkpoint: Checkpoint,
    bundle: Path,
    *,
    prompt: str,
    picture: PictureSource,
    max_new_tokens: int = 32,
    on_stage: Callable[[StageResult], None] = lambda _: None,
) -> VerifyReport:
    """Compare a bundle with the checkpoint it was made from.

    Layer by layer it is the canonical graphs that are compared; features, logits and tokens are also those of what the
    runtime chose to load. PyTorch runs in float32. Of a quantised bundle PyTorch's decoder gets the weights that the
    bundle's stand for, after a stage that tells whether these are this checkpoint's: exactly where it holds them
    quantised itself, roughly where it holds floats. What quantisation costs is ``eval``'s to say.

    Args:
        checkpoint: the original.
        bundle: made from it.
        prompt: as for :meth:`Llava.generate`, with one placeholder.
        picture: the picture for it.
        max_new_tokens: greedy tokens to compare.
        on_stage: called with each result as it is known.

    Raises:
        InputError: the bundle was made from a model of other sizes.
    """
    llava = Llava.load(bundle)
    precision = llava.manifest.model.precision
    shapes = (vision_shape(checkpoint.config, precision), decoder_shape(checkpoint.config, precision))
    if shapes != (llava.manifest.vision, llava.manifest.decoder):
        raise InputError(
            f"{bundle}: made from a model of other sizes than {checkpoint.directory} ({llava.manifest.model.decoder}; "
            f"{llava.manifest.model.vision}); give the checkpoint that it was exported from"
        )
    stored = None if llava.manifest.quantization is None else with_stored_decoder(checkpoint, bundle)
    stages = []
    with torch.inference_mode():
        for stage in _stages(llava, checkpoint, stored, prompt, picture, max_new_tokens):
            stages.append(stage)
            on_stage(stage)
    return VerifyReport(llava.backend, prompt, tuple(stages))


def _stages(
    llava: Llava,
    checkpoint: Checkpoint,
    stored: Checkpoint | None,
    prompt: str,
    picture: PictureSource,
    max_new_tokens: int,
) -> Iterator[StageResult]:
    """``stored``: the checkpoint with the decoder's weights of a quantised bundle."""
    manifest, recipe = llava.manifest, checkpoint.image
    model = load_torch(checkpoint)
    tolerance = TOLERANCE[manifest.model.precision]
    image = load_picture(picture)
    pixels = llava.encoder.pixels([image])  # [1, 3, height, width]
    yield _pixel_stage(pixels, reference_pixels(image, recipe), manifest)

    found = _all_outputs(llava.directory / VISION_GRAPH, {"pixel_values": pixels.astype(manifest.vision.dtype)})
    states = model.hidden_states(torch.from_numpy(pixels))
    for index in range(len(states)):
        if (name := hidden_state_name(index)) in found:
            yield _stage(f"tower {name}", "tower", found[name], states[index], tolerance)
    selected = model.select(states)
    yield _stage("tower features", "tower", found[TOWER_FEATURES], selected, tolerance)
    features = model.projector(selected)  # [1, patches, hidden]
    yield _stage("projector", "projector", found["image_features"], features, tolerance)

    ids = tokenize_prompt(prompt, llava.encoder.tokenizer, manifest.chat)
    batch = llava.encoder.encode([prompt], [[image]], llava.max_len)
    embeds = batch.tokens.on_host()  # [1, seq, hidden]
    spliced = reference_splice(
        torch.from_numpy(ids)[None], None, None, None, list(features), embed=model.embed, options=SpliceOptions()
    )
    want = spliced.inputs_embeds
    yield _stage("splice", "splice", embeds, want, tolerance)

    if stored is not None:
        own_logits = _decoder_states(model, want)[1]
        del model  # before the other one comes
        model = load_torch(stored)
        close = tolerance if quantized_in_decoder(checkpoint) else QUANTIZED_TOLERANCE
        yield _stage("decoder weights", "weights", _decoder_states(model, want)[1].numpy(), own_logits, close)

    seq = embeds.shape[1]
    start = np.zeros(1, np.int64)
    cache = np.zeros((1, manifest.decoder.kv_heads, seq, manifest.decoder.head_dim), manifest.decoder.dtype)
    feed = {
        "inputs_embeds": embeds,
        "position_ids": step_positions(start, seq),
        "write_indices": start,
        "attention_mask": step_mask(start, seq),
        "last_index": np.array([seq - 1]),
        **{past_name(i, part): cache for i in range(manifest.decoder.layers) for part in ("key", "value")},
    }
    found = _all_outputs(llava.directory / DECODER_GRAPH, feed)
    layers, logits = _decoder_states(model, want)
    for index, state in enumerate(layers, start=1):
        name = hidden_state_name(index)
        yield _stage(f"decoder {name}", "decoder", found[name], state, tolerance)
    yield _stage("logits", "logits", found["logits"], logits, tolerance)

    llava.decoder.begin(1)
    loaded = prefill(llava.decoder, batch.tokens)  # [1, vocab]
    yield _stage("logits of what is loaded", "logits", loaded, logits, tolerance if stored is None else INT8_TOLERANCE)
    noise = float(np.abs(loaded - logits.numpy()).max())
    yield _token_stage(llava, model, prompt, image, want, noise, max_new_tokens)


def _pixel_stage(found: np.ndarray, want: np.ndarray, manifest: Manifest) -> StageResult:
    """Errors in 8-bit levels: normalised values times the deviation, over the rescale factor."""
    recipe = manifest.image
    std = np.array(recipe.std if recipe.std is not None else (1.0, 1.0, 1.0), np.float32)[:, None, None]
    factor = recipe.rescale_factor if recipe.rescale_factor is not None else 1.0
    if found.shape != want.shape:
        shapes = f"shapes differ: {list(found.shape)}, PyTorch {list(want.shape)}"
        return StageResult("pixels", "pixels", float("inf"), float("inf"), 1.0, shapes)
    difference = np.abs(found - want)
    levels = float((difference * std / factor).max())
    # A level as float32 comes out of the arithmetic: 1.0000 is one level.
    return StageResult("pixels", "pixels", float(difference.max()), round(levels, 3), 1.0, f"{levels:.3f} levels")


def _stage(name: str, kind: str, found: np.ndarray, wanted: torch.Tensor, tolerance: float) -> StageResult:
    want = wanted.float().numpy()
    difference = found.astype(np.float32) - want
    # Position by position: the features of a picture are so much larger than text that together they would hide it.
    relative = float((np.linalg.norm(difference, axis=-1) / np.maximum(np.linalg.norm(want, axis=-1), 1e-30)).max())
    worst = float(np.abs(difference).max())
    return StageResult(name, kind, worst, relative, tolerance, f"relative error {relative:.1e}, largest {worst:.1e}")


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


def _token_stage(
    llava: Llava, model: TorchLlava, prompt: str, image: Image.Image, embeds: torch.Tensor, noise: float, most: int
) -> StageResult:
    """Greedy tokens of both; where they part, PyTorch's own two choices may be no further apart than the noise."""
    answer = llava.generate([prompt], [[image]], max_new_tokens=most)[0]
    found, stop = answer.token_ids, list(llava.manifest.chat.stop_token_ids)
    decoder: Any = model.decoder  # generate's own annotations know no LlamaForCausalLM
    output = decoder.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0] if stop else 0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    want = tuple(output.sequences[0].tolist())
    if answer.finish_reason == "context" or (answer.finish_reason == "stop" and found[-1] not in stop):
        want = want[: len(found)]  # PyTorch knows no stop strings and no end of the cache
    longest = max(len(found), len(want))
    at = next((i for i in range(longest) if found[i : i + 1] != want[i : i + 1]), longest)
    if at == longest:
        return StageResult("tokens", "tokens", 0.0, 0.0, 0.0, f"{longest} of {longest} greedy tokens equal")
    detail = f"{at} of {longest} greedy tokens equal"
    if at < min(len(found), len(want)):
        row = output.logits[at][0]
        margin = float(row[want[at]] - row[found[at]])
        if margin <= 2 * noise:
            detail += f", then a near-tie: margin {margin:.1e}, logits differ by {noise:.1e}"
            return StageResult("tokens", "tokens", margin, 0.0, 0.0, detail)
        detail += f", then PyTorch's choice leads by {margin:.1e}, logits differ by {noise:.1e}"
    return StageResult("tokens", "tokens", float("inf"), float(longest - at), 0.0, detail)


def _all_outputs(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a canonical graph with its hidden states as outputs too."""
    model = ir.load(path)
    names = {value.name for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            named = value.name is not None and (value.name.startswith(HIDDEN_STATES) or value.name == TOWER_FEATURES)
            if named and value.name not in names:
                model.graph.outputs.append(value)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry(ACCURACY_LEVEL_ENTRY, "1")  # float32, as PyTorch computes
    # The graph comes as bytes; this says where its external data is.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    graph = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feed), strict=True))
