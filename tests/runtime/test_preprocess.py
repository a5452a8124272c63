"""The pixels are those of transformers' ``CLIPImageProcessor``, to the bit, over random sizes and recipes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_deploy.engines.errors import PictureError
from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.runtime.preprocess import preprocess, preprocess_batch

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def recipe(resize, crop, *, pad=False, resample=3):
    color = tuple(int(m * 255) for m in MEAN)
    return ImageRecipe(pad, color, resize, resample, crop, 1 / 255, MEAN, STD)


def reference(image, want):
    """The same recipe through transformers; the padding as LLaVA's tools state it, pixel by pixel."""
    if want.pad_to_square:
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        side = max(height, width)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = want.pad_color
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        image = Image.fromarray(square)
    size = {"height": 1, "width": 1}
    if want.resize is not None and len(want.resize) == 2:
        size = {"shortest_edge": want.resize[1]}
    elif want.resize is not None:
        size = {"height": want.resize[1], "width": want.resize[2]}
    crop = (1, 1) if want.crop is None else want.crop
    processor = CLIPImageProcessorPil(
        do_resize=want.resize is not None,
        size=size,
        resample=want.resample,
        do_center_crop=want.crop is not None,
        crop_size={"height": crop[0], "width": crop[1]},
        do_rescale=want.rescale_factor is not None,
        rescale_factor=want.rescale_factor,
        do_normalize=want.mean is not None,
        image_mean=want.mean,
        image_std=want.std,
    )
    return processor(image, return_tensors="np")["pixel_values"][0]


def noise(width, height, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 3)) if seed % 2 else rng.integers(0, 2, (height, width, 3)) * 255
    return Image.fromarray(values.astype(np.uint8))


SIDE = st.one_of(st.integers(1, 4), st.integers(1, 40), st.integers(1, 300))
EDGE = st.integers(1, 48)
RESIZE = st.one_of(st.none(), st.tuples(st.just("shortest_edge"), EDGE), st.tuples(st.just("exact"), EDGE, EDGE))


@settings(max_examples=250, deadline=None)
@given(
    width=SIDE,
    height=SIDE,
    resize=RESIZE,
    crop=st.one_of(st.none(), st.tuples(st.integers(1, 90), st.integers(1, 90))),
    pad=st.booleans(),
    resample=st.sampled_from([0, 1, 2, 3, 4, 5]),
    seed=st.integers(0, 99),
)
def test_equal_to_the_processor(width, height, resize, crop, pad, resample, seed):
    image = noise(width, height, seed)
    want = recipe(resize, crop, pad=pad, resample=resample)
    got, expected = preprocess(image, want), reference(image, want)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("rescale", "mean", "std"), [(None, MEAN, STD), (1 / 255, None, None), (None, None, None), (1 / 127.5, MEAN, STD)]
)
def test_rescale_and_normalise_apart(rescale, mean, std):
    image = noise(9, 14, 1)
    want = ImageRecipe(False, (0, 0, 0), ("shortest_edge", 8), 3, (8, 8), rescale, mean, std)
    np.testing.assert_array_equal(preprocess(image, want), reference(image, want))


@pytest.mark.parametrize("pad", [False, True])
def test_the_real_recipe_on_a_large_picture(pad):
    image = noise(1200, 801, 1)
    want = recipe(("shortest_edge", 336), (336, 336), pad=pad)
    np.testing.assert_array_equal(preprocess(image, want), reference(image, want))


def test_a_batch_is_written_in_place_in_either_precision():
    images = [noise(50, 20, 1), noise(20, 50, 2), noise(1, 1, 3)]
    want = recipe(("shortest_edge", 16), (16, 16))
    single, half = np.full((3, 3, 16, 16), np.nan, np.float32), np.full((3, 3, 16, 16), np.nan, np.float16)
    preprocess_batch(images, want, single)
    preprocess_batch(images, want, half)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(single[index], preprocess(image, want))
    np.testing.assert_array_equal(half, single.astype(np.float16))


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_sliver_needs_no_gigabytes(size):
    image = Image.new("RGB", size, (200, 100, 50))
    got = preprocess(image, recipe(("shortest_edge", 336), (336, 336)))
    expected = preprocess(Image.new("RGB", (336, 336), (200, 100, 50)), recipe(None, None))
    np.testing.assert_array_equal(got, expected)


def test_a_sliver_is_cut_at_its_middle():
    pixels = np.zeros((100_000, 1, 3), np.uint8)
    pixels[49_990:50_010] = np.arange(20, dtype=np.uint8)[:, None, None] * 10
    got = preprocess(Image.fromarray(pixels), recipe(("shortest_edge", 60), (60 * 20, 60), resample=2))
    level = (got[0, :, 30] * STD[0] + MEAN[0]) * 255
    np.testing.assert_allclose(level[30::60], np.arange(20) * 10, atol=3)


def test_what_cannot_be_prepared_is_refused():
    sliver = Image.new("RGB", (1, 100_000))
    with pytest.raises(PictureError, match="padded to 100000 x 100000"):
        preprocess(sliver, recipe(("shortest_edge", 8), (8, 8), pad=True))
    with pytest.raises(PictureError, match="resized to 336 x 33600000"):
        preprocess(sliver, recipe(("shortest_edge", 336), None))
    with pytest.raises(PictureError, match="want mode RGB, found L"):
        preprocess(Image.new("L", (4, 4)), recipe(None, (4, 4)))
    out = np.empty((1, 3, 8, 8), np.float32)
    with pytest.raises(PictureError, match=r"picture 0: want pixels of shape \[3, 8, 8\].*\[3, 8, 12\]"):
        preprocess_batch([noise(12, 8, 1)], recipe(None, None), out)
    with pytest.raises(PictureError, match="want 1 pictures, found 2"):
        preprocess_batch([noise(8, 8, 1)] * 2, recipe(None, (8, 8)), out)
