"""A LLaVA-1.5-7B for the planner, of shapes alone, and the shipped bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.names import Precision
from llava_deploy.engines.planner.model import PlannedModel, planned_bundle
from llava_deploy.exporter.config import DecoderConfig, LlavaConfig, ProjectorConfig, RopeConfig, VisionConfig
from llava_deploy.exporter.plan_source import planned_config
from llava_deploy.exporter.quantization.request import QuantizeOptions

SevenB = Callable[..., PlannedModel]


@pytest.fixture(scope="session")
def config_7b() -> LlavaConfig:
    """LLaVA-1.5-7B's config."""
    rope = RopeConfig("default", 10_000.0, None, None, None, None)
    decoder = DecoderConfig("llama", 4096, 11008, 32, 32, 32, 128, 32064, 4096, "silu", 1e-5, rope, False, False, False)
    vision = VisionConfig("clip_vision_model", 1024, 4096, 24, 16, 336, 14, 3, "quick_gelu", 1e-5)
    projector = ProjectorConfig((1024, 4096, 4096), "gelu", True)
    return LlavaConfig("llava-hf", vision, projector, decoder, (-2,), "patch", 32000, None, None, "left")


@pytest.fixture(scope="session")
def seven_b(config_7b: LlavaConfig) -> SevenB:
    """The model in a precision; int4 in groups of 128, with zero points unless ``symmetric``."""

    def make(precision: Precision, *, symmetric: bool = False) -> PlannedModel:
        return planned_config(config_7b, "7b", precision, QuantizeOptions(128, symmetric, "fp16"), {})

    return make


@pytest.fixture(scope="session")
def demo(demo_bundle_fp16: Path) -> PlannedModel:
    """The shipped model, from its fp16 bundle."""
    return planned_bundle(demo_bundle_fp16, read_manifest(demo_bundle_fp16))
