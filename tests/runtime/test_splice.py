"""The meaning of the splice, stated by hand: two implementations may agree and both be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from llava_deploy.engines.contract import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import ContractError, PromptError
from llava_deploy.runtime.splice import (
    SpliceOptions,
    features_per_image,
    prepare_inputs_labels_for_multimodal,
    splice,
)

VOCAB, HIDDEN, PATCHES = 11, 6, 2
IMG = IMAGE_TOKEN_INDEX


def encode(pixels: Any) -> Any:
    """Pixels [n, 3, PATCHES, HIDDEN / 3] to features [n, PATCHES, HIDDEN]."""
    return pixels.reshape(len(pixels), PATCHES, HIDDEN)


TABLE = np.arange(VOCAB, dtype=np.float32)[:, None] * np.ones((1, HIDDEN), np.float32)  # row i is all i


def feature(value: float, length: int = PATCHES) -> np.ndarray:
    return np.full((length, HIDDEN), value, np.float32)


def spliced(ids: list[list[int]], features: list[np.ndarray], **arguments: Any) -> Any:
    options = SpliceOptions(
        model_max_length=arguments.pop("model_max_length", None),
        padding_side=arguments.pop("padding_side", "right"),
    )
    defaults: dict[str, Any] = {"position_ids": None, "attention_mask": None, "labels": None}
    return splice(np.array(ids), features=features, embed=TABLE.__getitem__, options=options, **defaults | arguments)


def test_features_take_the_place_of_their_tokens_in_order() -> None:
    out = spliced([[1, IMG, 2, IMG, 3]], [feature(70), feature(80, 3)])
    assert out.inputs_embeds[0, :, 0].tolist() == [1, 70, 70, 2, 80, 80, 80, 3]


def test_text_row_uses_up_one_image() -> None:
    out = spliced([[1, 2, 3], [4, IMG, 5]], [feature(70), feature(80)])
    assert out.inputs_embeds[..., 0].tolist() == [[1, 2, 3, 0], [4, 80, 80, 5]]


def test_padding_is_dropped_first_even_if_it_is_an_image_token() -> None:
    out = spliced(
        [[IMG, 9, IMG, 5], [6, IMG, 7, IMG]],
        [feature(70), feature(80)],
        attention_mask=np.array([[0, 0, 1, 1], [1, 1, 1, 0]]),
        labels=np.array([[1, 2, 3, 4], [5, 6, 7, 8]]),
        position_ids=np.full((2, 4), 77),
    )
    assert out.inputs_embeds[..., 0].tolist() == [[70, 70, 5, 0], [6, 80, 80, 7]]
    assert out.labels.tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 4, IGNORE_INDEX], [5, IGNORE_INDEX, IGNORE_INDEX, 7]]
    assert out.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert out.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


def test_left_padding() -> None:
    out = spliced(
        [[1, 2, 3], [4, IMG, 5]],
        [feature(70), feature(80)],
        padding_side="left",
        attention_mask=np.ones((2, 3), bool),
        position_ids=np.zeros((2, 3), np.int32),
        labels=np.array([[1, 2, 3], [4, 6, 5]]),
    )
    assert out.inputs_embeds[..., 0].tolist() == [[0, 1, 2, 3], [4, 80, 80, 5]]
    assert out.attention_mask.tolist() == [[False, True, True, True], [True] * 4]
    assert out.position_ids.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert out.labels.tolist() == [[IGNORE_INDEX, 1, 2, 3], [4, IGNORE_INDEX, IGNORE_INDEX, 5]]
    assert (out.attention_mask.dtype, out.position_ids.dtype) == (np.bool_, np.int32)


@pytest.mark.parametrize(("limit", "want"), [(1, [1]), (2, [1, 70]), (3, [1, 70, 70]), (9, [1, 70, 70, 2])])
def test_rows_are_cut_at_the_limit_from_the_left(limit: int, want: list[int]) -> None:
    out = spliced([[1, IMG, 2]], [feature(70)], model_max_length=limit, padding_side="left")
    assert out.inputs_embeds[0, :, 0].tolist() == want


def test_none_stays_none() -> None:
    out = spliced([[1, IMG]], [feature(70)])
    assert out.labels is out.attention_mask is out.position_ids is None


def test_rows_that_are_all_padding_are_empty() -> None:
    out = spliced([[1, 2], [3, IMG]], [feature(70), feature(80)], attention_mask=np.array([[0, 0], [1, 1]]))
    assert out.inputs_embeds[..., 0].tolist() == [[0, 0, 0], [3, 80, 80]]
    assert out.attention_mask.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_one_lookup_of_text_ids_only() -> None:
    calls: list[list[int]] = []

    def embed(ids: np.ndarray) -> np.ndarray:
        assert ids.dtype == np.int64
        calls.append(ids.tolist())
        return np.take(TABLE, ids, axis=0)

    ids = np.array([[1, IMG, 2], [IMG, 3, 4]], np.int32)
    splice(ids, None, None, None, [feature(70), feature(80)], embed=embed, options=SpliceOptions())
    assert calls == [[1, 2, 3, 4]]


def test_embeddings_from_a_memory_mapped_table_are_not_aliased(tmp_path: Any) -> None:
    TABLE.tofile(tmp_path / "table")
    table = np.memmap(tmp_path / "table", np.float32, "r", shape=TABLE.shape)
    out = splice(
        np.array([[1, IMG]]), None, None, None, [feature(70)], embed=table.__getitem__, options=SpliceOptions()
    )
    assert type(out.inputs_embeds) is np.ndarray
    assert out.inputs_embeds.flags.writeable
    assert out.inputs_embeds.flags.c_contiguous


def test_too_few_images_names_row_tokens_and_images() -> None:
    with pytest.raises(ValueError, match=r"row 1: 2 image tokens found after 1 images .* only 2 images"):
        spliced([[1, 2, 3], [IMG, 4, IMG]], [feature(70), feature(80)])


def test_text_row_without_an_image_left_is_refused() -> None:
    with pytest.raises(PromptError, match="row 1: 0 image tokens found after 1 images"):
        spliced([[1, IMG], [2, 3]], [feature(70)])


def test_images_left_over_are_ignored_as_in_the_original() -> None:
    out = spliced([[1, IMG]], [feature(70), feature(80)])
    assert out.inputs_embeds[0, :, 0].tolist() == [1, 70, 70]


@pytest.mark.parametrize("width", [1, HIDDEN + 1])
def test_features_of_another_width(width: int) -> None:
    with pytest.raises(ContractError, match=rf"image 0: want \[n, 6\].* got \[2, {width}\]"):
        spliced([[1, IMG]], [np.zeros((2, width), np.float32)])


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_shapes_that_differ(name: str) -> None:
    with pytest.raises(PromptError, match=rf"{name}: want .* \[1, 2\], got \[1, 3\]"):
        spliced([[1, IMG]], [feature(70)], **{name: np.ones((1, 3), np.int64)})


def test_no_rows() -> None:
    with pytest.raises(PromptError, match="a row at least"):
        spliced(np.zeros((0, 3), np.int64), [feature(70)])  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"model_max_length": 0}, {"padding_side": "middle"}])
def test_options_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=next(iter(arguments))):
        SpliceOptions(**arguments)


def test_views_are_encoded_in_one_call_and_flattened_per_image() -> None:
    calls: list[tuple[int, ...]] = []

    def counted(pixels: np.ndarray) -> Any:
        calls.append(pixels.shape)
        return encode(pixels)

    pixels = np.random.default_rng(0).standard_normal((5, 3, PATCHES, HIDDEN // 3))
    runs = features_per_image([pixels[:2], pixels[2:3], pixels[3:]], counted)
    assert calls == [(5, 3, PATCHES, HIDDEN // 3)]
    assert [run.shape for run in runs] == [(4, HIDDEN), (2, HIDDEN), (4, HIDDEN)]
    assert_array_equal(np.concatenate(runs), encode(pixels).reshape(-1, HIDDEN))


def test_views_of_another_size_are_refused() -> None:
    with pytest.raises(PromptError, match=r"image 1: want .* got \[1, 3, 4, 4\]"):
        features_per_image([np.zeros((1, 3, 2, 2)), np.zeros((1, 3, 4, 4))], encode)


def test_single_pictures_in_a_list_are_refused() -> None:
    with pytest.raises(PromptError, match=r"image 0: want \[views, 3, height, width\]"):
        features_per_image([np.zeros((3, 2, 2))], encode)


def prepare(input_ids: list[list[int]], **arguments: Any) -> Any:
    defaults: dict[str, Any] = {
        "position_ids": None,
        "attention_mask": None,
        "past_length": None,
        "labels": None,
        "images": np.zeros((1, 3, PATCHES, HIDDEN // 3), np.float32),
        "encode": encode,
        "options": SpliceOptions(),
    }
    return prepare_inputs_labels_for_multimodal(np.array(input_ids), embed=TABLE.__getitem__, **defaults | arguments)


@pytest.mark.parametrize(
    ("ids", "arguments"),
    [([[1, IMG]], {"encode": None}), ([[1, IMG]], {"images": None}), ([[5]], {})],
    ids=["no tower", "no images", "one token"],
)
def test_everything_passes_through(ids: list[list[int]], arguments: dict[str, Any]) -> None:
    mask, positions, labels = np.ones((1, len(ids[0]))), np.full((1, len(ids[0])), 7), np.array([[3] * len(ids[0])])
    out = prepare(ids, attention_mask=mask, position_ids=positions, labels=labels, **arguments)
    assert out.input_ids.tolist() == ids
    assert out.inputs_embeds is None
    assert out.attention_mask is mask
    assert out.position_ids is positions
    assert out.labels is labels


def test_one_token_with_a_past_extends_the_mask() -> None:
    out = prepare([[5], [6]], attention_mask=np.array([[0, 0, 1], [1, 1, 1]], np.int32), past_length=4)
    assert out.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert out.attention_mask.dtype == np.int32
    assert out.position_ids.tolist() == [[2], [4]]
    assert out.input_ids.tolist() == [[5], [6]]


def test_one_token_with_a_past_and_no_mask_counts_all() -> None:
    out = prepare([[5]], past_length=4)
    assert out.attention_mask is None
    assert out.position_ids.tolist() == [[4]]


def test_mask_longer_than_the_past_is_refused() -> None:
    with pytest.raises(PromptError, match=r"at most 3 columns .* got 5"):
        prepare([[5]], attention_mask=np.ones((1, 5)), past_length=2)


def test_adapter_with_start_end_is_not_implemented_but_passes_through() -> None:
    options = SpliceOptions(adapter_with_start_end=True)
    assert prepare([[1, 2]], images=None, options=options).input_ids.tolist() == [[1, 2]]
    with pytest.raises(NotImplementedError, match="mm_use_im_start_end"):
        prepare([[1, IMG]], options=options)
