"""Image features into text embeddings, in PyTorch: the truth that the runtime's NumPy splice is checked against.

Source: LLaVA, ``llava/model/llava_arch.py``, ``prepare_inputs_labels_for_multimodal``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn import functional

from llava_deploy.engines.errors import PromptError
from llava_deploy.exporter.reference.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class SpliceOptions:
    """How long rows may be (``tokenizer_model_max_length``, None = any) and where their padding goes."""

    model_max_length: int | None = None
    padding_side: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        if self.model_max_length is not None and self.model_max_length < 1:
            raise PromptError(f"tokenizer_model_max_length: want 1 or more, got {self.model_max_length}")
        if self.padding_side not in ("left", "right"):
            raise PromptError(f"tokenizer_padding_side: want 'left' or 'right', got {self.padding_side!r}")


class Spliced(NamedTuple):
    """A padded batch for the decoder; what came in as None is None."""

    position_ids: torch.Tensor | None  # [batch, seq]
    attention_mask: torch.Tensor | None  # [batch, seq]
    inputs_embeds: torch.Tensor  # [batch, seq, hidden]
    labels: torch.Tensor | None  # [batch, seq]


def features_per_image(
    images: torch.Tensor | Sequence[torch.Tensor], encode: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Encode all pictures in one call and give each its run of features, ``[views * patches, hidden]``.

    Args:
        images: ``[images, 3, height, width]``, ``[images, views, 3, height, width]``, or a sequence of
            ``[views, 3, height, width]`` whose number of views may differ.
        encode: pixels ``[n, 3, height, width]`` to features ``[n, patches, hidden]``.

    Raises:
        PromptError: another number of dimensions, or views of different sizes.

    """
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        return list(encode(images)) if len(images) else []
    for index, views in enumerate(images):
        if views.ndim != 4 or views.shape[1:] != images[0].shape[1:]:
            raise PromptError(
                f"image {index}: want [views, 3, height, width] of one size, got {list(views.shape)} "
                f"(image 0 has {list(images[0].shape)}); give [images, 3, height, width] for one view an image"
            )
    if not len(images):
        return []
    features = encode(torch.cat(list(images)))  # [all views, patches, hidden]
    return [run.flatten(0, 1) for run in features.split([len(views) for views in images])]


def check_image_count(input_ids: Sequence[torch.Tensor], num_images: int) -> None:
    """Raise PromptError if the rows (padding dropped) need more images than there are.

    A row without an image token uses up one image's place, as in the original, where it contributes an empty slice.
    """
    taken = 0
    for row, ids in enumerate(input_ids):
        tokens = int((ids == IMAGE_TOKEN_INDEX).sum())
        if taken + max(tokens, 1) > num_images:
            raise PromptError(
                f"row {row}: {tokens} image tokens found after {taken} images were used up, but only {num_images} "
                "images were given; each image token takes one image and a row without any takes one too"
            )
        taken += max(tokens, 1)


def splice(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    features: Sequence[torch.Tensor],
    *,
    embed: Callable[[torch.Tensor], torch.Tensor],
    options: SpliceOptions,
) -> Spliced:
    """Replace each image token by the next image's features, then cut and pad the rows.

    Args:
        input_ids: ``[batch, seq]`` int; IMAGE_TOKEN_INDEX stands for one picture.
        position_ids: only its dtype matters; real positions count from 0.
        attention_mask: ``[batch, seq]`` of any dtype; where it is zero, the token is dropped before all else.
        labels: ``[batch, seq]`` int.
        features: one ``[n_i, hidden]`` for each image.
        embed: ids ``[n]`` to embeddings ``[n, hidden]``.
        options: length limit and padding side.

    Raises:
        PromptError: no rows, or more images wanted than given.

    """
    if not len(input_ids):
        raise PromptError(f"input_ids: want at least one row, got shape {list(input_ids.shape)}")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    row_ids = [ids[kept] for ids, kept in zip(input_ids, keep, strict=True)]
    given = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    row_labels = [row[kept] for row, kept in zip(given, keep, strict=True)]
    check_image_count(row_ids, len(features))

    embeds, targets, taken = [], [], 0
    for ids, target in zip(row_ids, row_labels, strict=True):
        tokens = int((ids == IMAGE_TOKEN_INDEX).sum())
        # A row of text still joins an empty slice of its image: dtype promotion and the gradient's reach are the same.
        images = features[taken : taken + tokens] if tokens else [features[taken][:0]]
        taken += max(tokens, 1)
        row, spliced_target = _splice_row(ids, target, images, embed)
        embeds.append(row[: options.model_max_length])
        targets.append(spliced_target[: options.model_max_length])

    longest = max(len(row) for row in embeds)
    pads = [(longest - len(row), 0) if options.padding_side == "left" else (0, longest - len(row)) for row in embeds]
    counts = [torch.arange(len(row), device=input_ids.device) for row in embeds]
    return Spliced(
        position_ids=None if position_ids is None else _padded(counts, pads, 0).to(position_ids.dtype),
        attention_mask=None
        if attention_mask is None
        else _padded([torch.ones_like(count) for count in counts], pads, 0).to(attention_mask.dtype),
        inputs_embeds=torch.stack(
            [functional.pad(row, (0, 0, *pad)) for row, pad in zip(embeds, pads, strict=True)]
        ),  # [batch, seq, hidden]
        labels=None if labels is None else _padded(targets, pads, IGNORE_INDEX),
    )


def _splice_row(
    ids: torch.Tensor,
    labels: torch.Tensor,
    images: Sequence[torch.Tensor],
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    is_image = ids == IMAGE_TOKEN_INDEX
    text = embed(ids[~is_image])  # [text, hidden]
    places = torch.where(is_image)[0].tolist()
    bounds = zip([-1, *places], [*places, len(ids)], strict=True)
    text_runs = text.split([end - start - 1 for start, end in bounds])
    label_runs = labels[~is_image].split([len(run) for run in text_runs])
    embed_parts, label_parts = [text_runs[0]], [label_runs[0]]
    for index, image in enumerate(images):
        embed_parts.append(image)
        label_parts.append(labels.new_full((len(image),), IGNORE_INDEX))
        if index + 1 < len(text_runs):
            embed_parts.append(text_runs[index + 1])
            label_parts.append(label_runs[index + 1])
    return torch.cat(embed_parts), torch.cat(label_parts)


def _padded(rows: Sequence[torch.Tensor], pads: Sequence[tuple[int, int]], value: int) -> torch.Tensor:
    return torch.stack([functional.pad(row, pad, value=value) for row, pad in zip(rows, pads, strict=True)])
