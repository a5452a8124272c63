"""Prompts of a length, memory's peaks, and what the machine is."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.runtime import Llava
from llava_deploy.runtime.bench import machine
from llava_deploy.runtime.bench.machine import physical_cores, this_machine, versions
from llava_deploy.runtime.bench.memory import peak_watch
from llava_deploy.runtime.bench.prompts import Prompts
from llava_deploy.runtime.tokenize import tokenize_prompt

TWO_SOCKETS = """processor : {0}
model name : Abacus 9000
physical id : {1}
core id : {2}
"""


@pytest.fixture(scope="module")
def llava(demo_bundle: Path) -> Llava:
    return Llava.load(demo_bundle, threads=1)


@pytest.mark.parametrize("tokens", [4, 17, 64, 500])
def test_prompts_have_as_many_tokens_as_asked_for(llava: Llava, tokens: int) -> None:
    prompts = Prompts(llava.manifest, llava.encoder.tokenizer)

    def count(prompt: str) -> int:
        return len(tokenize_prompt(prompt, llava.encoder.tokenizer, llava.manifest.chat))

    assert tokens - 2 <= count(prompts.text(tokens)) <= tokens
    assert prompts.text(500).startswith(prompts.text(tokens))
    one, other = prompts.new_text(1, tokens), prompts.new_text(2, tokens)
    assert tokens - 2 <= count(one) <= tokens
    assert one.partition(" ")[0] != other.partition(" ")[0]
    ids = tokenize_prompt(prompts.about_picture(36 + tokens), llava.encoder.tokenizer, llava.manifest.chat)
    assert (ids == IMAGE_TOKEN_INDEX).sum() == 1
    assert tokens - 2 <= len(ids) - 1 <= tokens


def test_pictures_are_all_different_and_the_same_again(llava: Llava) -> None:
    prompts = Prompts(llava.manifest, llava.encoder.tokenizer)
    one, again, other = (np.asarray(prompts.picture(number)) for number in (1, 1, 2))
    assert one.shape == (96, 96, 3)
    assert (one == again).all()
    assert (one != other).any()


def test_a_peak_belongs_to_its_phase() -> None:
    with peak_watch(None) as watch:
        watch.phase("large")
        block = np.ones(64 << 20, np.uint8)
        watch.look()
        del block
        watch.phase("small")
    before, large, small = watch.peaks
    assert [peak.phase for peak in (before, large, small)] == ["before loading", "large", "small"]
    assert large.anonymous >= before.anonymous + (60 << 20)
    assert small.anonymous <= large.anonymous - (60 << 20)


def test_a_peak_between_two_looks_of_ours_is_seen_by_the_thread() -> None:
    with peak_watch(None) as watch:
        watch.phase("held")
        before = watch.peaks[-1].anonymous
        block = np.ones(64 << 20, np.uint8)
        deadline = time.monotonic() + 20
        while watch.peaks[-1].anonymous < before + (60 << 20):
            assert time.monotonic() < deadline, "the thread has not looked"
            block[::4096] += 1


def test_the_devices_memory_is_over_what_was_in_use_before() -> None:
    used = iter([100, 100, *[150] * 1, *[400] * 100_000])
    with peak_watch(lambda: next(used)) as watch:
        watch.phase("loading")
    assert watch.peaks[0].device in (0, 50, 300)
    assert watch.peaks[-1].device == 300


def test_a_system_without_proc_has_no_peaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llava_deploy.runtime.bench.memory._STATUS", tmp_path / "none")
    with peak_watch(None) as watch:
        watch.phase("loading")
    assert watch.peaks == ()


def test_cores_are_counted_once_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", cpuinfo)
    threads = [(socket, core) for socket in (0, 1) for core in (0, 1) for _ in range(2)]
    cpuinfo.write_text("\n".join(TWO_SOCKETS.format(at, *each) for at, each in enumerate(threads)), encoding="utf-8")
    assert physical_cores() == 4
    assert this_machine("H100").cpu == "Abacus 9000"
    assert this_machine("H100").gpu == "H100"
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert physical_cores() == 2
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert physical_cores() == 2
    assert this_machine(None).logical_cpus == 2


def test_versions_name_what_runs_it() -> None:
    assert list(versions("onnxruntime")) == ["python", "onnxruntime", "llava-deploy", "numpy", "tokenizers", "pillow"]
