"""Checkpoints and calibration samples that are quick to search."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.quantization.awq.calibration import CalibrationSample, demo_calibration
from llava_deploy.exporter.quantization.awq.quantize import AwqOptions
from llava_deploy.exporter.quantization.request import QuantizeOptions

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


@pytest.fixture
def tiny(make_llava: Any) -> Callable[..., Checkpoint]:
    """A random checkpoint, ``tiny(**fields_of_its_decoder)``; every size is a multiple of 32."""
    names = (f"checkpoint-{number}" for number in count())
    return lambda **text: open_checkpoint(make_llava(next(names), text={**TEXT, **text}).directory)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """For a run's state."""
    return tmp_path / "work"


@pytest.fixture
def make_samples() -> Callable[[Checkpoint], tuple[CalibrationSample, ...]]:
    """Random prompts for a random checkpoint: with one picture, two, none."""

    def make(checkpoint: Checkpoint) -> tuple[CalibrationSample, ...]:
        rng = np.random.default_rng(0)
        size = checkpoint.config.vision.image_size
        samples = []
        for pictures in (1, 2, 0, 1):
            ids = rng.integers(0, 256, 20)
            ids[3 : 3 + pictures] = IMAGE_TOKEN_INDEX
            pixels = rng.standard_normal((pictures, 3, size, size)).astype(np.float32)
            samples.append(CalibrationSample(f"sample {len(samples)}", ids, pixels))
        return tuple(samples)

    return make


@pytest.fixture(scope="session")
def demo(demo_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(demo_checkpoint)


@pytest.fixture(scope="session")
def demo_samples(demo: Checkpoint) -> tuple[CalibrationSample, ...]:
    return demo_calibration(demo, 16)


@pytest.fixture
def options() -> Callable[..., AwqOptions]:
    """``options(group_size, symmetric=…, lm_head=…, max_tokens=…)``."""

    def make(
        group_size: int = 32, *, symmetric: bool = False, lm_head: Any = "fp16", max_tokens: int = 512
    ) -> AwqOptions:
        return AwqOptions(QuantizeOptions(group_size, symmetric, lm_head), "cpu", max_tokens)

    return make
