"""PyTorch's values for a prompt, stage by stage, in float32: pixels, image features, spliced embeddings, logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from llava_deploy.engines.goldens import GoldenArray
from llava_deploy.engines.planner.machine import available_memory
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD
from llava_deploy.exporter.goldens.layers import LayeredPrompt, answer_layer_by_layer
from llava_deploy.exporter.goldens.pictures import open_png
from llava_deploy.exporter.goldens.prompts import Prompt
from llava_deploy.exporter.reference.pixels import reference_pixels
from llava_deploy.exporter.reference.splice import SpliceOptions, splice
from llava_deploy.exporter.reference.torch_decoder import GreedyAnswer, greedy_answer
from llava_deploy.exporter.reference.torch_model import exact_float32, load_decoder, load_vision

Loading: TypeAlias = Literal["auto", "whole", "layers"]
"""How the decoder is held: ``whole`` in float32, or one of its ``layers`` at a time; ``auto``: whole where it fits."""

_ROOM = 1 << 30
"""Bytes beside the decoder's weights: hidden states, keys and values, PyTorch itself."""


@dataclass(frozen=True)
class Recorded:
    """What a golden holds: its prompt, the answer's tokens, and arrays as :meth:`Golden.shape` has them, float32."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    arrays: dict[GoldenArray, np.ndarray]


Step: TypeAlias = Callable[[int, int], None]
"""Tells how much is done, and of how much."""


def answer_prompts(
    vision: Checkpoint,
    decoder: Checkpoint,
    prompts: Sequence[Prompt],
    loading: Loading,
    device: torch.device,
    on_progress: Step,
) -> tuple[Recorded, ...]:
    """Everything that a golden holds, of each prompt.

    Args:
        vision: whose tower, projector and embedding table are taken.
        decoder: whose decoder is taken.
        prompts: as they were chosen.
        loading: how the decoder is held.
        device: where PyTorch computes.
        on_progress: called after each step; there may be fewer steps in the end.
    """
    layered = loading == "layers" or (loading == "auto" and not fits(decoder, device))
    layers = decoder.config.decoder.num_hidden_layers if layered else 1
    passes = max(prompt.most for prompt in prompts) if layered else len(prompts)
    total, done = 1 + layers * passes, 0
    on_progress(done, total)

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    with torch.inference_mode(), exact_float32():
        arrays = _embedded(vision, prompts, device)
        step()
        embeds = [torch.from_numpy(found["inputs_embeds"])[None] for found in arrays]
        if layered:
            given = [LayeredPrompt(rows, prompt.most) for rows, prompt in zip(embeds, prompts, strict=True)]
            answers = answer_layer_by_layer(decoder, given, device, step)
        else:
            answers = list(_answered_whole(decoder, prompts, embeds, device, step))
    for found, answer in zip(arrays, answers, strict=True):
        found["logits"] = answer.logits.cpu().numpy()
    return tuple(
        Recorded(prompt, answer.token_ids, found)
        for prompt, answer, found in zip(prompts, answers, arrays, strict=True)
    )


def fits(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether the decoder in float32 fits the memory that is free: the machine's, where it is read, and the device's.

    Where the system does not say, it is taken not to.
    """
    free = available_memory()
    if free is not None and device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    values = sum(
        math.prod(source.shape)
        for name, source in checkpoint.tensors.items()
        if name == LM_HEAD or name.startswith("language_model.")
    )
    return free is not None and values * np.dtype(np.float32).itemsize + _ROOM <= free


def _embedded(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], device: torch.device
) -> list[dict[GoldenArray, np.ndarray]]:
    """Pixels, features and spliced embeddings; the tower is in memory no longer than this takes."""
    pictured = any(prompt.question.pictures for prompt in prompts)
    model = load_vision(checkpoint) if pictured else None
    if model is not None:
        model.tower.to(device)
        model.projector.to(device)
    table = checkpoint.tensors[EMBED_TOKENS].read()  # [vocab, hidden]

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.array(table[ids.numpy()], np.float32))

    found = []
    for prompt in prompts:
        arrays: dict[GoldenArray, np.ndarray] = {}
        # In the splice, a row of text uses up one picture's place: give it one that is empty.
        features = [torch.zeros(0, table.shape[1])]
        if model is not None and prompt.question.pictures:
            pixels = [reference_pixels(open_png(data), checkpoint.image) for data in prompt.question.pictures]
            features = [model.features(torch.from_numpy(picture).to(device))[0].cpu() for picture in pixels]
            arrays["pixel_values"] = np.concatenate(pixels)
            arrays["image_features"] = torch.stack(features).numpy()
        ids = torch.tensor(prompt.ids)[None]
        spliced = splice(ids, None, None, None, features, embed=embed, options=SpliceOptions())
        arrays["inputs_embeds"] = spliced.inputs_embeds[0].numpy()
        found.append(arrays)
    return found


def _answered_whole(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    embeds: Sequence[torch.Tensor],
    device: torch.device,
    step: Callable[[], None],
) -> Iterator[GreedyAnswer]:
    decoder = load_decoder(checkpoint).to(device)
    for prompt, rows in zip(prompts, embeds, strict=True):
        yield greedy_answer(decoder, rows.to(device), checkpoint.chat.stop_token_ids, prompt.most)
        step()
