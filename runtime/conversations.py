"""The built-in conversation formats, the strings that LLaVA's ``llava/conversation.py`` makes.

``vicuna_v1`` and ``plain`` are its templates of those names, ``mistral`` its ``mistral_instruct``. ``llama_2`` is its
``llava_llama_2``, with the system prompt that LLaVA's Llama-2 models were trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llava_deploy.engines.errors import PromptError
from llava_deploy.engines.names import Conversation

_SYSTEM: dict[Conversation, str] = {
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    "llama_2": (
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    ),
    "mistral": "",
    "plain": "",
}


def render_conversation(conversation: Conversation, turns: Sequence[tuple[str, str]]) -> str:
    """The prompt that asks for the answer to the last turn.

    Args:
        conversation: name of the format.
        turns: role and text: at most one ``system`` turn, first, in place of the format's own system prompt; then
            ``user`` and ``assistant`` by turns, from user to user.

    Raises:
        PromptError: other roles or another order, no question, or an empty first question where the original has no
            place for it.
    """
    has_system = bool(turns) and turns[0][0] == "system"
    system = turns[0][1] if has_system else _SYSTEM[conversation]
    first = 1 if has_system else 0
    for index, (role, _) in enumerate(turns[first:], start=first):
        want = ("user", "assistant")[(index - first) % 2]
        if role != want:
            raise PromptError(
                f"message {index}: want role {want!r}, got {role!r}; the format {conversation!r} takes a system "
                "message first, if any, then user and assistant by turns"
            )
    if len(turns) == first:
        raise PromptError("messages: want a question, found no user message; end with one")
    return _FORMATS[conversation](system, [text for _, text in turns[first:]])


def _vicuna_v1(system: str, texts: list[str]) -> str:
    prompt = system + " "
    for index, text in enumerate(texts):
        role, end = (("USER:", " "), ("ASSISTANT:", "</s>"))[index % 2]
        prompt += f"{role} {text}{end}" if text else role
    return prompt + "ASSISTANT:"


def _llama_2(system: str, texts: list[str]) -> str:
    return _instructions(system, texts, begin="<s>").removeprefix("<s>")  # the tokenizer adds the first


def _mistral(system: str, texts: list[str]) -> str:
    return _instructions(system, texts, begin="")


def _instructions(system: str, texts: list[str], begin: str) -> str:
    if not texts[0]:
        raise PromptError("first user message: want text or a picture, got neither; write a question")
    if system:
        texts = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}", *texts[1:]]
    prompt = ""
    for index, text in enumerate(texts):
        if text:
            prompt += f" {text} </s>" if index % 2 else f"{begin}[INST] {text} [/INST]"
    return prompt


def _plain(system: str, texts: list[str]) -> str:
    return system + "".join(f"{text}\n" for text in texts if text)


_FORMATS: dict[Conversation, Callable[[str, list[str]], str]] = {
    "vicuna_v1": _vicuna_v1,
    "llama_2": _llama_2,
    "mistral": _mistral,
    "plain": _plain,
}
