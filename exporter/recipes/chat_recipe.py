"""What a checkpoint says about prompts: chat template, placeholder and stop tokens become a :class:`ChatRecipe`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from llava_deploy.engines.errors import CheckpointError, PromptError
from llava_deploy.engines.manifest import ChatRecipe
from llava_deploy.engines.names import Conversation
from llava_deploy.exporter.config import LlavaConfig
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.recipes.tokenizer_file import (
    TOKENIZER_CONFIG,
    TokenizerFile,
    placeholder_of,
    template_in,
)
from llava_deploy.runtime.chat_template import check_template

DEFAULT_CONVERSATION: Conversation = "vicuna_v1"
ORIGINAL_PLACEHOLDER = "<image>"
GENERATION_CONFIG = "generation_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_DEFAULT_EOS = 2  # LlamaConfig's

# What is read of generation_config.json, or says nothing about the tokens of an answer.
_GENERATION_READ = frozenset(
    """
    _from_model_config bos_token_id eos_token_id output_attentions output_hidden_states pad_token_id stop_strings
    transformers_version use_cache
    """.split()
)

# Answers to a 'plain' prompt end with its separator (LLaVA, llava/conversation.py); the others end with EOS.
_STOP_STRINGS: dict[Conversation, tuple[str, ...]] = {"plain": ("\n",)}


def chat_recipe(
    directory: Path, config: LlavaConfig, text: Fields, tokenizer: TokenizerFile, conversation: Conversation | None
) -> ChatRecipe:
    """The recipe for a checkpoint's prompts.

    Args:
        directory: where the tokenizer's and the processor's files are.
        config: the model.
        text: the decoder's part of ``config.json``, for the EOS id where ``generation_config.json`` has none.
        tokenizer: of the same directory.
        conversation: the built-in format to use instead of the checkpoint's template, ``None`` for the template.

    Raises:
        CheckpointError: the placeholder is not the token that ``image_token_id`` says, a stop token is no id, or the
            template is no Jinja.
    """
    is_hf = config.layout == "llava-hf"
    placeholder = placeholder_of(directory) if is_hf else ORIGINAL_PLACEHOLDER
    if is_hf and tokenizer.id_of(placeholder) != config.image_token_id:
        raise CheckpointError(
            f"{directory}: want the placeholder {placeholder!r} as token {config.image_token_id} (image_token_id of "
            f"config.json), found {tokenizer.id_of(placeholder)} in the tokenizer; do the files belong together?"
        )
    template = _template(directory) if is_hf and conversation is None else None
    chosen: Conversation = conversation or DEFAULT_CONVERSATION
    ids, strings = _stops(directory, text, config.decoder.vocab_size)
    return ChatRecipe(
        template=template,
        conversation=chosen,
        placeholder=placeholder,
        tokenization="added_token" if is_hf else "split",
        image_token_id=config.image_token_id,
        bos_token_id=tokenizer.id_of(tokenizer.bos_token),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        stop_token_ids=ids,
        stop_strings=strings if template is not None else (*strings, *_STOP_STRINGS.get(chosen, ())),
    )


def require_conversation(name: str | None) -> Conversation | None:
    """The built-in format of that name.

    Raises:
        CheckpointError: there is none.
    """
    for known in get_args(Conversation):
        if name == known:
            return known  # type: ignore[no-any-return]
    if name is not None:
        raise CheckpointError(f"conversation: want one of {', '.join(get_args(Conversation))}, found {name!r}")
    return None


def _template(directory: Path) -> str | None:
    """The template that transformers' processor takes (``ProcessorMixin.get_processor_dict``), else the tokenizer's."""
    for name in ("processor_config.json", "chat_template.json", _TEMPLATE_FILE, TOKENIZER_CONFIG):
        path = directory / name
        found = _text_of(path) if name == _TEMPLATE_FILE else template_in(path)
        if found is not None:
            return _checked(found, path)
    return None


def _text_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: want text in UTF-8 ({error}); fetch the file again") from error


def _checked(template: str, path: Path) -> str:
    """A template as it is; the runtime's own parser must take it, or the bundle's ``chat`` would fail."""
    try:
        check_template(template)
    except PromptError as error:
        raise CheckpointError(
            f"{path}, chat template: want Jinja, found something else ({error}); correct the template, or choose "
            "a built-in format with --conversation NAME"
        ) from error
    return template


def unused_generation_keys(directory: Path) -> tuple[str, ...]:
    """Sampling settings of ``generation_config.json``, which a caller of the runtime gives instead."""
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return ()
    settings = Fields(Fields.from_file(path).values, str(path), "generation_config.")
    return settings.unused(_GENERATION_READ)


def _stops(directory: Path, text: Fields, vocab_size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop ids and stop strings: those of ``generation_config.json``, else the EOS id of the decoder's config.

    A decoder's config with ``eos_token_id: null`` has none; one without the key has ``LlamaConfig``'s default.
    """
    path = directory / GENERATION_CONFIG
    settings = Fields.from_file(path) if path.is_file() else Fields({}, str(path))
    holder = settings if settings.has("eos_token_id") else text
    value = holder.peek("eos_token_id") if "eos_token_id" in holder.values else _DEFAULT_EOS
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
        raise holder.error("eos_token_id", f"want ids below the vocabulary's {vocab_size}", "correct the file")
    strings = settings.peek("stop_strings")
    strings = [] if strings is None else [strings] if isinstance(strings, str) else strings
    if not isinstance(strings, list) or any(not isinstance(part, str) for part in strings):
        raise settings.error("stop_strings", "want text or a list of texts", "correct the file")
    return tuple(dict.fromkeys(ids)), tuple(strings)
