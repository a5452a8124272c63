"""Questions to prompts and token ids the way of the originals: transformers' templates and tokenizers, LLaVA's split.

A built-in conversation format has no original that is installed: there the text is the runtime's own, which tests hold
against LLaVA's ``llava/conversation.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import LlavaDeployError, PromptError
from llava_deploy.engines.goldens import GoldenMessage, GoldenPart
from llava_deploy.engines.manifest import ChatRecipe
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.goldens.questions import Question
from llava_deploy.runtime.chat_template import tells_the_date
from llava_deploy.runtime.conversations import render_conversation

_OF_TEMPLATES = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a stranger's template raises where it does not take a conversation."""


@dataclass(frozen=True)
class Prompt:
    """A question as the model is given it.

    Attributes:
        question: with its messages in the form that the template takes.
        text: the whole prompt.
        ids: of the text, IMAGE_TOKEN_INDEX for each picture.
        length: tokens once the pictures' features are in.
        most: tokens of an answer that there is room for.
    """

    question: Question
    text: str
    ids: tuple[int, ...]
    length: int
    most: int


@dataclass(frozen=True)
class Chosen:
    """The prompts of a recording.

    Attributes:
        prompts: one for each golden, one at least.
        left_out: of each golden that the model takes in no form: its name, and why.
        simplified: names of those that are asked in a simpler form than the fullest.
        dated: whether the template writes the date into a prompt, which another day is another one.
    """

    prompts: tuple[Prompt, ...]
    left_out: tuple[str, ...]
    simplified: tuple[str, ...]
    dated: bool


def choose_prompts(checkpoint: Checkpoint, forms: Sequence[Sequence[Question]], most: int) -> Chosen:
    """The fullest form of each question that the model's template and context take.

    Args:
        checkpoint: of the model.
        forms: of each golden, as :func:`~llava_deploy.exporter.goldens.questions.questions` has them.
        most: tokens of an answer.

    Raises:
        LlavaDeployError: the model takes none of them.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_buffer(checkpoint.tokenizer_json),
        bos_token=checkpoint.chat.bos_token,
        eos_token=checkpoint.chat.eos_token,
    )
    prompts, left_out, simplified = [], [], []
    for golden in forms:
        refusals = []
        for form in golden:
            try:
                prompts.append(_prompt(checkpoint, tokenizer, form, most))
            except PromptError as error:
                refusals.append(str(error))
            else:
                simplified += [form.name] if refusals else []
                break
        else:
            left_out.append(f"{golden[0].name} ({refusals[-1]})")
    if not prompts:
        raise LlavaDeployError(
            f"{checkpoint.directory}: no golden can be recorded, since the model takes none of the questions: "
            f"{'; '.join(left_out)}; choose a built-in format with --conversation NAME at export, or "
            "export without --goldens"
        )
    dated = tells_the_date(checkpoint.chat.template)
    return Chosen(tuple(prompts), tuple(left_out), tuple(simplified), dated)


def _prompt(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, question: Question, most: int) -> Prompt:
    messages, text = _rendered(question, checkpoint.chat)
    patches = checkpoint.config.image_features
    ids = token_ids(text, tokenizer, checkpoint.chat, patches)
    if (found := ids.count(IMAGE_TOKEN_INDEX)) != len(question.pictures):
        raise PromptError(f"the tokenizer finds {found} placeholders in {text!r:.80}")
    vocabulary = checkpoint.config.decoder.vocab_size
    if not ids or max(ids) >= vocabulary:
        raise PromptError(f"the tokenizer gives {f'token {max(ids)} of {vocabulary}' if ids else 'nothing'}")
    length = len(ids) + len(question.pictures) * (patches - 1)
    limit, positions = checkpoint.config.tokenizer_model_max_length, checkpoint.config.decoder.max_position_embeddings
    if length >= positions or (limit is not None and length > limit):
        longest = positions - 1 if limit is None else min(limit, positions - 1)
        raise PromptError(f"{length} tokens, the model takes {longest}")
    asked = Question(question.name, messages, question.pictures)
    return Prompt(asked, text, tuple(ids), length, min(most, positions - length))


def _rendered(question: Question, chat: ChatRecipe) -> tuple[tuple[GoldenMessage, ...], str]:
    """The messages in the form that the template takes, and the prompt that it makes of them.

    Raises:
        PromptError: the template takes them in no form.
    """
    if chat.template is None:
        placed = tuple(_placed(message, chat.placeholder) for message in question.messages)
        turns = [(message.role, _text_of(message, chat.placeholder)) for message in placed]
        return placed, render_conversation(chat.conversation, turns)
    parts = [{"role": m.role, "content": [_plain(part) for part in m.content]} for m in question.messages]
    found = _by_transformers(parts, question, chat)
    if found is not None:
        return question.messages, found
    placed = tuple(_placed(message, chat.placeholder) for message in question.messages)
    texts = [{"role": m.role, "content": _text_of(m, chat.placeholder)} for m in placed]
    found = _by_transformers(texts, question, chat)
    if found is None:
        raise PromptError("the chat template does not take it")
    return placed, found


def _by_transformers(messages: list[dict[str, Any]], question: Question, chat: ChatRecipe) -> str | None:
    """transformers' prompt; ``None`` where the template refuses the messages, or loses a part of them."""
    tokens = {"bos_token": chat.bos_token, "eos_token": chat.eos_token}
    given = {name: token for name, token in tokens.items() if token is not None}
    try:
        (prompt,), _ = render_jinja_template(
            [messages], chat_template=chat.template, add_generation_prompt=True, **given
        )
    except _OF_TEMPLATES:
        return None
    texts = [part.text for message in question.messages for part in message.content if part.text is not None]
    # A template for texts shows a list of parts as Python writes it.
    as_written = any(f"{quote}{text}{quote}" in prompt for text in texts for quote in "'\"")
    whole = prompt.count(chat.placeholder) == len(question.pictures) and all(text in prompt for text in texts)
    return prompt if whole and not as_written else None


def _plain(part: GoldenPart) -> dict[str, str]:
    return {"type": "image"} if part.text is None else {"type": "text", "text": part.text}


def _placed(message: GoldenMessage, placeholder: str) -> GoldenMessage:
    """For what takes texts alone: pictures that do not come first have their placeholders in the text."""
    is_picture = [part.text is None for part in message.content]
    if is_picture == sorted(is_picture, reverse=True):
        return message
    text = " ".join(placeholder if part.text is None else part.text for part in message.content)
    return GoldenMessage(message.role, (GoldenPart(text), *(GoldenPart(None) for _ in range(sum(is_picture)))))


def _text_of(message: GoldenMessage, placeholder: str) -> str:
    """Pictures first, each with a newline, as LLaVA's own tools put them, but where the text places them."""
    text = " ".join(part.text for part in message.content if part.text is not None)
    count = sum(part.text is None for part in message.content)
    return text if placeholder in text else f"{placeholder}\n" * count + text


def token_ids(prompt: str, tokenizer: PreTrainedTokenizerFast, chat: ChatRecipe, patches: int) -> list[int]:
    """Ids as the original has them, IMAGE_TOKEN_INDEX for each picture.

    ``split`` is LLaVA's ``tokenizer_image_token`` (``llava/mm_utils.py``); ``added_token`` is transformers'
    ``LlavaProcessor``, which writes a placeholder for each of a picture's ``patches`` features, here taken back to one.
    As ``apply_chat_template`` does, a prompt that begins with BOS gets no second one.
    """
    special = not (chat.bos_token is not None and prompt.startswith(chat.bos_token))
    if chat.tokenization == "split":
        return _split(prompt, tokenizer, chat, special)
    repeated = prompt.replace(chat.placeholder, chat.placeholder * patches)
    ids: list[int] = []
    for token, run in groupby(tokenizer(repeated, add_special_tokens=special).input_ids):
        count = len(list(run))
        if token != chat.image_token_id:
            ids += [token] * count
        elif count % patches:
            raise PromptError(f"the tokenizer gives {count} tokens for pictures of {patches} features")
        else:
            ids += [IMAGE_TOKEN_INDEX] * (count // patches)
    return ids


def _split(prompt: str, tokenizer: PreTrainedTokenizerFast, chat: ChatRecipe, special: bool) -> list[int]:
    first, *rest = (tokenizer(piece, add_special_tokens=special).input_ids for piece in prompt.split(chat.placeholder))
    begins = special and first[:1] == [tokenizer.bos_token_id]  # then so does every piece, of which one is wanted
    ids = list(first)
    for piece in rest:
        ids += [IMAGE_TOKEN_INDEX, *(piece[1:] if begins else piece)]
    return ids
