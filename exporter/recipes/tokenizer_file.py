"""A checkpoint's tokenizer as one ``tokenizer.json``, and what its other files add to it.

transformers keeps part of a tokenizer beside it: added tokens, and, where there is only sentencepiece's model, what a
text begins with. The runtime has only the one file, so all of it is put in there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.layouts.fields import Fields, read_json
from llava_deploy.exporter.recipes.sentencepiece_model import to_tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_LEGACY = True  # LlamaTokenizer's default


@dataclass(frozen=True)
class TokenizerFile:
    """A ``tokenizer.json``, the tokenizer in it, and its special tokens' texts (None where it has none)."""

    data: bytes
    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None

    def id_of(self, token: str | None) -> int | None:
        """The id of a token's text, None if it is not in the vocabulary."""
        return None if token is None else self.tokenizer.token_to_id(token)  # type: ignore[no-any-return]


def tokenizer_settings(directory: Path) -> Fields:
    """``tokenizer_config.json``, empty if there is none."""
    path = directory / TOKENIZER_CONFIG
    return Fields.from_file(path) if path.is_file() else Fields({}, str(path))


def open_tokenizer(directory: Path) -> TokenizerFile:
    """Read ``tokenizer.json``, or convert sentencepiece's ``tokenizer.model``.

    Raises:
        CheckpointError: neither is there, one is damaged, or the files do not belong together.
    """
    settings = tokenizer_settings(directory)
    path, model = directory / "tokenizer.json", directory / "tokenizer.model"
    if path.is_file():
        data = path.read_bytes()
        tokenizer = _parsed(data, path)
        bos, eos = _specials(directory, settings, settings.peek("tokenizer_class") in _LLAMA_CLASSES)
    elif model.is_file():
        legacy = settings.get("legacy", bool, _LEGACY)
        tokenizer = to_tokenizer(model, "every_segment" if legacy else "first_segment")
        data = b""
        bos, eos = _specials(directory, settings, True)
        _add_ends(settings, tokenizer, bos, eos)
    else:
        raise CheckpointError(
            f"{directory}: want tokenizer.json or tokenizer.model, found neither; fetch the tokenizer's files as well"
        )
    changed = _add_tokens(directory, settings, tokenizer) or not path.is_file()
    changed |= tokenizer.truncation is not None or tokenizer.padding is not None
    if changed:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        data = tokenizer.to_str().encode()
    return TokenizerFile(data, tokenizer, bos, eos)


def _parsed(data: bytes, path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer ({error}); fetch the file again") from error


def _content(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _specials(directory: Path, settings: Fields, is_llama: bool) -> tuple[str | None, str | None]:
    """Texts of BOS and EOS; ``LlamaTokenizer`` has its own where no file says anything."""
    path = directory / "special_tokens_map.json"
    beside = read_json(path) if path.is_file() else {}
    found = []
    for key, default in (("bos_token", "<s>"), ("eos_token", "</s>")):
        text = _content(settings.peek(key)) or _content(beside.get(key))
        found.append(default if text is None and is_llama else text)
    return found[0], found[1]


def _add_tokens(directory: Path, settings: Fields, tokenizer: Tokenizer) -> bool:
    """Add what ``tokenizer_config.json`` and ``added_tokens.json`` list and ``tokenizer.json`` has not."""
    listed: dict[int, AddedToken] = {}
    path = directory / "added_tokens.json"
    if path.is_file():
        for text, number in read_json(path).items():
            if type(number) is not int:
                raise CheckpointError(f"{path}: want an id for {text!r}, found {number!r:.80}; fetch the file again")
            listed[number] = AddedToken(text, normalized=False)
    for number, entry in settings.get("added_tokens_decoder", dict, {}).items():
        if not number.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise settings.error("added_tokens_decoder", "want ids with their tokens' content", "fetch the file again")
        flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
        listed[int(number)] = AddedToken(entry["content"], normalized=bool(entry.get("normalized", True)), **flags)
    known = tokenizer.get_added_tokens_decoder()
    missing = {number: token for number, token in listed.items() if number not in known}
    for number, token in sorted(missing.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise CheckpointError(
                f"{directory}: want id {number} for the added token {token.content!r}, found "
                f"{tokenizer.token_to_id(token.content)} in tokenizer.json; do the tokenizer's files belong together?"
            )
    return bool(missing)


def _add_ends(settings: Fields, tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make texts begin with BOS and end with EOS as ``LlamaTokenizer`` does; a tokenizer.json says this itself."""
    first, last = (None if text is None else tokenizer.token_to_id(text) for text in (bos, eos))
    front = settings.get("add_bos_token", bool, True) and first is not None
    back = settings.get("add_eos_token", bool, False) and last is not None
    single = [f"{bos}:0"] * front + ["$A:0"] + [f"{eos}:0"] * back
    pair = [*single, *[f"{bos}:1"] * front, "$B:1", *[f"{eos}:1"] * back]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(single),
        pair=" ".join(pair),
        special_tokens=[(bos, first)] * front + [(eos, last)] * back,
    )


def placeholder_of(directory: Path) -> str:
    """The text that stands for a picture: transformers' ``image_token``, ``<image>`` where nothing says otherwise."""
    for name in ("processor_config.json", TOKENIZER_CONFIG):
        path = directory / name
        values = read_json(path) if path.is_file() else {}
        extra = values.get("extra_special_tokens")
        for found in (values.get("image_token"), extra.get("image_token") if isinstance(extra, dict) else None):
            if (text := _content(found)) is not None:
                return text
    return "<image>"


def template_in(path: Path) -> str | None:
    """The chat template under ``chat_template`` in a JSON file, None if there is none.

    Raises:
        CheckpointError: several templates and none named ``default``.
    """
    found = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):  # tokenizer_config.json's form for several
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
        if found is None:
            raise CheckpointError(f"{path}, chat_template: want one named 'default' among several; choose one by hand")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{path}, chat_template: want text, found {json.dumps(found)[:80]}; correct the file")
    return found
