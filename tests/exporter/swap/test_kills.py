"""A swap that is killed leaves the old bundle or the new one, and nothing that the next one does not sweep."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from finetuned import DECODER, PROJECTOR, finetuned, logits_of

from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.swap.swap import swap
from llava_deploy.runtime import Llava

TIMES = 20
SUPPORT = Path(__file__).parents[2] / "support"


def test_at_any_moment(
    demo_checkpoint: Path, demo_bundle_fp16: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    bundle = Path(shutil.copytree(demo_bundle_fp16, tmp_path / "bundle"))
    engine = build_onnxruntime(bundle)
    want = {(bundle / "manifest.json").read_text(): logits_of(Llava.load(bundle))}
    other = finetuned(open_checkpoint(demo_checkpoint), (*DECODER, *PROJECTOR))
    swapped = Path(shutil.copytree(bundle, tmp_path / "other" / "bundle"))
    swap(other, swapped, "projector")
    want[(swapped / "manifest.json").read_text()] = logits_of(Llava.load(swapped))
    shutil.rmtree(swapped.parent)
    ends = []
    command = [sys.executable, SUPPORT / "killed_swaps.py", bundle, str(TIMES)]
    environment = {**child_environment, "PYTHONPATH": str(SUPPORT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            ends.append(line.strip())
            text = (bundle / "manifest.json").read_text()
            check_files(bundle, read_manifest(bundle).files, Integrity.FULL, remedy="")
            llava = Llava.load(bundle)
            assert engine.name in llava.backend
            np.testing.assert_array_equal(logits_of(llava), want[text])
            process.stdin.write("\n")
            process.stdin.flush()
    assert len(ends) == TIMES + 1
    assert ends.count("killed") > TIMES / 2
    assert {*ends} <= {"killed", "exited 0"}
    swap(other, bundle, "decoder")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]  # what the killed ones left is gone
