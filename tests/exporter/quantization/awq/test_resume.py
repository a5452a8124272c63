"""A run that is stopped goes on where it was and ends in the same bytes; another run's directory is refused."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.errors import CheckpointError, InputError, LlavaDeployError
from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.quantization.awq import state
from llava_deploy.exporter.quantization.awq.quantize import awq, read_report

KILLED = """
import os, pathlib, signal, sys, torch
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.quantization.awq.calibration import demo_calibration
from llava_deploy.exporter.quantization.awq.quantize import AwqOptions, awq
from llava_deploy.exporter.quantization.request import QuantizeOptions
torch.set_num_threads(1)
def on_layer(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint = open_checkpoint(pathlib.Path(sys.argv[1]))
options = AwqOptions(QuantizeOptions(128, False, "fp16"), "cpu", 512)
awq(checkpoint, options, demo_calibration(checkpoint, 16), pathlib.Path(sys.argv[2]), on_layer)
"""


class StoppedError(Exception):
    pass


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_killed_process(
    demo: Checkpoint,
    demo_samples: Any,
    options: Any,
    tmp_path: Path,
    demo_checkpoint: Path,
    child_environment: dict[str, str],
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = [sys.executable, "-c", KILLED, str(demo_checkpoint), str(killed)]
    result = subprocess.run(run, check=False, timeout=120, env=child_environment)
    assert result.returncode == -signal.SIGKILL
    left = {path.name: path.stat().st_mtime_ns for path in killed.iterdir()}
    assert {"layer-0000.safetensors", "layer-0001.safetensors", "hidden-0002.safetensors"} <= left.keys()
    assert "layer-0002.safetensors" not in left

    steps: list[tuple[int, int]] = []
    awq(demo, options(128), demo_samples, killed, lambda *step: steps.append(step))
    awq(demo, options(128), demo_samples, whole)

    assert steps == [(2, 4), (3, 4), (4, 4)]
    assert (killed / "layer-0001.safetensors").stat().st_mtime_ns == left["layer-0001.safetensors"]
    assert files(killed) == files(whole)


@pytest.mark.parametrize("moment", ["keep_hidden", "keep_layer"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_stopped_at_any_moment(
    tiny: Callable[..., Checkpoint],
    make_samples: Any,
    options: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    layer: int,
) -> None:
    checkpoint = tiny()
    samples = make_samples(checkpoint)
    awq(checkpoint, options(), samples, tmp_path / "whole")
    keep = getattr(state.WorkDirectory, moment)

    def stop(self: Any, index: int, value: Any) -> None:
        if index == layer:
            raise StoppedError
        keep(self, index, value)

    with monkeypatch.context() as patch:
        patch.setattr(state.WorkDirectory, moment, stop)
        with pytest.raises(StoppedError):
            awq(checkpoint, options(), samples, tmp_path / "stopped")
    awq(checkpoint, options(), samples, tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_finished_run_is_not_done_again(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path
) -> None:
    checkpoint = tiny()
    awq(checkpoint, options(), make_samples(checkpoint), work)
    before, report = files(work), read_report(work, checkpoint)
    steps: list[tuple[int, int]] = []
    awq(checkpoint, options(), make_samples(checkpoint), work, lambda *step: steps.append(step))
    assert steps == [(3, 3)]
    assert files(work) == before
    assert read_report(work, checkpoint) == report


def test_the_state_of_another_run_is_refused(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path
) -> None:
    checkpoint = tiny()
    samples = make_samples(checkpoint)
    awq(checkpoint, options(), samples, work)
    before = files(work)
    first = samples[0]
    for changed, reason in (
        ((checkpoint, options(symmetric=True), samples), r"symmetric \(False, now True\)"),
        ((checkpoint, options(max_tokens=30), samples), r"max_tokens \(512, now 30\)"),
        ((checkpoint, options(), samples[1:]), r"calibration \(4 samples, .*, now 3 samples, "),
        ((checkpoint, options(), (replace(first, ids=first.ids + 1), *samples[1:])), r"calibration \(4 .* now 4 "),
        ((checkpoint, options(), (replace(first, pixels=-first.pixels), *samples[1:])), r"calibration \(4 .* now 4 "),
        ((tiny(rms_norm_eps=1e-3), options(), samples), r"config \("),
    ):
        with pytest.raises(InputError, match=rf"{work}: holds an AWQ run .* {reason}.*; name another directory"):
            awq(*changed, work)
    os.utime(checkpoint.directory / "model.safetensors")
    with pytest.raises(InputError, match=r"differs in checkpoint \("):
        awq(checkpoint, options(), samples, work)
    assert files(work) == before


@pytest.mark.parametrize(
    "names",
    [["photo.jpg"], ["lock", "photo.jpg"], ["photo.jpg", "state.json"], ["layer-0000.safetensors"], ["lock"]],
    ids="+".join,
)
def test_a_directory_that_is_none_of_ours(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path, names: list[str]
) -> None:
    checkpoint = tiny()
    work.mkdir()
    for name in names:
        (work / name).write_bytes(b"{}")
    with pytest.raises(
        InputError, match=r"want an empty directory or one of an AWQ run, found '(photo|layer|lock).*-o"
    ):
        awq(checkpoint, options(), make_samples(checkpoint), work)
    assert files(work) == dict.fromkeys(names, b"{}")


def test_a_lock_that_leads_to_somebodys_file(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path, tmp_path: Path
) -> None:
    checkpoint, precious = tiny(), tmp_path / "precious"
    precious.write_text("mine")
    work.mkdir()
    (work / "lock").symlink_to(precious)
    with pytest.raises(InputError, match="found 'lock' in it"):
        awq(checkpoint, options(), make_samples(checkpoint), work)
    assert precious.read_text() == "mine"


def test_a_file_where_the_directory_would_be(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path
) -> None:
    checkpoint = tiny()
    work.write_text("mine")
    with pytest.raises(InputError, match=f"{work}: want a directory for an AWQ run, found a file"):
        awq(checkpoint, options(), make_samples(checkpoint), work)
    assert work.read_text() == "mine"


def test_only_what_the_run_wrote_is_removed(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path, tmp_path: Path
) -> None:
    checkpoint, linked = tiny(), tmp_path / "linked"
    linked.mkdir()
    for directory in (work, linked):
        awq(checkpoint, options(), make_samples(checkpoint), directory)
    (work / ".tmpAb12cd").write_bytes(b"left by a killed process")
    assert state.remove_work(work)
    assert not work.exists()

    (tmp_path / "link").symlink_to(linked)
    assert not state.remove_work(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert files(linked) == {}
    awq(checkpoint, options(), make_samples(checkpoint), linked)
    (linked / "photo.jpg").write_bytes(b"mine")
    assert not state.remove_work(linked)
    assert files(linked) == {"photo.jpg": b"mine"}


def test_nothing_is_removed_under_another_process(work: Path) -> None:
    work.mkdir()
    (work / "state.json").write_text("{}")
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not state.remove_work(work)
    assert set(files(work)) == {"lock", "state.json"}


def test_one_process_at_a_time(tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path) -> None:
    checkpoint = tiny()
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is at work in it"):
            awq(checkpoint, options(), make_samples(checkpoint), work)


@pytest.mark.parametrize("name", ["state.json", "hidden-0003.safetensors", "layer-0001.safetensors"])
def test_damaged_state(tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path, name: str) -> None:
    checkpoint = tiny()
    awq(checkpoint, options(), make_samples(checkpoint), work)
    (work / name).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=name):
        awq(checkpoint, options(), make_samples(checkpoint), work)


def test_a_disk_that_takes_no_more(
    tiny: Callable[..., Checkpoint], make_samples: Any, options: Any, work: Path
) -> None:
    checkpoint = tiny()
    samples = make_samples(checkpoint)
    most = 3 << 10  # bytes of a file, in place of a full disk: the state has room, the layers have not
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(LlavaDeployError, match=f"{work}: not written .File too large at .*safetensors"):
            awq(checkpoint, options(), samples, work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    awq(checkpoint, options(), samples, work)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("embed_tokens", "embeddings and features: NaN or infinite for sample 0"),
        ("layers.1.input_layernorm", "output of decoder layer 1: NaN or infinite for sample 0"),
    ],
)
def test_damaged_floats_are_said_before_the_search_ends(
    tiny: Callable[..., Checkpoint],
    make_samples: Any,
    options: Any,
    edit_tensors: Any,
    work: Path,
    name: str,
    said: str,
) -> None:
    checkpoint = tiny()
    key = checkpoint.tensors[f"language_model.{name}.weight"].key
    path = checkpoint.directory / "model.safetensors"
    edit_tensors(path, lambda tensors: tensors.update({key: tensors[key] * float("nan")}))
    with pytest.raises(CheckpointError, match=f"{checkpoint.directory}: {said}; the checkpoint is damaged"):
        awq(open_checkpoint(checkpoint.directory), options(), make_samples(checkpoint), work)
    assert not (work / "layer-0001.safetensors").exists()
