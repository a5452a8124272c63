"""Whether two tokenizers give words the same ids: a decoder is of use with its own only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_deploy.engines.errors import BundleError, InputError
from llava_deploy.exporter.checkpoint import Checkpoint


def require_same_tokens(checkpoint: Checkpoint, stored: Path) -> None:
    """Hold the tokens of ``checkpoint`` against those of the bundle's ``tokenizer.json``.

    The files may differ in how they were written, and in settings that the bundle's recipe does without.

    Raises:
        InputError: an id stands for another token.
        BundleError: the bundle's file cannot be read.
    """
    text = stored.read_bytes()
    if text == checkpoint.tokenizer_json:
        return
    try:
        want = _tokens(json.loads(text))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BundleError(f"{stored}: no tokenizer ({error}); export the bundle again") from error
    found = _tokens(json.loads(checkpoint.tokenizer_json))
    for index in sorted(want.keys() | found.keys()):
        if want.get(index) != found.get(index):
            raise InputError(
                f"{checkpoint.directory}: its decoder has other tokens than {stored.parent}: want "
                f"{want.get(index)!r} for {index}, found {found.get(index)!r}; give a checkpoint with the same "
                "tokenizer, or export this one to a bundle of its own"
            )


def _tokens(tokenizer: Any) -> dict[int, str]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram's: pairs of a token and its score
        tokens = {index: str(token) for index, (token, _) in enumerate(vocabulary)}
    else:
        tokens = {int(index): str(token) for token, index in vocabulary.items()}
    return tokens | {int(added["id"]): str(added["content"]) for added in tokenizer["added_tokens"]}
