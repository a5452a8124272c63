"""This machine as a board, by what its files and nvidia-smi say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_deploy.engines.planner import machine
from llava_deploy.engines.planner.boards import find_board

GB = 10**9
MEMINFO = "MemTotal:       {total} kB\nMemFree:        1000000 kB\nMemAvailable:   {available} kB\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 GB, of which 6 are to be had, without a GPU; ``bin`` is where programs are."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO.format(total=7_800_000, available=6_000_000), encoding="utf-8")
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setattr(machine, "_MODEL", tmp_path / "model")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return tmp_path


def nvidia_smi(place: Path, *lines: str, code: int = 0) -> None:
    program = place / "bin" / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n", "utf-8")
    program.chmod(0o755)


def test_available_memory_is_what_the_system_says(place: Path) -> None:
    assert machine.available_memory() == 6_000_000 * 1024
    (place / "proc" / "meminfo").unlink()
    assert machine.available_memory() is None


def test_without_a_gpu_there_is_the_hosts_memory(place: Path) -> None:
    nvidia_smi(place, "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", code=9)
    board = machine.this_machine()
    assert (board.memory, board.capability, board.bandwidth) == (None, None, None)
    assert board.host == 6_000_000 * 1024


def test_a_card_in_the_table_has_its_bandwidth(place: Path) -> None:
    nvidia_smi(place, "NVIDIA GeForce RTX 4090, 24564, 8.9", "NVIDIA L4, 23034, 8.9")
    board = machine.this_machine()
    assert (board.memory, board.capability, board.is_unified) == (24564 << 20, "sm89", False)
    assert board.bandwidth == find_board("rtx-4090").bandwidth
    assert board.host == 6_000_000 * 1024


def test_a_card_that_is_not_in_the_table_has_no_bandwidth(place: Path) -> None:
    nvidia_smi(place, "NVIDIA H300, 300000, 12.0")
    board = machine.this_machine()
    assert (board.memory, board.capability, board.bandwidth) == (300000 << 20, "sm120", None)
    assert "bandwidth is not in the table" in board.source


def test_where_nvidia_smi_knows_no_memory_it_is_the_hosts(place: Path) -> None:
    nvidia_smi(place, "NVIDIA GB10, [N/A], 12.1")
    board = machine.this_machine()
    assert (board.is_unified, board.memory, board.capability) == (True, 6_000_000 * 1024, "sm121")


@pytest.mark.parametrize(
    ("model", "total", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7_800_000, "orin-nano-8gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 16_000_000, "orin-nx-16gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 64_300_000, "agx-orin-64gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 128_800_000, "thor-128gb"),
    ],
)
def test_a_jetson_is_known_by_its_device_tree(place: Path, model: str, total: int, name: str) -> None:
    (place / "model").write_text(f"{model}\0", encoding="utf-8")
    (place / "proc" / "meminfo").write_text(MEMINFO.format(total=total, available=total // 2), encoding="utf-8")
    board, known = machine.this_machine(), find_board(name)
    assert (board.capability, board.tensorrt, board.bandwidth) == (known.capability, known.tensorrt, known.bandwidth)
    assert (board.is_unified, board.memory) == (True, total // 2 * 1024)
