"""A plan as tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.planner.boards import Board, find_board
from llava_deploy.engines.planner.model import planned_bundle
from llava_deploy.engines.planner.plan import plan, resolve_sizes
from llava_deploy.runtime.terminal import show, size
from llava_deploy.runtime.terminal_plan import plan_tables


def planned(bundle: Path, board: Board) -> dict[str, Any]:
    model = planned_bundle(bundle, read_manifest(bundle))
    return plan(model, board, resolve_sizes(model, 2, 512, None), None).to_dict()


def lines_of(text: str, stage: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith(stage)]


def test_every_kind_of_memory_has_a_line_and_the_limits_are_said(
    demo_bundle_fp16: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(plan_tables(planned(demo_bundle_fp16, find_board("rtx-4090"))))
    text = capsys.readouterr().out
    assert "Plan for checkpoint in fp16 on GeForce RTX 4090" in text
    assert "24.0 GB of the GPU, 1008 GB/s" in text
    run, limits = lines_of(text, "run tensorrt-rtx")
    assert run.split()[2] == "GPU"
    assert "yes where the host has" in run
    assert int(limits.split()[2]) > 2
    assert limits.split()[3] == "1024"
    assert {"host", "mapped files"} <= {line.strip().partition("   ")[0] for line in text.splitlines()}


def test_what_does_not_fit_or_cannot_be_is_said(demo_bundle_fp16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nano = dataclasses.replace(find_board("orin-nano-4gb"), memory=700 * 10**6)
    show(plan_tables(planned(demo_bundle_fp16, nano)))
    text = capsys.readouterr().out
    assert "700.0 MB for host and GPU" in text
    run, limits = lines_of(text, "run tensorrt ")
    assert run.endswith("no")
    assert limits.split()[2] == "0"
    assert "TensorRT for RTX 1.7 does not run on sm87" in text
    assert "no wheel of onnxruntime-gpu on PyPI is for sm87" in text


def test_a_machine_without_a_gpu_has_its_own_memory(demo_bundle_fp16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laptop = Board("auto", "this machine", None, 8 * 10**9, False, None, None, None, "/proc/meminfo")
    show(plan_tables(planned(demo_bundle_fp16, laptop)))
    text = capsys.readouterr().out
    assert "8.0 GB of the host" in text
    assert "no NVIDIA GPU" in lines_of(text, "run tensorrt-rtx")[0]
    assert len(lines_of(text, "run onnxruntime ")) == 2
    assert "no NVIDIA GPU" in lines_of(text, "run onnxruntime-cuda")[0]


def test_the_disk_and_what_is_not_planned_are_said(demo_bundle_fp16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = planned(demo_bundle_fp16, find_board("rtx-4090"))
    taken = {stage["backend"]: stage["disk"] for stage in plain["stages"] if stage["stage"] == "build"}
    whole, copied = size(plain["bundle_bytes"]), f"{size(taken['tensorrt'])} (tensorrt, tensorrt-rtx)"
    own = f"{whole} for the bundle; for an engine {size(taken['onnxruntime'])} (onnxruntime)"
    show(plan_tables(plain))
    text = capsys.readouterr().out
    assert lines_of(text, "on the disk") == [f"on the disk    {own}, hard links (onnxruntime-cuda), {copied}"]
    second = size(plain["int8_prefill_bytes"])
    assert f"a second decoder, by build --int8 prefill: {second} more for onnxruntime" in text
    for stage in plain["stages"]:
        if (stage["stage"], stage["backend"]) == ("build", "onnxruntime-cuda"):
            stage["disk"] = 7_000_000
    show(plan_tables(plain))
    assert f"{own}, 7.0 MB (onnxruntime-cuda), {copied}" in capsys.readouterr().out
