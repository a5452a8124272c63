"""Prompts to token ids, with IMAGE_TOKEN_INDEX where a picture goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import PromptError
from llava_deploy.engines.manifest import ChatRecipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenize_prompt(prompt: str, tokenizer: Tokenizer, recipe: ChatRecipe) -> np.ndarray:
    """Token ids of a prompt.

    ``recipe.tokenization`` says how: ``split`` as LLaVA's ``tokenizer_image_token`` (``llava/mm_utils.py``),
    ``added_token`` as transformers' ``LlavaProcessor``. A prompt that begins with the text of the BOS token, as chat
    templates render it, gets no second one: nothing is added to it, as transformers' ``apply_chat_template`` does.

    Args:
        prompt: text with ``recipe.placeholder`` for each picture.
        tokenizer: of the model; its truncation and padding are switched off.
        recipe: of the bundle.

    Returns:
        int64 [tokens]; empty for an empty prompt where the tokenizer adds nothing.

    Raises:
        PromptError: the prompt is no text, or the tokenizer does not know the placeholder.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"prompt: want text, got {type(prompt).__name__}; decode it or join it first")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    has_bos = recipe.bos_token is not None and prompt.startswith(recipe.bos_token)
    ids = _split(prompt, tokenizer, recipe, has_bos) if recipe.tokenization == "split" else None
    if ids is None:
        ids = _added_token(prompt, tokenizer, recipe, has_bos)
    return np.array(ids, np.int64)


def _split(prompt: str, tokenizer: Tokenizer, recipe: ChatRecipe, has_bos: bool) -> list[int]:
    pieces = [_encode(piece, tokenizer, not has_bos) for piece in prompt.split(recipe.placeholder)]
    # Where the tokenizer puts a BOS before each piece, the first one's stays.
    adds_bos = not has_bos and recipe.bos_token_id is not None and pieces[0][:1] == [recipe.bos_token_id]
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids.append(IMAGE_TOKEN_INDEX)
        ids.extend(piece[1:] if adds_bos else piece)
    return ids


def _added_token(prompt: str, tokenizer: Tokenizer, recipe: ChatRecipe, has_bos: bool) -> list[int]:
    ids = [
        IMAGE_TOKEN_INDEX if token == recipe.image_token_id else token
        for token in _encode(prompt, tokenizer, not has_bos)
    ]
    want, found = prompt.count(recipe.placeholder), ids.count(IMAGE_TOKEN_INDEX)
    if want != found:
        raise PromptError(
            f"prompt: want one token {recipe.image_token_id} for each of the {want} placeholders "
            f"{recipe.placeholder!r}, the tokenizer gives {found}; export the bundle from a checkpoint whose tokenizer "
            "has the placeholder as an added token"
        )
    return ids


def _encode(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    except (TypeError, UnicodeEncodeError) as error:
        raise PromptError(f"prompt: not valid Unicode ({error}); remove lone surrogates") from error
