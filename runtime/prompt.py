"""Messages to a prompt, by the model's own chat template or a built-in format, and to the pictures in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_deploy.engines.errors import PromptError
from llava_deploy.engines.manifest import ChatRecipe
from llava_deploy.runtime.chat_template import ContentForm, render_template, template_forms
from llava_deploy.runtime.conversations import render_conversation
from llava_deploy.runtime.pictures import PictureSource

_ROLES = ("system", "user", "assistant")
_FORM = 'want {"role": "system" | "user" | "assistant", "content": text or list of parts}'
_PART = 'want {"type": "text", "text": text} or {"type": "image", "image": picture}'


def render_chat(messages: Sequence[Mapping[str, Any]], recipe: ChatRecipe) -> str:
    """The prompt that asks for the answer to the last message.

    Where a format or template takes plain text, the placeholders of a message's pictures come first, each with a
    newline, as LLaVA's own tools put them, and its text parts are joined with a space. Where the text of a message
    already has as many placeholders as the message has pictures, they stay where they are and none is added.

    Args:
        messages: ``{"role": ..., "content": ...}``, the last of them the user's; content is a text or a list of parts
            ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": picture}``.
        recipe: of the bundle.

    Raises:
        PromptError: a message or part of another form (named by its place), placeholders in a message's text other in
            number than its pictures, or a template that fails, refuses the conversation, or reaches for Python's
            internals.
    """
    turns = _parse(messages)
    if not turns or turns[-1].role != "user":
        found = f"{turns[-1].role!r} last" if turns else "no message"
        raise PromptError(f"messages: want the user's message last, got {found}; end with the question")
    texts = [turn.as_text(recipe.placeholder) for turn in turns]
    if recipe.template is None:
        return render_conversation(recipe.conversation, [(t.role, text) for t, text in zip(turns, texts, strict=True)])
    forms = template_forms(recipe.template, recipe.bos_token, recipe.eos_token)
    plain = [
        {"role": turn.role, "content": turn.content(text, forms, recipe.placeholder)}
        for turn, text in zip(turns, texts, strict=True)
    ]
    return render_template(recipe.template, plain, recipe.bos_token, recipe.eos_token)


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[PictureSource]:
    """The pictures of all messages, in the order of their placeholders; not loaded yet.

    Raises:
        PromptError: as :func:`render_chat` for the form of messages and parts.
    """
    return [part for turn in _parse(messages) for part in turn.images]


@dataclass(frozen=True)
class _Turn:
    """One message: ``None`` in ``parts`` is a picture, and ``images`` are those pictures."""

    index: int
    role: str
    parts: tuple[str | None, ...]
    images: tuple[Any, ...]
    form: ContentForm

    def places_pictures(self, placeholder: str) -> bool:
        """Whether the text says itself where the pictures go."""
        found = sum(part.count(placeholder) for part in self.parts if part is not None)
        if found and self.images and found != len(self.images):
            raise PromptError(
                f"message {self.index}: its text has {found} placeholders {placeholder!r} and it has "
                f"{len(self.images)} pictures; write one for each, or none to have them put first"
            )
        return bool(found)

    def as_text(self, placeholder: str) -> str:
        text = " ".join(part for part in self.parts if part is not None)
        return text if self.places_pictures(placeholder) else f"{placeholder}\n" * len(self.images) + text

    def content(self, text: str, forms: frozenset[ContentForm], placeholder: str) -> Any:
        """The content as the template takes it: in the caller's form, or in the other if it takes only that."""
        if forms == {ContentForm.TEXT} or (self.form is ContentForm.TEXT and forms != {ContentForm.PARTS}):
            return text
        parts = self.parts
        if self.places_pictures(placeholder):
            parts = tuple(part for part in parts if part is not None)
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


def _parse(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"messages: want a list of messages, got {type(messages).__name__}; each {_FORM}")
    return [_parse_message(index, message) for index, message in enumerate(messages)]


def _parse_message(index: int, message: Any) -> _Turn:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise PromptError(f"message {index}: {_FORM}, got {found}")
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise PromptError(f"message {index}: want a role of {', '.join(_ROLES)}, got {role!r}")
    if isinstance(content, str):
        return _Turn(index, role, (content,), (), ContentForm.TEXT)
    if not isinstance(content, list | tuple):
        raise PromptError(f"message {index}: want content as text or a list of parts, got {type(content).__name__}")
    parts: list[str | None] = []
    images = []
    for number, part in enumerate(content):
        where = f"message {index}, part {number}"
        if not isinstance(part, Mapping):
            raise PromptError(f"{where}: {_PART}, got {type(part).__name__}")
        kind = part.get("type")
        if kind not in ("text", "image") or set(part) != {"type", kind}:
            raise PromptError(f"{where}: {_PART}, got type {kind!r} with keys {sorted(map(str, part))}")
        if kind == "text" and not isinstance(part["text"], str):
            raise PromptError(f"{where}: want text, got {type(part['text']).__name__}")
        parts.append(part["text"] if kind == "text" else None)
        if kind == "image":
            images.append(part["image"])
    return _Turn(index, role, tuple(parts), tuple(images), ContentForm.PARTS)
