"""The shapes that engines take: read off the contract, one profile for each of the decoder's two uses."""

from __future__ import annotations

import dataclasses

import pytest

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt.checks import with_sizes
from llava_deploy.engines.tensorrt.profiles import InputRange, Profile, decoder_profiles, decoder_spec, vision_profiles
from llava_deploy.engines.tensorrt_recipe import DECODE_PROFILE, PREFILL_PROFILE, EngineLimits

LIMITS = EngineLimits(
    max_batch=4, max_len=96, max_seq=32, max_images=6, opt_batch=2, opt_seq=20, opt_total=60, opt_images=3
)
SHAPE = DecoderShape("float16", 64, 2, 3, 16, 640, 128)


def profiles(cache: CacheForm) -> list[Profile]:
    spec = decoder_spec(SHAPE, LIMITS, cache)
    return decoder_profiles(with_sizes(spec, {"max_len": 96}) if cache == "in-place" else spec, LIMITS, cache)


def test_the_towers_profile() -> None:
    spec = VisionShape("float16", 32, 48, 24, 64).spec(LIMITS.max_images)
    shapes = [(images, 3, 32, 48) for images in (1, 3, 6)]
    assert vision_profiles(spec, LIMITS) == [{"pixel_values": InputRange(*shapes)}]


@pytest.mark.parametrize("cache", ["in-place", "growing"])
def test_every_input_has_its_ranges(cache: CacheForm) -> None:
    names = {tensor.name for tensor in decoder_spec(SHAPE, LIMITS, cache).inputs}
    for profile in profiles(cache):
        assert profile.keys() == names
        for name, sizes in profile.items():
            for least, usual, most in zip(sizes.least, sizes.usual, sizes.most, strict=True):
                assert 1 <= least <= usual <= most, name


def test_prefill_takes_pieces_and_decode_one_token() -> None:
    both = profiles("in-place")
    assert both[PREFILL_PROFILE]["inputs_embeds"] == InputRange((1, 1, 64), (2, 20, 64), (4, 32, 64))
    assert both[PREFILL_PROFILE]["attention_mask"] == InputRange((1, 1, 1, 1), (2, 1, 20, 20), (4, 1, 32, 96))
    assert both[DECODE_PROFILE]["inputs_embeds"] == InputRange((1, 1, 64), (2, 1, 64), (4, 1, 64))
    assert both[DECODE_PROFILE]["attention_mask"] == InputRange((1, 1, 1, 1), (2, 1, 1, 60), (4, 1, 1, 96))
    cache = InputRange((1, 3, 96, 16), (2, 3, 96, 16), (4, 3, 96, 16))
    assert both[PREFILL_PROFILE]["past.1.value"] == both[DECODE_PROFILE]["past.1.value"] == cache


def test_a_batch_of_one_is_a_range_all_the_same() -> None:
    limits = dataclasses.replace(LIMITS, max_batch=1, opt_batch=1)
    spec = with_sizes(decoder_spec(SHAPE, limits, "in-place"), {"max_len": 96})
    for profile in decoder_profiles(spec, limits, "in-place"):
        rows = profile["last_index"]
        assert rows == InputRange((1,), (1,), (2,))


@pytest.mark.parametrize("index", [PREFILL_PROFILE, DECODE_PROFILE])
def test_a_growing_cache_is_as_long_as_what_is_seen_less_what_is_new(index: int) -> None:
    profile = profiles("growing")[index]
    corners = [
        [getattr(profile[name], corner) for corner in ("least", "usual", "most")]
        for name in ("inputs_embeds", "past.0.key", "attention_mask")
    ]
    for embeds, past, mask in zip(*corners, strict=True):
        assert mask[2] == embeds[1]
        assert mask[3] == past[2] + embeds[1]
    longest = profile["past.0.key"].most[2]
    assert longest == LIMITS.max_len
