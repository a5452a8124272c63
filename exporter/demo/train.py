"""Trains the tiny LLaVA that ships with the package.

    python -m llava_deploy.exporter.demo.train --out DIRECTORY

Three stages, each with AdamW under a warm-up and a cosine.  *Look*: tower and projector learn to put each patch's
feature near the embeddings of the words for what lies there.  Without it the decoder ignores the pictures for thousands
of steps.  *Talk*: the whole model, through the reference class and its splice, learns to answer, first what the whole
picture shows, where each word tells the next one's place to look, then conversations of several questions.  Two more
losses stay on at a smaller weight: the look loss, and *pointing*: halfway through the decoder, the word that completes
an object's name in a question has to have fetched that object's shape, colour and place.  *Practice*: the same at a
lower rate, most questions now about relations, which come last.

The same options on the same machine with the same torch give the same checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

from llava_deploy.exporter.demo.batches import (
    Batch,
    conversation_batch,
    objects_by_patch,
    random_scenes,
    scene_pixels,
)
from llava_deploy.exporter.demo.conversations import ALL_FORMS, RELATIONS_FIRST, ConversationWriter, Course
from llava_deploy.exporter.demo.model import build_model, look_for_likeness, save_checkpoint
from llava_deploy.exporter.demo.naming import Naming
from llava_deploy.exporter.demo.tokens import PAD, token_id, train_tokenizer
from llava_deploy.exporter.reference import LlavaLlamaForCausalLM, from_checkpoint

Report = Callable[[str], None]

SAVE_EVERY = 200  # steps; a run that is cut short leaves what it had
POINTING_LAYER = 2  # decoder layers after which the name of an object has to have found it


@dataclass(frozen=True)
class Recipe:
    """Everything the training depends on.  Rates are AdamW's peak learning rates."""

    seed: int = 0
    look_steps: int = 550
    look_rows: int = 64
    look_rate: float = 1e-3
    talk_steps: int = 1100
    describe_steps: int = 60  # of the talk steps, the first: only what the whole picture shows is asked
    naming_steps: int = 60  # of the talk steps, the next: mostly which colour each shape has
    talk_rows: int = 32
    talk_rate: float = 1.5e-3
    eyes_rate: float = 5e-4  # of tower and projector in the talk stage: more undoes what they learned
    look_weight: float = 0.5  # of the look loss, in the talk stage
    point_weight: float = 0.5  # of the pointing loss, in the talk stage
    practice_steps: int = 300
    practice_rate: float = 7e-4
    practice_eyes_rate: float = 2e-4
    warm_up: int = 100
    practice_warm_up: int = 50
    weight_decay: float = 0.05
    long_every: int = 10  # every so many talk steps the conversations are long and about two pictures

    @property
    def turns(self) -> tuple[int, ...]:
        """Questions in a conversation, drawn anew for each batch."""
        return 2, 4, 6, 8


class _Stage:
    """An optimiser with its schedule: warm-up, then a cosine to a fiftieth of the rate."""

    def __init__(
        self, groups: Iterable[tuple[list[nn.Module], float]], steps: int, warm_up: int, recipe: Recipe
    ) -> None:
        """Takes modules with the rate at which each group of them learns."""
        options: list[dict[str, Any]] = [
            {"params": [parameter for module in modules for parameter in module.parameters()], "lr": rate}
            for modules, rate in groups
        ]
        self._parameters = [parameter for option in options for parameter in option["params"]]
        self._optimizer = torch.optim.AdamW(options, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min(1.0, (step + 1) / warm_up) * (0.51 + 0.49 * math.cos(math.pi * step / max(1, steps))),
        )

    def step(self, loss: torch.Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()


def train(recipe: Recipe, out: Path, report: Report) -> list[float]:
    """Trains and writes the checkpoint to `out`; gives the loss at every step of the talk and practice stages."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    naming = Naming(tokenizer)
    model.train()
    _look(model, naming, recipe, rng, report)
    look_for_likeness(model)
    writer, pad = ConversationWriter(tokenizer), token_id(tokenizer, PAD)
    lesson = _talk(model, naming, recipe, writer, rng, pad)
    losses = _taken(lesson, "talk", recipe.talk_steps, report, lambda: _save(model, tokenizer, out))
    return losses + practise(recipe, out, out, report)


def practise(recipe: Recipe, talked: Path, out: Path, report: Report) -> list[float]:
    """The last stage, from the checkpoint that the talk stage wrote to `talked`; gives the loss at every step."""
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer()
    model = from_checkpoint(talked).requires_grad_(True).train()
    lesson = _practise(model, Naming(tokenizer), recipe, ConversationWriter(tokenizer), token_id(tokenizer, PAD))
    return _taken(lesson, "practice", recipe.practice_steps, report, lambda: _save(model, tokenizer, out))


def _save(model: LlavaLlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    save_checkpoint(copy.deepcopy(model).eval(), tokenizer, out)


def _taken(lesson: Iterator[float], name: str, steps: int, report: Report, save: Callable[[], None]) -> list[float]:
    losses: list[float] = []
    for step, loss in enumerate(lesson, start=1):
        losses.append(loss)
        if step % 50 == 0:
            report(f"{name} {step:5d} of {steps}  loss {sum(losses[-50:]) / 50:.4f}")
        if step % SAVE_EVERY == 0 or step == steps:
            save()
    return losses


def _eyes(model: LlavaLlamaForCausalLM) -> list[nn.Module]:
    return [cast(nn.Module, model.get_vision_tower()), model.get_model().mm_projector]


def _look(model: LlavaLlamaForCausalLM, naming: Naming, recipe: Recipe, rng: random.Random, report: Report) -> None:
    words = model.get_model().embed_tokens
    stage = _Stage([([*_eyes(model), words], recipe.look_rate)], recipe.look_steps, recipe.warm_up, recipe)
    for step in range(recipe.look_steps):
        scenes = random_scenes(recipe.look_rows, rng)
        loss = naming.loss(model.encode_images(scene_pixels(scenes)), words.weight, objects_by_patch(scenes))
        stage.step(loss)
        if step % 50 == 0:
            report(f"look {step:5d} of {recipe.look_steps}  loss {loss.item():.4f}")


def _talk(
    model: LlavaLlamaForCausalLM,
    naming: Naming,
    recipe: Recipe,
    writer: ConversationWriter,
    rng: random.Random,
    pad: int,
) -> Iterator[float]:
    groups = [(_eyes(model), recipe.eyes_rate), (_words(model), recipe.talk_rate)]
    stage = _Stage(groups, recipe.talk_steps, recipe.warm_up, recipe)
    for step in range(recipe.talk_steps):
        course = _course(recipe, step, rng)
        yield _step(model, naming, recipe, stage, conversation_batch(writer, course, pad, rng))


def _practise(
    model: LlavaLlamaForCausalLM, naming: Naming, recipe: Recipe, writer: ConversationWriter, pad: int
) -> Iterator[float]:
    rng = random.Random(f"practice/{recipe.seed}")
    groups = [(_eyes(model), recipe.practice_eyes_rate), (_words(model), recipe.practice_rate)]
    stage = _Stage(groups, recipe.practice_steps, recipe.practice_warm_up, recipe)
    for _ in range(recipe.practice_steps):
        turns = rng.choice(recipe.turns)
        course = Course(recipe.talk_rows, pictures=1, turns=turns, describing=0.1, naming=0.0, weights=RELATIONS_FIRST)
        yield _step(model, naming, recipe, stage, conversation_batch(writer, course, pad, rng))


def _step(model: LlavaLlamaForCausalLM, naming: Naming, recipe: Recipe, stage: _Stage, batch: Batch) -> float:
    """Learn from one batch; the loss of the answers before that."""
    loss, answers_loss = _loss(model, naming, batch, recipe)
    stage.step(loss)
    return answers_loss


def _words(model: LlavaLlamaForCausalLM) -> list[nn.Module]:
    decoder = model.get_model()
    return [decoder.embed_tokens, decoder.layers, decoder.norm, model.lm_head]


def _course(recipe: Recipe, step: int, rng: random.Random) -> Course:
    rows = recipe.talk_rows
    if step < recipe.describe_steps:
        return Course(rows + rows // 2, pictures=1, turns=1, describing=1.0, naming=0.0, weights=ALL_FORMS)
    if step < recipe.describe_steps + recipe.naming_steps:
        return Course(rows + rows // 2, pictures=1, turns=1, describing=0.3, naming=0.7, weights=ALL_FORMS)
    if step % recipe.long_every == recipe.long_every - 1:
        return Course(rows // 2, pictures=2, turns=8, describing=0.1, naming=0.05, weights=ALL_FORMS)
    turns = rng.choice(recipe.turns)
    return Course(rows, pictures=1, turns=turns, describing=0.1, naming=0.1, weights=ALL_FORMS)


def _loss(model: LlavaLlamaForCausalLM, naming: Naming, batch: Batch, recipe: Recipe) -> tuple[torch.Tensor, float]:
    """The whole loss, and the answers' part of it.

    No mask: rows are padded on the right, where no answer sees them, and attention without a mask is faster.
    """
    encoded: list[torch.Tensor] = []
    hook = model.get_model().mm_projector.register_forward_hook(lambda _module, _inputs, output: encoded.append(output))
    try:
        outputs = model(
            input_ids=batch.input_ids,
            labels=batch.labels,
            images=batch.pixels,
            use_cache=False,
            output_hidden_states=True,
        )
    finally:
        hook.remove()
    if outputs.loss is None or outputs.hidden_states is None:
        raise RuntimeError("the model was asked for its loss and its hidden states and returned one of them only")
    words = model.get_model().embed_tokens.weight
    loss = outputs.loss + recipe.look_weight * naming.loss(encoded[0], words, batch.objects)
    if len(batch.mentions):
        row, column = batch.mentions.unbind(dim=1)
        found = outputs.hidden_states[POINTING_LAYER][row, column]  # [mentions, hidden]
        found = functional.rms_norm(found, found.shape[-1:])
        loss = loss + recipe.point_weight * naming.loss(found[None], words, batch.mentioned[None])
    return loss, outputs.loss.item()


def main() -> None:
    """The command line; progress goes to standard output with the seconds since the start."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description="Train the tiny LLaVA that ships with llava-deploy.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--look-steps", type=int, default=recipe.look_steps)
    parser.add_argument("--steps", type=int, default=recipe.talk_steps, help="steps of the talk stage")
    parser.add_argument("--practise", type=Path, metavar="DIR", help="only the last stage, from the talk stage's file")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    recipe = Recipe(seed=options.seed, look_steps=options.look_steps, talk_steps=options.steps)

    def report(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)  # noqa: T201 (a script)

    if options.practise is None:
        train(recipe, options.out, report)
    else:
        practise(recipe, options.practise, options.out, report)


if __name__ == "__main__":
    main()
