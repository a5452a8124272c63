"""The tiny model's tokenizer, its chat template, and the conversations it is trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llava_deploy.engines.contract import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_deploy.exporter.demo.conversations import ALL_FORMS, ConversationWriter, Course
from llava_deploy.exporter.demo.scenes import Split, checkpoint_dir, random_scene
from llava_deploy.exporter.demo.tokens import SPECIAL, SYSTEM, VOCABULARY, save_tokenizer, train_tokenizer

COURSE = Course(rows=1, pictures=1, turns=4, describing=0.3, naming=0.2, weights=ALL_FORMS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, path)
    return path


def test_the_vocabulary_fits_and_begins_with_the_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() <= VOCABULARY
    assert VOCABULARY % 128 == 0
    assert tuple(tokenizer.id_to_token(index) for index in range(len(SPECIAL))) == SPECIAL


@pytest.mark.parametrize("text", ["Where is the red circle?", "naïve façade – 你好 🎈", "a\tb\n\n c", "\x00\x7f"])
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_one_character_may_take_several_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("🎈", add_special_tokens=False).ids) == 4


def test_training_it_again_gives_the_shipped_one(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (directory / name).read_bytes() == (checkpoint_dir() / name).read_bytes()


def test_the_chat_template_writes_vicuna_v1(directory: Path) -> None:
    hub = AutoTokenizer.from_pretrained(directory)
    picture, text = {"type": "image"}, {"type": "text", "text": "Where is it?"}
    messages = [
        {"role": "user", "content": [picture, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "Above."}]},
        {"role": "user", "content": "And now?"},
    ]
    said = hub.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert said == f"{SYSTEM} USER: <image>\nWhere is it? ASSISTANT: Above.</s>USER: And now? ASSISTANT:"
    own = [{"role": "system", "content": "Be brief."}, messages[2]]
    assert hub.apply_chat_template(own, tokenize=False) == "Be brief. USER: And now? "


def test_transformers_encodes_as_the_tokenizer_does(tokenizer: Tokenizer, directory: Path) -> None:
    hub = AutoTokenizer.from_pretrained(directory)
    text = f"{SYSTEM} USER: <image>\nWhere is it? ASSISTANT: Above.</s>"
    assert hub(text)["input_ids"] == tokenizer.encode(text).ids
    assert (hub.bos_token_id, hub.eos_token_id, hub.pad_token_id) == (1, 2, 3)
    assert json.loads((directory / "tokenizer_config.json").read_text())["add_bos_token"]


def test_a_conversation_is_what_encoding_its_text_gives(tokenizer: Tokenizer) -> None:
    image = tokenizer.token_to_id("<image>")
    rng = random.Random(0)
    writer = ConversationWriter(tokenizer)
    for _ in range(20):
        scenes = (random_scene(Split.TRAIN, rng), random_scene(Split.TRAIN, rng))
        conversation = writer.write(scenes, COURSE, rng)
        assert conversation.ids.count(IMAGE_TOKEN_INDEX) == 2
        ids = [image if token == IMAGE_TOKEN_INDEX else token for token in conversation.ids]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert ids == tokenizer.encode(text.removeprefix("<s>")).ids


def test_labels_are_the_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    conversation = ConversationWriter(tokenizer).write((random_scene(Split.TRAIN, rng),), COURSE, rng)
    assert len(conversation.ids) == len(conversation.labels)
    kept = [label for label in conversation.labels if label != IGNORE_INDEX]
    assert all(
        label in (token, IGNORE_INDEX) for token, label in zip(conversation.ids, conversation.labels, strict=True)
    )
    replies = tokenizer.decode(kept, skip_special_tokens=False).split("</s>")
    assert len(replies) == 5
    assert replies[-1] == ""
    assert all(reply.startswith(" ") and reply.endswith(".") for reply in replies[:-1])
