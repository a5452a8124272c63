"""How often the tiny LLaVA is right, in PyTorch, with the pictures and without.

python -m llava_deploy.exporter.demo.evaluate [CHECKPOINT]
"""

from __future__ import annotations

import argparse
from enum import Enum
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.exporter.demo.model import to_pixels
from llava_deploy.exporter.demo.scenes import KINDS, Example, Split, chance, checkpoint_dir, examples
from llava_deploy.exporter.demo.tokens import BOS, EOS, PAD, SYSTEM, token_id
from llava_deploy.exporter.reference import LlavaLlamaForCausalLM, from_checkpoint
from llava_deploy.runtime.evaluation import normalise

_LONGEST_ANSWER = 16  # tokens
_ROWS = 100


class View(Enum):
    """What the model is shown: the picture, or mid-grey in its place."""

    PICTURE = "picture"
    BLANK = "blank"


def answers(
    model: LlavaLlamaForCausalLM, tokenizer: Tokenizer, asked: list[Example], view: View = View.PICTURE
) -> list[str]:
    """The model's greedy answers, in the vicuna_v1 format."""
    said: list[str] = []
    for start in range(0, len(asked), _ROWS):
        part = asked[start : start + _ROWS]
        pixels = to_pixels([example.picture for example in part])
        if view is View.BLANK:
            pixels = torch.zeros_like(pixels)  # CLIP's mean colour
        rows = [_prompt(tokenizer, example.question) for example in part]
        longest = max(map(len, rows))
        pad = token_id(tokenizer, PAD)
        input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        tokens = model.generate(
            input_ids,
            images=pixels,
            attention_mask=mask,
            max_new_tokens=_LONGEST_ANSWER,
            do_sample=False,
            eos_token_id=token_id(tokenizer, EOS),
            pad_token_id=pad,
        )
        said += [text.strip() for text in tokenizer.decode_batch(tokens.tolist())]
    return said


def accuracy(
    model: LlavaLlamaForCausalLM, tokenizer: Tokenizer, asked: list[Example], view: View = View.PICTURE
) -> dict[str, float]:
    """The share of right answers for each kind that was asked."""
    right: dict[str, list[bool]] = {}
    for example, text in zip(asked, answers(model, tokenizer, asked, view), strict=True):
        right.setdefault(example.kind, []).append(normalise(text) == normalise(example.answer))
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


def _prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    before = tokenizer.encode(f"{SYSTEM} USER: ", add_special_tokens=False).ids
    after = tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False).ids
    return [token_id(tokenizer, BOS), *before, IMAGE_TOKEN_INDEX, *after]


def main() -> None:
    """The command line; prints a table."""
    parser = argparse.ArgumentParser(description="Measure the tiny LLaVA in PyTorch on held-out pictures.")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=checkpoint_dir())
    parser.add_argument("--count", type=int, default=2500, help="questions, the kinds in turn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = from_checkpoint(options.checkpoint)
    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    asked = list(islice(examples(Split.HELD_OUT, options.seed), options.count))
    seen, blank = (accuracy(model, tokenizer, asked, view) for view in View)
    print(f"{'kind':10} {'held out':>9} {'blank':>7} {'chance':>7}")  # noqa: T201 (a script)
    for kind in KINDS:
        print(f"{kind:10} {seen[kind]:9.1%} {blank[kind]:7.1%} {chance(kind):7.1%}")  # noqa: T201


if __name__ == "__main__":
    main()
