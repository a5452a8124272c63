"""A checkpoint's tokenizer as one ``tokenizer.json``, and what its other files add to it.

transformers keeps part of a tokenizer beside ``tokenizer.json``: added tokens, and whether a text begins with the BOS
token (``add_bos_token``). The runtime has only the one file, so both are put into it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.layouts.fields import Fields, read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


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
        CheckpointError: neither is there, one is damaged, or the conversion's packages are not installed.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        data = path.read_bytes()
    elif (directory / "tokenizer.model").is_file():
        data = _converted(directory)
    else:
        raise CheckpointError(
            f"{directory}: want tokenizer.json or tokenizer.model, found neither; fetch the tokenizer's files as well"
        )
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:
        raise CheckpointError(f"{path}: not a tokenizer ({error}); fetch the file again") from error
    settings = tokenizer_settings(directory)
    bos, eos = (_special(directory, settings, f"{name}_token") for name in ("bos", "eos"))
    changed = _add_tokens(directory, settings, tokenizer)
    changed |= _settle_ends(settings, tokenizer, bos, eos)
    changed |= tokenizer.truncation is not None or tokenizer.padding is not None
    if changed:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        data = tokenizer.to_str().encode()
    return TokenizerFile(data, tokenizer, bos, eos)


def _converted(directory: Path) -> bytes:
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(directory, use_fast=True, local_files_only=True, trust_remote_code=False)
        return fast.backend_tokenizer.to_str().encode()  # type: ignore[no-any-return]
    except (ImportError, OSError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{directory / 'tokenizer.model'}: cannot be converted to a tokenizer.json ({reason}); install "
            "sentencepiece and protobuf, or put a tokenizer.json beside it"
        ) from error


def _content(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _special(directory: Path, settings: Fields, key: str) -> str | None:
    found = _content(settings.peek(key))
    path = directory / "special_tokens_map.json"
    if found is None and path.is_file():
        found = _content(read_json(path).get(key))
    if found is None and not settings.has(key) and settings.peek("tokenizer_class") in _LLAMA_CLASSES:
        return {"bos_token": "<s>", "eos_token": "</s>"}[key]
    return found


def _add_tokens(directory: Path, settings: Fields, tokenizer: Tokenizer) -> bool:
    """Add what ``tokenizer_config.json`` and ``added_tokens.json`` list and ``tokenizer.json`` has not."""
    listed: dict[int, AddedToken] = {}
    path = directory / "added_tokens.json"
    if path.is_file():
        listed |= {int(i): AddedToken(text, normalized=False) for text, i in read_json(path).items()}
    for number, entry in settings.get("added_tokens_decoder", dict, {}).items():
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


def _settle_ends(settings: Fields, tokenizer: Tokenizer, bos: str | None, eos: str | None) -> bool:
    """Make texts begin and end as ``add_bos_token`` and ``add_eos_token`` say, where they say anything.

    As transformers' ``TokenizersBackend.update_post_processor``.
    """
    wants = {name: settings.optional(f"add_{name}_token", bool) for name in ("bos", "eos")}
    now = tokenizer.encode("").ids
    first, last = (None if text is None else tokenizer.token_to_id(text) for text in (bos, eos))
    has = {"bos": first is not None and now[:1] == [first], "eos": last is not None and now[-1:] == [last]}
    want = {name: (has[name] if wants[name] is None else bool(wants[name])) for name in ("bos", "eos")}
    want = {"bos": want["bos"] and first is not None, "eos": want["eos"] and last is not None}
    if want == has:
        return False
    parts = [f"{bos}:0"] * want["bos"] + ["$A:0"] + [f"{eos}:0"] * want["eos"]
    pair = [f"{bos}:1"] * want["bos"] + ["$B:1"] + [f"{eos}:1"] * want["eos"]
    named = [(bos, first)] * want["bos"] + [(eos, last)] * want["eos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), pair=" ".join(parts + pair), special_tokens=named
    )
    return True


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
