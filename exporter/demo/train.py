"""Trains the tiny LLaVA that ships with the package.

    python -m llava_deploy.exporter.demo.train --out DIRECTORY

Two stages, both with AdamW under a warm-up and a cosine.  *Look*: tower and projector learn to say, through a linear
head that is thrown away afterwards, which shape in which colour lies in each patch's cell.  Without it the decoder
ignores the pictures for thousands of steps.  *Talk*: the whole model, through the reference class and its splice,
learns to answer in conversations of several questions; the look loss stays on at a small weight.

The same options on the same machine with the same torch give the same checkpoint.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from llava_deploy.exporter.demo.batches import (
    Batch,
    conversation_batch,
    objects_by_patch,
    random_scenes,
    scene_pixels,
)
from llava_deploy.exporter.demo.conversations import ConversationWriter
from llava_deploy.exporter.demo.model import build_model, save_checkpoint
from llava_deploy.exporter.demo.scenes import COLOURS, SHAPES
from llava_deploy.exporter.demo.tokens import PAD, train_tokenizer
from llava_deploy.exporter.reference import LlavaLlamaForCausalLM

Report = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything the training depends on.  Rates are AdamW's peak learning rates."""

    seed: int = 0
    look_steps: int = 600
    look_rows: int = 64
    look_rate: float = 1e-3
    talk_steps: int = 1200
    talk_rows: int = 32
    talk_rate: float = 1e-3
    eyes_rate: float = 3e-4  # of tower and projector in the talk stage: more undoes what they learned
    look_weight: float = 0.2  # of the look loss, in the talk stage
    warm_up: int = 100
    weight_decay: float = 0.05
    long_every: int = 10  # every so many talk steps the conversations are long and about two pictures

    @property
    def turns(self) -> tuple[int, ...]:
        """Questions in a conversation, drawn anew for each batch."""
        return 2, 6, 10


class PatchHead(nn.Module):
    """Says of each image feature which shape and which colour lie in its cell, or that none does."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = [len(SHAPES) + 1, len(COLOURS) + 1]
        self.linear = nn.Linear(hidden, sum(self.sizes))

    def loss(self, features: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        """Cross-entropy; features `[pictures, patches, hidden]`, objects `[pictures, patches, 2]`."""
        shapes, colours = self.linear(features).flatten(0, 1).split(self.sizes, dim=1)
        wanted = objects.flatten(0, 1)
        return functional.cross_entropy(shapes, wanted[:, 0]) + functional.cross_entropy(colours, wanted[:, 1])


class _Stage:
    """An optimiser with its schedule: warm-up, then a cosine to a fiftieth of the rate."""

    def __init__(self, groups: Iterable[tuple[list[nn.Module], float]], steps: int, recipe: Recipe) -> None:
        """Takes modules with the rate at which each group of them learns."""
        options = [
            {"params": [parameter for module in modules for parameter in module.parameters()], "lr": rate}
            for modules, rate in groups
        ]
        self._parameters = [parameter for option in options for parameter in option["params"]]
        self._optimizer = torch.optim.AdamW(options, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min(1.0, (step + 1) / recipe.warm_up) * (0.51 + 0.49 * math.cos(math.pi * step / steps)),
        )

    def step(self, loss: torch.Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()


def train(recipe: Recipe, out: Path, report: Report) -> list[float]:
    """Trains and writes the checkpoint to `out`; gives the talk stage's loss at every step."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    head = PatchHead(model.config.hidden_size)
    model.train()
    _look(model, head, recipe, rng, report)
    writer = ConversationWriter(tokenizer)
    losses = _talk(model, head, recipe, writer, rng, tokenizer.token_to_id(PAD), report)
    save_checkpoint(model.eval(), tokenizer, out)
    return losses


def _eyes(model: LlavaLlamaForCausalLM) -> list[nn.Module]:
    return [model.get_model().vision_tower, model.get_model().mm_projector]


def _look(model: LlavaLlamaForCausalLM, head: PatchHead, recipe: Recipe, rng: random.Random, report: Report) -> None:
    stage = _Stage([([*_eyes(model), head], recipe.look_rate)], recipe.look_steps, recipe)
    for step in range(recipe.look_steps):
        scenes = random_scenes(recipe.look_rows, rng)
        loss = head.loss(model.encode_images(scene_pixels(scenes)), objects_by_patch(scenes))
        stage.step(loss)
        if step % 50 == 0:
            report(f"look {step:5d} of {recipe.look_steps}  loss {loss.item():.4f}")


def _talk(
    model: LlavaLlamaForCausalLM,
    head: PatchHead,
    recipe: Recipe,
    writer: ConversationWriter,
    rng: random.Random,
    pad: int,
    report: Report,
) -> list[float]:
    decoder = model.get_model()
    words = [decoder.embed_tokens, decoder.layers, decoder.norm, model.lm_head]
    groups = [([*_eyes(model), head], recipe.eyes_rate), (words, recipe.talk_rate)]
    stage = _Stage(groups, recipe.talk_steps, recipe)
    losses: list[float] = []
    for step in range(recipe.talk_steps):
        if step % recipe.long_every == recipe.long_every - 1:
            batch = conversation_batch(writer, recipe.talk_rows // 2, 2, 8, rng, pad)
        else:
            batch = conversation_batch(writer, recipe.talk_rows, 1, rng.choice(recipe.turns), rng, pad)
        loss, look_loss = _losses(model, head, batch)
        stage.step(loss + recipe.look_weight * look_loss)
        losses.append(loss.item())
        if step % 50 == 0:
            recent = losses[-50:]
            report(f"talk {step:5d} of {recipe.talk_steps}  loss {sum(recent) / len(recent):.4f}")
    return losses


def _losses(model: LlavaLlamaForCausalLM, head: PatchHead, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the answers and that of the patches, from one pass through the tower."""
    encoded: list[torch.Tensor] = []
    hook = model.get_model().mm_projector.register_forward_hook(lambda _module, _inputs, output: encoded.append(output))
    try:
        outputs = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            images=batch.pixels,
            use_cache=False,
        )
    finally:
        hook.remove()
    if outputs.loss is None:
        raise RuntimeError("the model was given labels and returned no loss")
    return outputs.loss, head.loss(encoded[0], batch.objects)


def main() -> None:
    """The command line; progress goes to standard output with the seconds since the start."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description="Train the tiny LLaVA that ships with llava-deploy.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--look-steps", type=int, default=recipe.look_steps)
    parser.add_argument("--steps", type=int, default=recipe.talk_steps, help="steps of the talk stage")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    train(
        Recipe(seed=options.seed, look_steps=options.look_steps, talk_steps=options.steps),
        options.out,
        lambda line: print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True),  # noqa: T201 (a script)
    )


if __name__ == "__main__":
    main()
