"""The loss that holds image features, and the names of objects in questions, to the words for what they show."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from llava_deploy.exporter.demo.batches import PATCH_WORDS
from llava_deploy.exporter.demo.tokens import UNK, token_id


class Naming:
    """Holds image features to the words for what they show.

    Each patch's feature, multiplied with the decoder's word embeddings, has to pick the shape, the colour, the row and
    the column of the object in its cell, or `<unk>` where there is nothing to say.  So pictures arrive in the decoder
    as words it is asked about, and finding "the red object" is looking for what resembles " red".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        nothing = token_id(tokenizer, UNK)
        self._groups = [torch.tensor([*(_word(tokenizer, name) for name in names), nothing]) for names in PATCH_WORDS]

    def loss(self, features: torch.Tensor, embeddings: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the groups of words.

        Features are `[pictures, patches, hidden]`, embeddings `[vocabulary, hidden]`, objects
        `[pictures, patches, groups]`.
        """
        rows = features.flatten(0, 1)
        losses = [
            functional.cross_entropy(rows @ embeddings[group].T, objects[..., index].flatten())
            for index, group in enumerate(self._groups)
        ]
        return torch.stack(losses).mean()


def _word(tokenizer: Tokenizer, name: str) -> int:
    ids = tokenizer.encode(f" {name}", add_special_tokens=False).ids
    if len(ids) != 1:
        raise ValueError(f"want {name!r} to be one token, got {len(ids)}; train the tokenizer on text that has it")
    return int(ids[0])
