"""Embedding rows for the picture tokens (LLaVA, ``llava_arch.py``, ``initialize_vision_tokenizer``)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.reference.constants import IMAGE_END_TOKEN, IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN

_ROWS_KEY = "model.embed_tokens.weight"


def read_adapter(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a file of ``torch.save`` that holds tensors by name, without running any code from it.

    Raises:
        CheckpointError: not there, not such a file, or it would need unpickling code.

    """
    if not Path(path).is_file():
        raise CheckpointError(f"adapter: want a file of torch.save, found none at {str(path)!r}; check the path")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"adapter {str(path)!r}: want tensors only, readable by torch.load(weights_only=True): {error}"
        ) from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"adapter {str(path)!r}: want a mapping of tensors, got {type(tensors).__name__}")
    return tensors


def add_patch_token(model: Any, tokenizer: Any) -> int:
    """Add ``<im_patch>``; give the number of tokens that are new."""
    return _add_tokens(model, tokenizer, [IMAGE_PATCH_TOKEN])


def add_start_end_tokens(model: Any, tokenizer: Any) -> int:
    """Add ``<im_start>`` and ``<im_end>``; give the number of tokens that are new."""
    return _add_tokens(model, tokenizer, [IMAGE_START_TOKEN, IMAGE_END_TOKEN])


def _add_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> int:
    num_new = int(tokenizer.add_tokens(tokens, special_tokens=True))
    model.resize_token_embeddings(len(tokenizer))
    if num_new:
        with torch.no_grad():
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                # The original leaves <im_patch> as resizing made it; the mean keeps later means as they would be.
                rows = embeddings.weight
                rows[-num_new:] = rows[:-num_new].mean(dim=0, keepdim=True)
    return num_new


def load_start_end_rows(model: Any, path: str | Path, num_new: int) -> None:
    """Take the rows of ``<im_start>`` and ``<im_end>`` from a pretrained adapter.

    Accepted are the whole table, ``[vocab, hidden]``, of which the last two rows are taken, or the two rows alone,
    ``[2, hidden]``.

    Raises:
        CheckpointError: no rows in the file, another shape, or the tokens were in the tokenizer already.

    """
    rows = read_adapter(path).get(_ROWS_KEY)
    table = model.get_input_embeddings().weight
    accepted = (tuple(table.shape), (2, table.shape[1]))
    if num_new != 2 or rows is None or tuple(rows.shape) not in accepted:
        raise CheckpointError(
            f"{_ROWS_KEY!r} in {str(path)!r}: want shape {list(accepted[0])} or {list(accepted[1])} for 2 new tokens, "
            f"got {'nothing' if rows is None else list(rows.shape)} for {num_new}; "
            "give the adapter trained with this tokenizer, and a tokenizer without the start and end tokens"
        )
    with torch.no_grad():
        table[-2:] = rows[-2:].to(table.dtype)
