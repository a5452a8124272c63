"""The built-in formats give the strings of LLaVA's ``llava/conversation.py``, literally."""

import pytest

from llava_deploy.engines.errors import PromptError
from llava_deploy.runtime.conversations import render_conversation

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
LLAMA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
ONE = [("user", "<image>\nWhat?")]
THREE = [*ONE, ("assistant", "A cat."), ("user", "Sure?")]

EXPECTED = {
    "vicuna_v1": (
        f"{VICUNA} USER: <image>\nWhat? ASSISTANT:",
        f"{VICUNA} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
        "Be brief. USER: <image>\nWhat? ASSISTANT:",
    ),
    "llama_2": (
        f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nWhat? [/INST]",
        f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Sure? [/INST]",
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST]",
    ),
    "mistral": (
        "[INST] <image>\nWhat? [/INST]",
        "[INST] <image>\nWhat? [/INST] A cat. </s>[INST] Sure? [/INST]",
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST]",
    ),
    "plain": ("<image>\nWhat?\n", "<image>\nWhat?\nA cat.\nSure?\n", "Be brief.<image>\nWhat?\n"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts_are_literally_those_of_the_original(name):
    one, three, with_system = EXPECTED[name]
    assert render_conversation(name, ONE) == one
    assert render_conversation(name, THREE) == three
    assert render_conversation(name, [("system", "Be brief."), *ONE]) == with_system


def test_an_empty_answer_leaves_its_role_bare_as_in_the_original():
    turns = [("user", "Hi"), ("assistant", ""), ("user", "Well?")]
    assert render_conversation("vicuna_v1", turns) == f"{VICUNA} USER: Hi ASSISTANT:USER: Well? ASSISTANT:"
    assert render_conversation("mistral", turns) == "[INST] Hi [/INST][INST] Well? [/INST]"


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize(
    ("turns", "place"),
    [
        ([("assistant", "a"), ("user", "b")], "message 0: want role 'user', got 'assistant'"),
        ([("user", "a"), ("user", "b")], "message 1: want role 'assistant', got 'user'"),
        ([("system", "a"), ("assistant", "b")], "message 1: want role 'user', got 'assistant'"),
        ([("user", "a"), ("system", "b"), ("user", "c")], "message 1: want role 'assistant', got 'system'"),
    ],
)
def test_roles_out_of_turn_are_named(name, turns, place):
    with pytest.raises(PromptError, match=place):
        render_conversation(name, turns)


@pytest.mark.parametrize("name", ["llama_2", "mistral"])
def test_an_empty_first_question_is_refused_where_the_original_asserts(name):
    with pytest.raises(PromptError, match="first user message"):
        render_conversation(name, [("user", "")])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_system_message_alone_asks_nothing(name):
    with pytest.raises(PromptError, match="no user message"):
        render_conversation(name, [("system", "Be brief.")])
