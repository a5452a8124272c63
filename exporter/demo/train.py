"""Trains the tiny LLaVA that ships with the package.

    python -m llava_deploy.exporter.demo.train --out DIRECTORY

Two stages, both with AdamW under a warm-up and a cosine.  *Look*: tower and projector learn to put each patch's feature
near the embeddings of the words for what lies there.  Without it the decoder ignores the pictures for thousands of
steps.  *Talk*: the whole model, through the reference class and its splice,
learns to answer, first what the whole picture shows, where each word tells the next one's place to look, then
conversations of several questions; the look loss stays on at a small weight.

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
    PATCH_WORDS,
    Batch,
    Course,
    conversation_batch,
    objects_by_patch,
    random_scenes,
    scene_pixels,
)
from llava_deploy.exporter.demo.conversations import ConversationWriter
from llava_deploy.exporter.demo.model import build_model, save_checkpoint
from llava_deploy.exporter.demo.tokens import PAD, UNK, token_id, train_tokenizer
from llava_deploy.exporter.reference import LlavaLlamaForCausalLM

Report = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything the training depends on.  Rates are AdamW's peak learning rates."""

    seed: int = 0
    look_steps: int = 500
    look_rows: int = 64
    look_rate: float = 1e-3
    talk_steps: int = 1300
    talk_rows: int = 32
    talk_rate: float = 1.5e-3
    describe_steps: int = 250  # of the talk steps, the first: only whole pictures are asked for
    eyes_rate: float = 5e-4  # of tower and projector in the talk stage: more undoes what they learned
    look_weight: float = 0.5  # of the look loss, in the talk stage
    warm_up: int = 100
    weight_decay: float = 0.05
    long_every: int = 10  # every so many talk steps the conversations are long and about two pictures
    save_every: int = 250  # talk steps; a run that is cut short leaves what it had

    @property
    def turns(self) -> tuple[int, ...]:
        """Questions in a conversation, drawn anew for each batch."""
        return 2, 4, 6, 8


class Naming:
    """Holds image features to the words for what they show.

    Each patch's feature, multiplied with the decoder's word embeddings, has to pick the shape, the colour, the row and
    the column of the object in its cell, or `<unk>` where there is nothing to say.  So pictures arrive in the decoder
    as words it is asked about, and finding "the red object" is looking for what resembles " red".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        nothing = token_id(tokenizer, UNK)
        self._groups = [torch.tensor([*(_word(tokenizer, name) for name in names), nothing]) for names in PATCH_WORDS]

    def loss(self, features: torch.Tensor, embeddings: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the groups of words.

        Features are `[pictures, patches, hidden]`, embeddings `[vocabulary, hidden]`, objects
        `[pictures, patches, groups]`.
        """
        rows = features.flatten(0, 1)
        losses = [
            functional.cross_entropy(rows @ embeddings[group].T, objects[..., index].flatten())
            for index, group in enumerate(self._groups)
        ]
        return torch.stack(losses).mean()


def _word(tokenizer: Tokenizer, name: str) -> int:
    ids = tokenizer.encode(f" {name}", add_special_tokens=False).ids
    if len(ids) != 1:
        raise ValueError(f"want {name!r} to be one token, got {len(ids)}; train the tokenizer on text that has it")
    return int(ids[0])


class _Stage:
    """An optimiser with its schedule: warm-up, then a cosine to a fiftieth of the rate."""

    def __init__(self, groups: Iterable[tuple[list[nn.Module], float]], steps: int, recipe: Recipe) -> None:
        """Takes modules with the rate at which each group of them learns."""
        options: list[dict[str, Any]] = [
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
    naming = Naming(tokenizer)
    model.train()
    _look(model, naming, recipe, rng, report)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_model().embed_tokens.weight)
    losses: list[float] = []
    for loss in _talk(model, naming, recipe, ConversationWriter(tokenizer), rng, token_id(tokenizer, PAD)):
        losses.append(loss)
        if len(losses) % 50 == 0:
            report(f"talk {len(losses):5d} of {recipe.talk_steps}  loss {sum(losses[-50:]) / 50:.4f}")
        if len(losses) % recipe.save_every == 0 or len(losses) == recipe.talk_steps:
            save_checkpoint(copy.deepcopy(model).eval(), tokenizer, out)
    return losses


def _eyes(model: LlavaLlamaForCausalLM) -> list[nn.Module]:
    return [cast(nn.Module, model.get_vision_tower()), model.get_model().mm_projector]


def _look(model: LlavaLlamaForCausalLM, naming: Naming, recipe: Recipe, rng: random.Random, report: Report) -> None:
    words = model.get_model().embed_tokens
    stage = _Stage([([*_eyes(model), words], recipe.look_rate)], recipe.look_steps, recipe)
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
    decoder = model.get_model()
    words = [decoder.embed_tokens, decoder.layers, decoder.norm, model.lm_head]
    groups = [(_eyes(model), recipe.eyes_rate), (words, recipe.talk_rate)]
    stage = _Stage(groups, recipe.talk_steps, recipe)
    for step in range(recipe.talk_steps):
        batch = conversation_batch(writer, _course(recipe, step, rng), pad, rng)
        loss, look_loss = _losses(model, naming, batch)
        stage.step(loss + recipe.look_weight * look_loss)
        yield loss.item()


def _course(recipe: Recipe, step: int, rng: random.Random) -> Course:
    if step < recipe.describe_steps:
        return Course(rows=recipe.talk_rows + recipe.talk_rows // 2, pictures=1, turns=1, describing=1.0)
    if step % recipe.long_every == recipe.long_every - 1:
        return Course(rows=recipe.talk_rows // 2, pictures=2, turns=8, describing=0.1)
    return Course(rows=recipe.talk_rows, pictures=1, turns=rng.choice(recipe.turns), describing=0.15)


def _losses(model: LlavaLlamaForCausalLM, naming: Naming, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the answers and that of the patches, from one pass through the tower.

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
        )
    finally:
        hook.remove()
    if outputs.loss is None:
        raise RuntimeError("the model was given labels and returned no loss")
    return outputs.loss, naming.loss(encoded[0], model.get_model().embed_tokens.weight, batch.objects)


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
