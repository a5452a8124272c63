"""Image features into text embeddings, in NumPy: what the decoder reads in the place of token ids.

Source: LLaVA, ``llava/model/llava_arch.py``, ``prepare_inputs_labels_for_multimodal``; it has the behaviour of the
PyTorch one in ``exporter/reference``, for every dtype that NumPy has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llava_deploy.engines.contract import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import ContractError, PromptError

Array = npt.NDArray
PaddingSide = Literal["left", "right"]
Embed = Callable[[npt.NDArray[np.int64]], Array]
"""Token ids ``[n]`` to embeddings ``[n, hidden]``; ids outside the vocabulary are its own to refuse."""
Encode = Callable[[Array], Array]
"""Pixels ``[n, 3, height, width]`` to features ``[n, patches, hidden]``."""


@dataclass(frozen=True)
class SpliceOptions:
    """What the original reads from its config.

    ``model_max_length`` is ``tokenizer_model_max_length`` (None: rows of any length); ``padding_side`` is
    ``tokenizer_padding_side``; ``adapter_with_start_end`` says that ``tune_mm_mlp_adapter`` and
    ``mm_use_im_start_end`` are both set, for which the original defines no splice.
    """

    model_max_length: int | None = None
    padding_side: PaddingSide = "right"
    adapter_with_start_end: bool = False

    def __post_init__(self) -> None:
        if self.model_max_length is not None and self.model_max_length < 1:
            raise PromptError(f"model_max_length: want 1 or more, or None for any, got {self.model_max_length}")
        if self.padding_side not in ("left", "right"):
            raise PromptError(f"padding_side: want 'left' or 'right', got {self.padding_side!r}")


@dataclass(frozen=True)
class Spliced:
    """A padded batch for the decoder; what came in as None is None."""

    position_ids: Array | None  # [batch, seq]
    attention_mask: Array | None  # [batch, seq]
    inputs_embeds: Array  # [batch, seq, hidden]
    labels: Array | None  # [batch, seq]


@dataclass(frozen=True)
class Prepared:
    """Either ``input_ids`` (everything passed through) or ``inputs_embeds`` (spliced), the other None."""

    input_ids: Array | None  # [batch, seq]
    position_ids: Array | None  # [batch, seq]
    attention_mask: Array | None  # [batch, past + seq]
    inputs_embeds: Array | None  # [batch, seq, hidden]
    labels: Array | None  # [batch, seq]


def prepare_inputs_labels_for_multimodal(
    input_ids: Array,
    position_ids: Array | None,
    attention_mask: Array | None,
    past_length: int | None,
    labels: Array | None,
    images: Array | Sequence[Array] | None,
    *,
    embed: Embed,
    encode: Encode | None,
    options: SpliceOptions,
) -> Prepared:
    """Do what the original's method of this name does; the KV cache stays with the caller, who gives its length.

    Without a tower (``encode`` None), without images, or for one token, everything passes through; if it is the
    images' model at a later step (one token, a past), the mask grows to the past's length + 1 and the new token's
    position is the mask's sum - 1. Otherwise see :func:`features_per_image` and :func:`splice`.

    Raises:
        NotImplementedError: ``options.adapter_with_start_end``, when there is something to splice.
        PromptError: more images wanted than given, shapes that differ, or a mask longer than the past and a token.

    """
    if encode is None or images is None or input_ids.shape[1] == 1:
        if encode is not None and images is not None and past_length is not None:
            attention_mask, position_ids = _extend(attention_mask, len(input_ids), past_length + 1)
        return Prepared(input_ids, position_ids, attention_mask, None, labels)
    if options.adapter_with_start_end:
        raise NotImplementedError(
            "tune_mm_mlp_adapter with mm_use_im_start_end: what trains around the pictures is not defined; "
            "set one of the two to false in the config"
        )
    features = features_per_image(images, encode)
    spliced = splice(input_ids, position_ids, attention_mask, labels, features, embed=embed, options=options)
    return Prepared(None, spliced.position_ids, spliced.attention_mask, spliced.inputs_embeds, spliced.labels)


def features_per_image(images: Array | Sequence[Array], encode: Encode) -> list[Array]:
    """Encode all views of all pictures in one call; give each picture its run of features, ``[n_i, hidden]``.

    Args:
        images: ``[images, 3, height, width]`` (one view each), ``[images, views, 3, height, width]``, or a sequence
            of ``[views, 3, height, width]`` whose number of views may differ.
        encode: the vision graph; called once, or not at all for no pictures.

    Raises:
        PromptError: another number of dimensions, or views of different sizes.

    """
    if not len(images):
        return []
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return list(encode(images))
    for index, views in enumerate(images):
        if views.ndim != 4 or views.shape[1:] != images[0].shape[1:]:
            raise PromptError(
                f"image {index}: want [views, 3, height, width] of one size, got {list(views.shape)} "
                f"(image 0 has {list(images[0].shape)}); give [images, 3, height, width] for one view an image"
            )
    features = encode(np.concatenate(list(images)))  # [all views, patches, hidden]
    ends = np.cumsum([len(views) for views in images])
    return [run.reshape(-1, run.shape[-1]) for run in np.split(features, ends[:-1])]


def splice(
    input_ids: Array,
    position_ids: Array | None,
    attention_mask: Array | None,
    labels: Array | None,
    features: Sequence[Array],
    *,
    embed: Embed,
    options: SpliceOptions,
) -> Spliced:
    """Replace each image token by the next image's features, then cut and pad the rows.

    Args:
        input_ids: ``[batch, seq]`` int; IMAGE_TOKEN_INDEX stands for one picture.
        position_ids: only its dtype matters: real positions count from 0.
        attention_mask: ``[batch, seq]`` of any dtype, which it keeps; where it is zero, the token is dropped before
            all else.
        labels: ``[batch, seq]`` int; IGNORE_INDEX is put where pictures and padding are.
        features: one ``[n_i, hidden]`` for each image.
        embed: called once, with the ids of all text tokens of the batch.
        options: length limit and padding side.

    Returns:
        Rows of the longest row's length; ``inputs_embeds`` has the dtype that embeddings and features promote to.

    Raises:
        PromptError: no rows, shapes that differ, or more images wanted than given.
        ContractError: features of another width than the embeddings.

    """
    _check_shapes(input_ids, attention_mask, labels)
    keep = None if attention_mask is None else attention_mask.astype(bool)
    row_ids = _kept_rows(input_ids, keep)
    row_places = [np.flatnonzero(ids == IMAGE_TOKEN_INDEX) for ids in row_ids]
    _check_image_count([len(places) for places in row_places], len(features))

    text_ids = np.concatenate([ids[ids != IMAGE_TOKEN_INDEX] for ids in row_ids])
    text = embed(text_ids.astype(np.int64, copy=False))  # [text, hidden]
    _check_widths(features, text.shape[1])

    row_images, row_lengths, taken = [], [], 0
    for ids, places in zip(row_ids, row_places, strict=True):
        images = features[taken : taken + len(places)]
        # A row of text uses up one image's place.
        taken += max(len(places), 1)
        length = len(ids) - len(places) + sum(len(image) for image in images)
        row_images.append(images)
        row_lengths.append(length if options.model_max_length is None else min(length, options.model_max_length))
    longest = max(row_lengths)
    spans = [
        slice(longest - length, longest) if options.padding_side == "left" else slice(0, length)
        for length in row_lengths
    ]

    shape = (len(row_ids), longest)
    dtype = np.result_type(text.dtype, *{image.dtype for image in features})
    # Only the padding is zeroed: the rest is written once, below.
    embeds = np.empty((*shape, text.shape[1]), dtype)  # [batch, seq, hidden]
    at = 0
    for row, (ids, places, span) in enumerate(zip(row_ids, row_places, spans, strict=True)):
        num_text = len(ids) - len(places)
        _write(embeds[row, span], _interleaved(text[at : at + num_text], places, row_images[row]))
        embeds[row, : span.start] = 0
        embeds[row, span.stop :] = 0
        at += num_text
    return Spliced(
        position_ids=None if position_ids is None else _positions(shape, spans, position_ids.dtype),
        attention_mask=None if attention_mask is None else _mask(shape, spans, attention_mask.dtype),
        inputs_embeds=embeds,
        labels=None if labels is None else _labels(shape, spans, _kept_rows(labels, keep), row_places, row_images),
    )


def _interleaved(text: Array, places: npt.NDArray[np.intp], images: Sequence[Array]) -> Iterable[Array]:
    """Yield the runs of text and the images between them, in order; ``places`` are the image tokens' indices."""
    start = 0
    for index, image in enumerate(images):
        # Before the token at `place` stand `index` other image tokens, which are not in `text`.
        stop = int(places[index]) - index
        yield text[start:stop]
        yield image
        start = stop
    yield text[start:]


def _write(target: Array, pieces: Iterable[Array]) -> None:
    """Fill ``target`` from its start; what does not fit is cut off."""
    at = 0
    for piece in pieces:
        end = min(at + len(piece), len(target))
        target[at:end] = piece[: end - at]
        at = end


def _positions(shape: tuple[int, int], spans: Sequence[slice], dtype: npt.DTypeLike) -> Array:
    positions = np.zeros(shape, dtype)
    for row, span in enumerate(spans):
        positions[row, span] = np.arange(span.stop - span.start, dtype=dtype)
    return positions


def _mask(shape: tuple[int, int], spans: Sequence[slice], dtype: npt.DTypeLike) -> Array:
    mask = np.zeros(shape, dtype)
    for row, span in enumerate(spans):
        mask[row, span] = 1
    return mask


def _labels(
    shape: tuple[int, int],
    spans: Sequence[slice],
    row_labels: Sequence[Array],
    row_places: Sequence[npt.NDArray[np.intp]],
    row_images: Sequence[Sequence[Array]],
) -> Array:
    labels = np.full(shape, IGNORE_INDEX, row_labels[0].dtype)
    for row, span in enumerate(spans):
        ignored = [np.full(len(image), IGNORE_INDEX, labels.dtype) for image in row_images[row]]
        text = np.delete(row_labels[row], row_places[row])
        _write(labels[row, span], _interleaved(text, row_places[row], ignored))
    return labels


def _kept_rows(rows: Array, keep: npt.NDArray[np.bool_] | None) -> list[Array]:
    return list(rows) if keep is None else [row[kept] for row, kept in zip(rows, keep, strict=True)]


def _extend(attention_mask: Array | None, batch: int, total: int) -> tuple[Array | None, Array]:
    if attention_mask is None:
        return None, np.full((batch, 1), total - 1, np.int64)
    if attention_mask.shape[1] > total:
        raise PromptError(
            f"attention_mask: want at most {total} columns (the past and one token), got {attention_mask.shape[1]}; "
            "pass the mask of the tokens so far"
        )
    ones = np.ones((len(attention_mask), total - attention_mask.shape[1]), attention_mask.dtype)
    mask = np.concatenate([attention_mask, ones], axis=1)  # [batch, past + 1]
    return mask, mask.astype(np.int64).sum(axis=1, keepdims=True) - 1


def _check_shapes(input_ids: Array, attention_mask: Array | None, labels: Array | None) -> None:
    if input_ids.ndim != 2 or not len(input_ids):
        raise PromptError(f"input_ids: want [batch, seq] with a row at least, got shape {list(input_ids.shape)}")
    for name, array in (("attention_mask", attention_mask), ("labels", labels)):
        if array is not None and array.shape != input_ids.shape:
            raise PromptError(f"{name}: want the shape of input_ids, {list(input_ids.shape)}, got {list(array.shape)}")


def _check_image_count(tokens: Sequence[int], num_images: int) -> None:
    taken = 0
    for row, count in enumerate(tokens):
        if taken + max(count, 1) > num_images:
            raise PromptError(
                f"row {row}: {count} image tokens found after {taken} images were used up, but only {num_images} "
                "images were given; each image token takes one image and a row without any takes one too"
            )
        taken += max(count, 1)


def _check_widths(features: Sequence[Array], hidden: int) -> None:
    for index, image in enumerate(features):
        if image.ndim != 2 or image.shape[1] != hidden:
            raise ContractError(
                f"features of image {index}: want [n, {hidden}] as the embeddings have, got {list(image.shape)}; "
                "the vision graph and the token table are of different models"
            )
