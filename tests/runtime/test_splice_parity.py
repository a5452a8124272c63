"""The NumPy splice against the PyTorch one, over random batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import PromptError
from llava_deploy.exporter.reference import LlavaMetaForCausalLM
from llava_deploy.runtime.splice import (
    SpliceOptions,
    prepare_inputs_labels_for_multimodal,
)

VOCAB, HIDDEN, PATCHES = 11, 6, 2
IMG = IMAGE_TOKEN_INDEX


def encode(pixels: Any) -> Any:
    """Pixels [n, 3, PATCHES, HIDDEN / 3] to features [n, PATCHES, HIDDEN], exact in NumPy and PyTorch alike."""
    return pixels.reshape(len(pixels), PATCHES, HIDDEN)


@dataclass(frozen=True)
class Case:
    """One call: NumPy arrays, of which the PyTorch side makes its tensors."""

    input_ids: np.ndarray
    position_ids: np.ndarray | None
    attention_mask: np.ndarray | None
    past_length: int | None
    labels: np.ndarray | None
    images: np.ndarray | list[np.ndarray] | None
    table: np.ndarray
    has_tower: bool
    options: SpliceOptions


class TorchSide(LlavaMetaForCausalLM):
    """The reference over a table of embeddings and a tower that only reshapes."""

    def __init__(self, case: Case) -> None:
        self.config = SimpleNamespace(
            tokenizer_model_max_length=case.options.model_max_length,
            tokenizer_padding_side=case.options.padding_side,
            tune_mm_mlp_adapter=case.options.adapter_with_start_end,
            mm_use_im_start_end=case.options.adapter_with_start_end,
        )
        table = torch.from_numpy(case.table)
        self.decoder = SimpleNamespace(
            get_vision_tower=lambda: encode if case.has_tower else None,
            mm_projector=lambda features: features,
            embed_tokens=lambda ids: table[ids],
        )

    def get_model(self) -> Any:
        return self.decoder


def tensor(array: Any) -> Any:
    if isinstance(array, list):
        return [torch.from_numpy(item) for item in array]
    return None if array is None else torch.from_numpy(array)


def run_torch(case: Case) -> tuple[Any, ...]:
    past = None if case.past_length is None else ((torch.zeros(1, 1, case.past_length, 2),) * 2,)
    prepared = TorchSide(case).prepare_inputs_labels_for_multimodal(
        tensor(case.input_ids),
        tensor(case.position_ids),
        tensor(case.attention_mask),
        past,
        tensor(case.labels),
        tensor(case.images),
    )
    assert prepared[3] is past
    return (*prepared[:3], *prepared[4:])


def run_numpy(case: Case) -> tuple[Any, ...]:
    prepared = prepare_inputs_labels_for_multimodal(
        case.input_ids,
        case.position_ids,
        case.attention_mask,
        case.past_length,
        case.labels,
        case.images,
        embed=lambda ids: case.table[ids],
        encode=encode if case.has_tower else None,
        options=case.options,
    )
    return (
        prepared.input_ids,
        prepared.position_ids,
        prepared.attention_mask,
        prepared.inputs_embeds,
        prepared.labels,
    )


def outcome(run: Callable[[Case], tuple[Any, ...]], case: Case) -> tuple[Any, ...] | str:
    """The result, or the message of the error that too few images give."""
    try:
        return run(case)
    except PromptError as error:
        return str(error)


@st.composite
def masks(draw: st.DrawFn, batch: int, seq: int) -> np.ndarray:
    mask = np.ones((batch, seq), bool)
    for row in mask:
        kind = draw(st.sampled_from(["full", "left", "right", "holes", "empty"]))
        pad = draw(st.integers(0, seq))
        if kind == "left":
            row[:pad] = False
        elif kind == "right":
            row[seq - pad :] = False
        elif kind == "holes":
            row[:] = draw(st.lists(st.booleans(), min_size=seq, max_size=seq))
        elif kind == "empty":
            row[:] = False
    dtype = draw(st.sampled_from([np.bool_, np.int64, np.int32, np.uint8, np.float32, np.float16]))
    return mask.astype(dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, seq = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    token = st.one_of(st.integers(0, VOCAB - 1), st.integers(0, VOCAB - 1), st.just(IMG))
    ids = np.array(draw(st.lists(st.lists(token, min_size=seq, max_size=seq), min_size=batch, max_size=batch)))
    mask = draw(st.none() | masks(batch, seq))
    kept = np.ones_like(ids, bool) if mask is None else mask.astype(bool)
    needed = int(np.maximum(((ids == IMG) & kept).sum(axis=1), 1).sum())
    count = max(needed + draw(st.sampled_from([0, 0, 0, 1, 2, -1])), 0)

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    feature_dtype = draw(st.sampled_from([np.float32, np.float16]))
    view = (3, PATCHES, HIDDEN // 3)
    form = draw(st.sampled_from(["4-D", "5-D", "list", "none"]))
    images: np.ndarray | list[np.ndarray] | None = None
    if form == "4-D":
        images = rng.standard_normal((count, *view)).astype(feature_dtype)
    elif form == "5-D":
        images = rng.standard_normal((count, draw(st.integers(1, 3)), *view)).astype(feature_dtype)
    elif form == "list":
        views = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
        images = [rng.standard_normal((n, *view)).astype(feature_dtype) for n in views]

    past = draw(st.none() | st.integers(0, 12))
    if past is not None and seq > past + 1:
        past = None
    label_dtype = draw(st.sampled_from([np.int64, np.int32]))
    return Case(
        input_ids=ids,
        position_ids=draw(st.none() | st.sampled_from([np.full((batch, seq), 3), np.full((batch, seq), 3, np.int32)])),
        attention_mask=mask,
        past_length=past,
        labels=rng.integers(0, VOCAB, (batch, seq)).astype(label_dtype) if draw(st.booleans()) else None,
        images=images,
        table=rng.standard_normal((VOCAB, HIDDEN)).astype(draw(st.sampled_from([np.float32, np.float16]))),
        has_tower=draw(st.sampled_from([True, True, True, False])),
        options=SpliceOptions(
            model_max_length=draw(st.none() | st.integers(1, 16)), padding_side=draw(st.sampled_from(["left", "right"]))
        ),
    )


@settings(max_examples=400, deadline=None)
@given(cases())
def test_equals_the_pytorch_splice(case: Case) -> None:
    got, want = outcome(run_numpy, case), outcome(run_torch, case)
    if isinstance(want, str) or isinstance(got, str):
        event("too few images")
        assert got == want
        return
    event("spliced" if got[0] is None else "passed through")
    for name, ours, theirs in zip(("ids", "positions", "mask", "embeds", "labels"), got, want, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.numpy().dtype, name
            assert_array_equal(ours, theirs.numpy(), err_msg=name, strict=True)
