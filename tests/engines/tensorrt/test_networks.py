"""Every kind of model, in every precision and both dialects: parsed, held against its contract, and built.

TensorRT for RTX does all of it without a GPU; nothing here is run.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from tensorrt_families import KINDS

from llava_deploy.engines.engine_manifest import VISION_PLAN, read_engine_manifest
from llava_deploy.engines.lowering.files import lower_beside
from llava_deploy.engines.lowering.tensorrt import decoder_passes, vision_passes
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, read_manifest
from llava_deploy.engines.planner.model import planned_bundle
from llava_deploy.engines.planner.parts import quantized_weights
from llava_deploy.engines.tensorrt.builder import build_tensorrt
from llava_deploy.engines.tensorrt.checks import check_network, expected_decoder, expected_vision, with_sizes
from llava_deploy.engines.tensorrt.constructs import Release, cache_form, parse_release
from llava_deploy.engines.tensorrt.messages import Messages
from llava_deploy.engines.tensorrt.network import parse_network
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions
from llava_deploy.engines.tensorrt_module import TensorRtModule, import_tensorrt

MakeBundle = Callable[[str, str], Path]

FAMILIES = ["demo", *KINDS, "heads without a fused kernel"]
STORED = [
    "fp32",
    "fp16",
    "int4 symmetric",
    "int4 asymmetric",
    "int4-awq, int8 head",
    "int4 head",
    "int4 act-order",
]
RELEASES = {"in-place": Release("tensorrt-rtx", 1, 7), "growing": parse_release("10.3")}
CAPABILITIES = ("sm80", "sm86", "sm89", "sm120")
MAX_LEN = 96


@pytest.fixture(scope="module")
def module() -> TensorRtModule:
    return import_tensorrt("tensorrt-rtx")


def parse_and_check(bundle: Path, directory: Path, module: TensorRtModule, release: Release) -> None:
    """Both graphs as TensorRT's networks, which have what the manifest says, and nothing is said against them."""
    manifest, cache = read_manifest(bundle), cache_form(release)
    spec = manifest.decoder.spec() if cache == "in-place" else manifest.decoder.growing_spec()
    vision = lower_beside(bundle / VISION_GRAPH, directory, vision_passes(release))
    decoder = lower_beside(bundle / DECODER_GRAPH, directory, decoder_passes(cache, MAX_LEN))
    quantized = quantized_weights(planned_bundle(bundle, manifest).decoder_weights)
    expected = expected_decoder(range(manifest.decoder.layers), quantized, cache)
    for lowered, contract, layers in (
        (vision, manifest.vision.spec(), expected_vision(vision.operators["Attention"])),
        (decoder, with_sizes(spec, {"max_len": MAX_LEN}), expected),
    ):
        messages = Messages()
        parsed = parse_network(module, lowered.path, messages)
        check_network(module.api, parsed.network, contract, layers)
        assert (messages.errors, messages.losses) == ([], [])


@pytest.mark.parametrize("dialect", RELEASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_written(
    family: str, dialect: str, bundle_of: MakeBundle, tmp_path: Path, module: TensorRtModule
) -> None:
    for stored in ("fp16", "int4 asymmetric"):
        directory = tmp_path / stored
        directory.mkdir()
        parse_and_check(bundle_of(family, stored), directory, module, RELEASES[dialect])


@pytest.mark.parametrize("dialect", RELEASES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", ["demo", "llava-1.5"])
def test_every_precision_is_read_as_written(
    family: str, stored: str, dialect: str, bundle_of: MakeBundle, tmp_path: Path, module: TensorRtModule
) -> None:
    parse_and_check(bundle_of(family, stored), tmp_path, module, RELEASES[dialect])


def build(bundle: Path, tmp_path: Path, rows: int) -> Path:
    """Both engines for all capabilities; the directory of a copy's."""
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    options = TensorRtBuildOptions("tensorrt-rtx", capabilities=CAPABILITIES, max_batch=rows, max_len=MAX_LEN)
    return build_tensorrt(copy, options)


@pytest.mark.parametrize(
    ("family", "stored"),
    [*((family, "fp16") for family in FAMILIES), *(("llava-1.5", stored) for stored in STORED if stored != "fp16")],
)
def test_one_build_for_four_generations(family: str, stored: str, bundle_of: MakeBundle, tmp_path: Path) -> None:
    directory = build(bundle_of(family, stored), tmp_path, 2)
    manifest = read_engine_manifest(directory)
    assert directory.name.endswith("-".join(CAPABILITIES))
    assert {entry.path for entry in manifest.files} == {VISION_PLAN, "decoder.plan"}


@pytest.mark.parametrize(
    ("stored", "bits", "rows"), [("fp16", 16, 1), ("int4 symmetric", 4.5, 2), ("int4 asymmetric", 5.5, 1)]
)
def test_weights_are_held_once_and_in_their_bits(
    stored: str, bits: float, rows: int, bundle_of: MakeBundle, tmp_path: Path
) -> None:
    """A layer twice as wide has the same kernels, and costs what its weights take.

    In int4 a group of 32 has a scale in 16 bits and, where it had a zero point, two terms.
    """
    sizes, values, others = [], [], []
    for family in ("wide", "twice as wide"):
        (tmp_path / family).mkdir()
        bundle = bundle_of(family, stored)
        sizes.append((build(bundle, tmp_path / family, rows) / "decoder.plan").stat().st_size)
        graph = ir.load(bundle / DECODER_GRAPH).graph.initializers
        values.append(sum(math.prod(v.shape.numpy()) for name, v in graph.items() if name.endswith("proj.weight")))
        others.append(2 * math.prod(graph["lm_head.weight"].shape.numpy()))
    more = sizes[1] - sizes[0] - (others[1] - others[0])
    assert 0.99 * bits < 8 * more / (values[1] - values[0]) < 1.05 * bits
