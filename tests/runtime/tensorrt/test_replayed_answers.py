"""The demo's answers through the full TensorRT, whose decode steps are replayed as CUDA graphs: fp16 and int4."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest
from llava_deploy.runtime import Llava

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

FULL = "11.4.0.106"
MAX_LEN = 256


@pytest.fixture(params=["fp16", "int4"])
def bundle(request: pytest.FixtureRequest, demo_checkpoint: Path, demo_bundle_fp16: Path, tmp_path: Path) -> Path:
    """A bundle of its own, without engines."""
    if request.param == "fp16":
        return shutil.copytree(demo_bundle_fp16, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    options = QuantizeOptions(group_size=32, symmetric=False, lm_head="int4")
    export(round_to_nearest(open_checkpoint(demo_checkpoint), options), tmp_path / "bundle", "int4")
    return tmp_path / "bundle"


def test_answers_are_those_of_the_canonical_graphs(bundle: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.provide("tensorrt", FULL)
    fake_gpu.write_engine(bundle, backend="tensorrt", version=FULL)
    ours = Llava.load(bundle, backend="auto")
    assert ours.backend.startswith("TensorRT 11.4.0.106 on Fake GPU (sm89)")
    level: Any = {"accuracy_level": 0} if ours.manifest.quantization is not None else {}
    theirs = Llava.load(bundle, backend="onnxruntime", threads=1, max_len=MAX_LEN, **level)
    scenes = [(each.picture, each.question) for each in islice(examples(Split.HELD_OUT, seed=3), 6)]
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for _, question in scenes]
    images = [[picture] for picture, _ in scenes]
    for at, size in ((0, 1), (1, 3), (4, 2), (0, 1)):
        part = slice(at, at + size)
        found = ours.generate(prompts[part], images[part], max_new_tokens=12)
        want = theirs.generate(prompts[part], images[part], max_new_tokens=12)
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in want]
        assert all(answer.text for answer in found)
    assert fake_gpu.calls["cudaGraphLaunch"] > fake_gpu.calls["cudaGraphInstantiate"] > 0
    del ours
    assert fake_gpu.live() == {}
