"""Limits that are asked for, and those that follow from a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.manifest import Manifest, read_manifest
from llava_deploy.engines.tensorrt.options import (
    TensorRtBuildOptions,
    check_workspace,
    normal_capability,
    resolve_limits,
)
from llava_deploy.engines.tensorrt_recipe import EngineLimits


@pytest.fixture
def manifest(demo_bundle: Path) -> Manifest:
    """Of a model of 1,024 positions and 36 patches a picture."""
    return read_manifest(demo_bundle)


def limits(manifest: Manifest, **asked: Any) -> EngineLimits:
    return resolve_limits(TensorRtBuildOptions("tensorrt-rtx", **asked), manifest)


def test_what_follows_from_the_bundle(manifest: Manifest) -> None:
    assert (manifest.decoder.max_positions, manifest.vision.patches) == (1024, 36)
    assert limits(manifest) == EngineLimits(
        max_batch=1, max_len=1024, max_seq=1024, max_images=1, opt_batch=1, opt_seq=100, opt_total=228, opt_images=1
    )


def test_a_prompt_of_llava_is_read_in_one_piece_and_a_longer_one_in_pieces(manifest: Manifest) -> None:
    large = dataclasses.replace(
        manifest,
        decoder=dataclasses.replace(manifest.decoder, max_positions=4096),
        vision=dataclasses.replace(manifest.vision, patches=576),
    )
    found = limits(large)
    assert (found.max_len, found.max_seq, found.opt_seq, found.opt_total) == (4096, 1024, 640, 768)


def test_limits_follow_from_those_that_are_asked_for(manifest: Manifest) -> None:
    found = limits(manifest, max_batch=4, max_len=64)
    assert found == EngineLimits(
        max_batch=4, max_len=64, max_seq=64, max_images=4, opt_batch=4, opt_seq=64, opt_total=64, opt_images=4
    )
    assert limits(manifest, max_batch=4, opt_batch=1, max_images=9).opt_images == 9


@pytest.mark.parametrize(
    ("asked", "option", "reason"),
    [
        ({"max_len": 1025}, "max_len", "want 1 to 1024 (positions of the model), got 1025"),
        ({"max_len": 0}, "max_len", "want 1 to 1024 (positions of the model), got 0"),
        ({"max_batch": 0}, "max_batch", "want 1 to 1024 (rows), got 0"),
        ({"max_images": -1}, "max_images", "want 1 to 1024 (pictures), got -1"),
        ({"max_len": 64, "max_seq": 65}, "max_seq", "want 1 to 64 (the cache's length, --max-len), got 65"),
        ({"max_batch": 2, "opt_batch": 3}, "opt_batch", "want 1 to 2 (--max-batch), got 3"),
        ({"max_seq": 32, "opt_seq": 33}, "opt_seq", "want 1 to 32 (--max-seq), got 33"),
        ({"max_len": 64, "opt_total": 65}, "opt_total", "want 1 to 64 (--max-len), got 65"),
        ({"max_images": 2, "opt_images": 3}, "opt_images", "want 1 to 2 (--max-images), got 3"),
    ],
)
def test_limits_that_the_model_or_another_does_not_allow(
    manifest: Manifest, asked: dict[str, int], option: str, reason: str
) -> None:
    with pytest.raises(OptionError) as raised:
        limits(manifest, **asked)
    assert (raised.value.option, raised.value.reason) == (option, reason)


@pytest.mark.parametrize("text", ["sm89", "SM89", "sm_89", "89", "8.9", " sm89 "])
def test_a_compute_capability_is_written_in_many_ways(text: str) -> None:
    assert normal_capability(text) == "sm89"


def test_of_two_digits_before_the_last() -> None:
    assert normal_capability("12.0") == normal_capability("sm120") == "sm120"


@pytest.mark.parametrize("text", ["", "ada", "sm", "sm8", "sm8999", "8.9.1", "sm89,sm80", "sm８９", "sm8٩"])
def test_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(OptionError, match=r"want compute capabilities such as sm89 or 8\.9, got"):
        normal_capability(text)


@pytest.mark.parametrize("workspace", [0, -1, (1 << 40) + 1, 1 << 80])
def test_a_workspace_of_nothing_or_beyond_any_gpu(workspace: int) -> None:
    with pytest.raises(OptionError, match=f"want 1 byte to 1,048,576 MiB, got {workspace:,} bytes"):
        check_workspace(workspace)
    check_workspace(1)
    check_workspace(1 << 40)
    check_workspace(None)
