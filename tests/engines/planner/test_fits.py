"""Whether a bundle fits a machine that somebody else has looked at."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import pytest

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.fitting import Room
from llava_deploy.engines.names import Backend
from llava_deploy.engines.planner.fits import fits_here

GB = 10**9


def test_a_gpu_of_its_own_has_its_own_memory(demo_bundle_fp16: Path) -> None:
    fits = fits_here(demo_bundle_fp16, Room(16 * GB, 8 * GB, "sm89", is_unified=False, tensorrt=None))
    assert list(fits) == [*get_args(Backend)]
    assert all(fit.run and fit.build for fit in fits.values())
    fits = fits_here(demo_bundle_fp16, Room(16 * GB, GB // 1000, "sm89", is_unified=False, tensorrt=None))
    assert [fits[backend].run for backend in get_args(Backend)] == [True, False, False, False]
    assert [fits[backend].largest_len for backend in get_args(Backend)] == [1024, 0, 0, 0]
    assert fits["onnxruntime-cuda"].build  # which takes nothing of the GPU


def test_shared_memory_is_counted_once(demo_bundle_fp16: Path) -> None:
    fits = fits_here(demo_bundle_fp16, Room(4 * GB, None, "sm87", is_unified=True, tensorrt="10.3"))
    assert fits["tensorrt"].run
    assert (fits["tensorrt-rtx"].run, fits["tensorrt-rtx"].build) == (False, False)  # which knows no sm87
    assert (fits["onnxruntime-cuda"].run, fits["onnxruntime-cuda"].build) == (False, True)  # no wheel is for a Jetson
    fits = fits_here(demo_bundle_fp16, Room(GB // 10, None, "sm87", is_unified=True, tensorrt="10.3"))
    assert fits["tensorrt"].run is False


def test_what_nobody_knows_is_not_made_up(demo_bundle_fp16: Path, tmp_path: Path) -> None:
    fits = fits_here(demo_bundle_fp16, Room(None, None, None, is_unified=False, tensorrt=None))
    assert (fits["onnxruntime"].run, fits["onnxruntime"].largest_len) == (None, None)
    assert fits["tensorrt"].run is False
    bundle = shutil.copytree(demo_bundle_fp16, tmp_path / "bundle")
    (bundle / "decoder.onnx").unlink()
    with pytest.raises(BundleError):
        fits_here(bundle, Room(GB, None, None, is_unified=False, tensorrt=None))
