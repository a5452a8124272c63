"""Building for TensorRT, planning, and choosing a backend on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from llava_deploy.engines.engine_manifest import read_engine_manifest
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe

Invoke = Callable[..., Result]
ErrorLine = Callable[[Result], str]


def test_build_for_rtx_makes_an_engine_with_the_limits_asked_for(
    demo_bundle_fp16: Path, tmp_path: Path, invoke: Invoke
) -> None:
    bundle = shutil.copytree(demo_bundle_fp16, tmp_path / "bundle")
    limits = ("--max-batch", "2", "--max-len", "256", "--max-seq", "128", "--opt-total", "200", "--workspace", "64")
    limits = (*limits, "--parts", "2")
    arguments = ("build", str(bundle), "--backend", "tensorrt-rtx", "--sm", "8.9", "--sm", "sm86", *limits)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    directory = Path(result.stdout.strip())
    assert directory.parent == bundle / "engines"
    recipe = read_engine_manifest(directory).key.tensorrt
    assert isinstance(recipe, TensorRtRecipe)
    assert recipe.capabilities == ("sm86", "sm89")
    found = recipe.limits
    assert (found.max_batch, found.max_len, found.max_seq, found.opt_total) == (2, 256, 128, 200)
    assert recipe.workspace == 64 << 20
    assert recipe.parts == (2, 2)
    before = (directory / "decoder-2-of-2.plan").stat().st_mtime_ns
    assert invoke(*arguments).exit_code == 0
    assert (directory / "decoder-2-of-2.plan").stat().st_mtime_ns == before  # there already


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "BUNDLE", "--max-len", "64"], "--max-len: of no effect with --backend onnxruntime"),
        (["build", "BUNDLE", "--sm", "sm89"], "--sm: of no effect with --backend onnxruntime"),
        (
            ["build", "BUNDLE", "--backend", "tensorrt-rtx", "--accuracy-level", "1"],
            "--accuracy-level: of no effect with --backend tensorrt-rtx",
        ),
        (["build", "BUNDLE", "--backend", "tensorrt-rtx"], "--sm: want the compute capabilities to build for"),
        (["build", "BUNDLE", "--backend", "tensorrt-rtx", "--sm", "sm52"], "--sm: TensorRT for RTX"),
        (["build", "BUNDLE", "--backend", "tensorrt-rtx", "--sm", "sm89", "--max-len", "99999"], "--max-len: want"),
        (["build", "BUNDLE", "--backend", "tensorrt-rtx", "--sm", "sm89", "--workspace", "0"], "--workspace: want"),
        (["build", "BUNDLE", "--backend", "tensorrt-rtx", "--sm", "sm89", "--trt-version", "9"], "--trt-version: "),
        (["build", "BUNDLE", "--parts", "2"], "--parts: of no effect with --backend onnxruntime"),
        (
            ["build", "BUNDLE", "--backend", "tensorrt-rtx", "--sm", "sm89", "--parts", "5"],
            "--parts: want 1 to 4 (layers of the decoder), got 5",
        ),
        (["plan", "BUNDLE", "--parts", "0"], "--parts: want 1 to 4 (layers of the decoder), got 0"),
        (["plan", "BUNDLE", "--board", "commodore-64"], "--board: want auto or one of orin-nano-4gb"),
        (["plan", "BUNDLE", "--precision", "int4"], "--precision: of no effect on a bundle"),
        (["plan", "BUNDLE", "--max-len", "99999"], "--max-len: want 1 to"),
        (["plan", "BUNDLE", "--max-batch", "0"], "--max-batch: want 1 or more"),
        (["plan", "CHECKPOINT", "--precision", "int4", "--group-size", "48"], "--group-size: want"),
        (["plan", "CHECKPOINT", "--group-size", "64"], "--group-size: of use with --precision int4 or int4-awq only"),
        (["plan", "nowhere"], "config.json"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str],
    said: str,
    demo_bundle_fp16: Path,
    demo_checkpoint: Path,
    invoke: Invoke,
    error_line: ErrorLine,
) -> None:
    places = {"BUNDLE": str(demo_bundle_fp16), "CHECKPOINT": str(demo_checkpoint)}
    result = invoke(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert said in error_line(result)


def test_a_backend_that_is_named_and_cannot_run_is_an_error(
    demo_bundle_fp16: Path, invoke: Invoke, error_line: ErrorLine
) -> None:
    result = invoke("run", str(demo_bundle_fp16), "--prompt", "x", "--backend", "tensorrt-rtx")
    assert result.exit_code == 1
    assert "no engine of TensorRT for RTX; build one with: llava-deploy build" in error_line(result)


def test_plan_of_a_bundle_and_of_its_checkpoint_agree(
    demo_bundle_fp16: Path, demo_checkpoint: Path, invoke: Invoke
) -> None:
    """What an export would write is planned as what it has written."""
    plans = []
    for source in (demo_bundle_fp16, demo_checkpoint):
        result = invoke("plan", str(source), "--board", "orin-nano-8gb", "--max-len", "512", "--json")
        assert result.exit_code == 0, result.output
        plans.append({(s["stage"], s["backend"]): s for s in json.loads(result.stdout)["stages"]})
    bundle, checkpoint = plans
    assert set(checkpoint) - set(bundle) == {("export", None)}
    for key, stage in bundle.items():
        for place in ("anonymous", "mapped", "device"):
            want = 0 if stage["memory"] is None else stage["memory"][place]
            found = 0 if stage["memory"] is None else checkpoint[key]["memory"][place]
            assert found == pytest.approx(want, rel=1e-4), (key, place)


def test_plan_is_a_table_for_people(demo_bundle_fp16: Path, invoke: Invoke) -> None:
    result = invoke("plan", str(demo_bundle_fp16), "--board", "rtx-4090", "--parts", "3")
    assert result.exit_code == 0
    assert "3 plans of TensorRT, of 2, 1, 1 layers" in result.stdout
    assert "Peak memory" in result.stdout
    assert "run tensorrt-rtx" in result.stdout
