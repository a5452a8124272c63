"""The lowered graphs, both dialects, run by ONNX Runtime on the fake GPU: the tokens that the canonical graphs give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorrt_families import KINDS

from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.runtime import Llava

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

MakeBundle = Callable[[str, str], Path]

MAX_LEN = 96
NEW_TOKENS = 12
DIALECTS = {"in-place": ("tensorrt-rtx", None), "growing": ("tensorrt", "10.3.0.26")}


def on_fake_gpu(bundle: Path, dialect: str, gpu: FakeGpu, parts: tuple[int, ...] | None = None) -> Llava:
    backend, version = DIALECTS[dialect]
    if version is None:
        gpu.write_engine(bundle, parts=parts)
    else:
        gpu.provide(backend, version)
        gpu.write_engine(bundle, backend=backend, version=version, cache="growing", parts=parts)
    return Llava.load(bundle, backend=backend, max_len=MAX_LEN)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", KINDS)
def test_every_family(family: str, dialect: str, bundle_of: MakeBundle, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """In float32, where random weights leave no doubt about the largest logit; rows of different lengths."""
    bundle = shutil.copytree(bundle_of(family, "fp32"), tmp_path / "bundle")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)
    prompts = ["What is <image> this?", "a <image> b <image>", "and no picture, but a longer text than any of them"]
    images = [[pictures[0]], [*pictures], []]
    tokens = []
    for llava in (
        Llava.load(bundle, backend="onnxruntime", threads=1, max_len=MAX_LEN),
        on_fake_gpu(bundle, dialect, fake_gpu),
    ):
        answers = llava.generate(prompts, images, max_new_tokens=NEW_TOKENS)
        tokens.append([answer.token_ids for answer in answers])
    assert tokens[0] == tokens[1]
    assert len({*tokens[0]}) == len(prompts)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("stored", "parts"),
    [
        *((stored, None) for stored in ("fp16", "int4 symmetric", "int4 asymmetric", "int4-awq, int8 head")),
        *(("int4 head", None), ("fp16", (2, 2)), ("int4 asymmetric", (1, 2, 1)), ("int4-awq, int8 head", (3, 1))),
    ],
)
def test_every_precision(
    stored: str,
    parts: tuple[int, ...] | None,
    dialect: str,
    bundle_of: MakeBundle,
    fake_gpu: FakeGpu,
    tmp_path: Path,
) -> None:
    """Of the shipped model, which is sure of its answers; whole and in parts."""
    bundle = shutil.copytree(bundle_of("demo", stored), tmp_path / "bundle")
    asked = [*islice(examples(Split.HELD_OUT, seed=3), 4)]
    prompts = [f"USER: <image>\n{example.question} ASSISTANT:" for example in asked]
    images = [[example.picture] for example in asked]
    level = None if stored == "fp16" else 1  # activations in float32, as in the lowered graph
    canonical = Llava.load(bundle, backend="onnxruntime", threads=1, max_len=MAX_LEN, accuracy_level=level)
    lowered = on_fake_gpu(bundle, dialect, fake_gpu, parts)
    tokens = [
        [answer.token_ids for answer in llava.generate(prompts, images, max_new_tokens=NEW_TOKENS)]
        for llava in (canonical, lowered)
    ]
    assert tokens[0] == tokens[1]
    assert all(tokens[0])
