"""Which form of each question a model is asked, by its template and context; the runtime makes the same of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.engines.goldens import GoldenMessage
from llava_deploy.engines.manifest import ChatRecipe
from llava_deploy.engines.names import Conversation
from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.goldens.pictures import golden_pictures, open_png
from llava_deploy.exporter.goldens.prompts import Chosen, Prompt, choose_prompts
from llava_deploy.exporter.goldens.questions import questions
from llava_deploy.runtime.prompt import render_chat
from llava_deploy.runtime.tokenize import tokenize_prompt

# llava-hf's own: a message's pictures come first, wherever they stand.
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXTS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Prints a list as Python writes it.
UNCAREFUL = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}" + LLAVA_HF
ONE_PICTURE = (
    "{% for part in messages[0]['content'] %}"
    "{{ ('<image>' if loop.first else '') if part['type'] == 'image' else part['text'] }}{% endfor %}"
)
DATED = "{{ strftime_now('%Y') }} " + LLAVA_HF
ALL = ["one-picture", "two-pictures", "text-only"]


@pytest.fixture
def checkpoint(demo_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(demo_checkpoint)


def chosen(checkpoint: Checkpoint) -> Chosen:
    return choose_prompts(checkpoint, questions(checkpoint.config.vision.image_size), 16)


def names(prompts: tuple[Prompt, ...]) -> list[str]:
    return [prompt.question.name for prompt in prompts]


def require_as_the_runtime(found: Chosen, checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer.from_buffer(checkpoint.tokenizer_json)
    for prompt in found.prompts:
        assert render_chat([as_message(m) for m in prompt.question.messages], checkpoint.chat) == prompt.text
        assert tokenize_prompt(prompt.text, tokenizer, checkpoint.chat).tolist() == list(prompt.ids)
        pictures = len(prompt.question.pictures)
        assert prompt.ids.count(IMAGE_TOKEN_INDEX) == pictures
        assert prompt.length == len(prompt.ids) + pictures * (checkpoint.config.image_features - 1)


def as_message(message: GoldenMessage) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": "p"} if part.text is None else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": message.role, "content": parts}


@pytest.mark.parametrize(
    ("template", "asked", "simplified"),
    [
        (LLAVA_HF, ALL, ()),
        (TEXTS, ALL, ()),
        (UNCAREFUL, ALL, ()),
        (ONE_TURN, ALL, ("two-pictures",)),
        (ONE_PICTURE, ["one-picture", "text-only"], ()),
    ],
    ids=["llava-hf", "texts", "uncareful", "one turn", "one picture"],
)
def test_templates(checkpoint: Checkpoint, template: str, asked: list[str], simplified: tuple[str, ...]) -> None:
    own = replace(checkpoint, chat=replace(checkpoint.chat, template=template))
    found = chosen(own)
    assert names(found.prompts) == asked
    assert found.simplified == simplified
    assert [left_out.split(" ")[0] for left_out in found.left_out] == [name for name in ALL if name not in asked]
    require_as_the_runtime(found, own)


def test_pictures_stand_between_texts_where_a_template_takes_texts_alone(checkpoint: Checkpoint) -> None:
    own = replace(checkpoint, chat=replace(checkpoint.chat, template=TEXTS))
    one, two, _ = chosen(own).prompts
    assert "[INST] <image>\nWhat shape is the blue object? [/INST]" in one.text
    assert "First look at this: <image> Now at this one: <image> What is in the picture?" in two.text
    assert [part.text for part in two.question.messages[0].content[1:]] == [None, None]


@pytest.mark.parametrize("conversation", get_args(Conversation))
def test_built_in_formats(checkpoint: Checkpoint, conversation: Conversation) -> None:
    own = replace(checkpoint, chat=replace(checkpoint.chat, template=None, conversation=conversation))
    found = chosen(own)
    assert names(found.prompts) == ALL
    require_as_the_runtime(found, own)


@pytest.mark.parametrize("conversation", get_args(Conversation))
def test_built_in_formats_of_the_original_layout(make_original: Any, conversation: Conversation) -> None:
    own = open_checkpoint(make_original(max_position_embeddings=1024).directory)
    own = replace(own, chat=replace(own.chat, conversation=conversation))
    assert own.chat.tokenization == "split"
    require_as_the_runtime(chosen(own), own)


def with_context(checkpoint: Checkpoint, positions: int, limit: int | None) -> Checkpoint:
    decoder = replace(checkpoint.config.decoder, max_position_embeddings=positions)
    config = replace(checkpoint.config, decoder=decoder, tokenizer_model_max_length=limit)
    return replace(checkpoint, config=config)


def test_what_the_context_has_no_room_for(checkpoint: Checkpoint) -> None:
    lengths = {prompt.question.name: prompt.length for prompt in chosen(checkpoint).prompts}
    full = lengths["two-pictures"]
    for own in (with_context(checkpoint, full, None), with_context(checkpoint, 4096, full - 1)):
        found = chosen(own)
        assert names(found.prompts) == ALL
        assert found.simplified == ("two-pictures",)
        assert len(found.prompts[1].question.messages) == 1
    exact = chosen(with_context(checkpoint, full + 3, full))
    assert exact.simplified == ()
    assert {p.question.name: p.most for p in exact.prompts} == {"one-picture": 16, "two-pictures": 3, "text-only": 16}
    small = chosen(with_context(checkpoint, lengths["text-only"] + 1, None))
    assert names(small.prompts) == ["text-only"]
    assert "tokens, the model takes" in small.left_out[0]
    with pytest.raises(LlavaDeployError, match="no golden can be recorded"):
        chosen(with_context(checkpoint, 4, None))


def test_a_template_that_takes_nothing(checkpoint: Checkpoint) -> None:
    own = replace(checkpoint, chat=replace(checkpoint.chat, template="{{ raise_exception('closed') }}"))
    with pytest.raises(LlavaDeployError, match="the chat template does not take it"):
        chosen(own)


def test_a_date_in_a_prompt_is_known(checkpoint: Checkpoint) -> None:
    chat: ChatRecipe = checkpoint.chat
    assert not chosen(checkpoint).dated
    assert chosen(replace(checkpoint, chat=replace(chat, template=DATED))).dated


@pytest.mark.parametrize("side", [1, 24, 96, 336, 448, 1024])
def test_pictures_are_drawn_for_every_tower(side: int) -> None:
    drawn = golden_pictures(side)
    assert drawn == golden_pictures(side)
    sizes = [open_png(data).size for data in drawn]
    assert all(width != height and side not in (width, height) for width, height in sizes)
    assert sum(map(len, drawn)) < 300_000
