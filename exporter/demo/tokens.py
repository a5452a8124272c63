"""The tiny model's tokenizer: byte-level BPE over what is said about scenes, so that any text has tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llava_deploy.exporter.demo.scenes import DESCRIBE, Form, Split, describe, questions, random_scene

VOCABULARY = 640  # rows of the embedding: five special tokens, 256 bytes, merges
BOS, EOS, PAD, UNK, IMAGE = "<s>", "</s>", "<pad>", "<unk>", "<image>"
SPECIAL = (UNK, BOS, EOS, PAD, IMAGE)  # ids 0 to 4; unk, bos and eos where Llama has them
LONGEST = 1024  # tokens of context, picture features included

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

# vicuna_v1: system sentence, then turns separated by a space after the user's and by </s> after the assistant's.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% if system is not string %}{% set system = system | map(attribute='text') | join(' ') %}{% endif %}"
    "{% else %}{% set system = " + json.dumps(SYSTEM) + " %}{% set turns = messages %}{% endif %}"
    "{{ system + ' ' if system else '' }}"
    "{% for message in turns %}{{ message['role'] | upper + ': ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Everyday English, so that text outside the scenes does not fall apart into bytes.
_PROSE = (
    "Hello! Who are you? I am a very small model and I answer questions about pictures of simple shapes.",
    "Please describe the picture in one sentence. Can you tell me what you see here? Yes, there is something. No.",
    "Which of these is on the left of the other, and which one is larger or smaller than the others?",
    "Thank you. What about this one? I do not know what it is, but it looks like a white and black thing.",
    "Answer the question using a single word or phrase. Compare the first picture with the second picture.",
)


def _corpus() -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(2000):
        scene = random_scene(Split.TRAIN, rng)
        for form in Form:
            for question in questions(scene, form):
                yield f"USER: \n{question.text} ASSISTANT: {question.answer}"
        yield f"{SYSTEM} USER: \n{DESCRIBE} ASSISTANT: {describe(scene)}"
    for _ in range(20):
        yield from _PROSE


def train_tokenizer() -> Tokenizer:
    """Trains the tokenizer; always the same one.  It puts `<s>` before what it encodes, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"want {token!r} in the tokenizer's vocabulary, found no such token")
    return int(number)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, chat template included."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "extra_special_tokens": {"image_token": IMAGE},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": LONGEST,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
