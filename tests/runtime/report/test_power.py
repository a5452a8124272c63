"""Power from tools and files of the kernel, all of them made up, some of them broken."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from llava_deploy.runtime.report import power, power_files
from llava_deploy.runtime.report.power import (
    PolledPower,
    PowerReading,
    mean_watts,
    nvidia_smi_watts,
    open_power,
    tegrastats_watts,
)
from llava_deploy.runtime.report.power_files import PowerFiles, ina_watts, rapl_watts

ORIN_NANO = (
    "11-23-2026 06:00:00 RAM 2467/7620MB (lfb 2x4MB) SWAP 0/3810MB CPU [3%@729,off,off] GR3D_FREQ 0% "
    "cpu@46.5C tj@47C VDD_IN 4893mW/4880mW VDD_CPU_GPU_CV 521mW/520mW VDD_SOC 1402mW/1400mW"
)
AGX_ORIN = (
    "RAM 1/2MB VDD_GPU_SOC 2400mW/2400mW VDD_CPU_CV 800mW/800mW VIN_SYS_5V0 2013mW/2013mW VDDQ_VDD2_1V8AO 403mW/1mW"
)
NANO = "RAM 1/2MB POM_5V_IN 2524/2600 POM_5V_GPU 82/80 POM_5V_CPU 494/490"

Tool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Put a program of a name on the path: a script of the shell."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(power, "_PATIENCE", 0.3)
    monkeypatch.setattr(power, "_ENDING", 0.2)

    def make(name: str, script: str) -> None:
        path = place / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.fixture
def files(tmp_path: Path) -> PowerFiles:
    return PowerFiles(tmp_path / "hwmon", tmp_path / "powercap")


def write(place: Path, **values: object) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (place / name).write_text(f"{value}\n", encoding="utf-8")


def ina(files: PowerFiles, **rails: tuple[int, int]) -> None:
    """Rails in millivolts and milliamperes."""
    chip = files.hwmon / "hwmon3"
    write(chip, name="ina3221")
    for number, (name, (volts, amperes)) in enumerate(rails.items(), 1):
        write(chip, **{f"in{number}_label": name, f"in{number}_input": volts, f"curr{number}_input": amperes})


def test_lines_of_tegrastats() -> None:
    assert tegrastats_watts(ORIN_NANO) == pytest.approx(4.893)
    assert tegrastats_watts(AGX_ORIN) == pytest.approx(2.4 + 0.8 + 2.013)  # the fourth is fed by the third
    assert tegrastats_watts(NANO) == pytest.approx(2.524)
    assert tegrastats_watts("RAM 2467/7620MB GR3D_FREQ 0%") is None
    assert tegrastats_watts("VDD_GPU_SOC 2400mW/2400mW") is None


def test_lines_of_nvidia_smi() -> None:
    assert nvidia_smi_watts(" 71.23\n") == 71.23
    for text in ("[N/A]", "[Not Supported]", "", "NVIDIA-SMI has failed"):
        assert nvidia_smi_watts(text) is None


def test_sensors_of_a_board(files: PowerFiles) -> None:
    ina(files, VDD_IN=(5000, 1000), VDD_SOC=(5000, 300))
    what, read = ina_watts(files)
    assert "VDD_IN" in what
    assert read() == pytest.approx(5.0)


def test_sensors_that_count_parts_of_a_board(files: PowerFiles) -> None:
    ina(files, VDD_GPU_SOC=(19000, 100), VDD_CPU_CV=(19000, 50), VIN_SYS_5V0=(5000, 400))
    assert ina_watts(files)[1]() == pytest.approx(1.9 + 0.95 + 2.0)


def test_a_board_comes_before_its_gpu(files: PowerFiles, tool: Tool) -> None:
    ina(files, VDD_IN=(5000, 1000))
    tool("nvidia-smi", "while :; do echo 9; sleep 0.01; done")
    meter, refusals = open_power(files, on_gpu=True)
    assert meter is not None
    assert meter.name.startswith("INA3221")
    assert {reading.watts for reading in meter.stop()} == {5.0}
    assert refusals == ()


def rapl(files: PowerFiles, zone: str, name: str, energy: int, most: int = 1 << 40) -> Path:
    place = files.powercap / zone
    write(place, name=name, energy_uj=energy, max_energy_range_uj=most)
    return place / "energy_uj"


def test_counters_of_packages_and_memory_and_their_wrap(files: PowerFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 102.0, 104.0])
    monkeypatch.setattr(power_files.time, "monotonic", lambda: next(clock))
    package = rapl(files, "intel-rapl:0", "package-0", 9_000_000, most=9_999_999)
    memory = rapl(files, "intel-rapl:0:1", "dram", 0)
    rapl(files, "intel-rapl:0:0", "core", 0)  # a part of the package
    rapl(files, "intel-rapl:1", "psys", 0)  # all of it again
    what, read = rapl_watts(files)
    assert "core" not in what
    assert "psys" not in what
    package.write_text("3000000", encoding="utf-8")  # past the end: 1 + 3 joules
    memory.write_text("2000000", encoding="utf-8")
    assert read() == pytest.approx((4 + 2) / 2)
    assert read() is None  # no time has gone by
    package.write_text("3500000", encoding="utf-8")
    assert read() == pytest.approx(0.5 / 2)


def test_counters_that_cannot_be_read(files: PowerFiles, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rapl(files, "intel-rapl:0", "package-0", 1)
    path.write_text("garbage", encoding="utf-8")
    with pytest.raises(OSError, match=r"are there, but cannot be read"):
        rapl_watts(files)

    def refuse(_: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(power_files, "_number", refuse)
    meter, refusals = open_power(files, on_gpu=False)
    assert meter is None
    assert refusals == (
        "no sensors of a Jetson board",
        "tegrastats is not there",
        "the processor's energy counters (RAPL) are there, but only root may read them",
    )


def test_a_machine_that_tells_nothing(files: PowerFiles, tool: Tool) -> None:
    assert open_power(files, on_gpu=True) == (
        None,
        ("no sensors of a Jetson board", "tegrastats is not there", "nvidia-smi is not there"),
    )


def test_a_tool_that_streams_is_read_and_ended(files: PowerFiles, tool: Tool) -> None:
    tool("nvidia-smi", 'echo "$@" > "$0.args"; echo warming up; while :; do echo 60.5; echo "[N/A]"; sleep 0.01; done')
    began = time.monotonic()
    meter, _ = open_power(files, on_gpu=True)
    assert meter is not None
    time.sleep(0.1)
    found = meter.stop()
    assert len(found) >= 2
    assert {reading.watts for reading in found} == {60.5}
    assert all(began <= one.at <= two.at <= time.monotonic() for one, two in pairwise(found))


@pytest.mark.parametrize(
    ("script", "most"),
    [
        ("sleep 60", 2),
        ("trap '' TERM; while :; do sleep 0.05; done", 2),
        ("echo Failed to initialize NVML; exit 9", 1),
        ("while :; do echo '[N/A]'; sleep 0.02; done", 2),
        ("while :; do echo -5; echo 1e9; echo nan; sleep 0.02; done", 2),
        ("head -c 100000 /dev/urandom | tr -d 0-9", 2),  # a digit on a line of its own would be a reading
    ],
    ids=["hangs", "does not end", "fails", "does not know", "absurd", "garbage"],
)
def test_a_tool_that_tells_nothing_is_ended_and_said(script: str, most: float, files: PowerFiles, tool: Tool) -> None:
    tool("nvidia-smi", script)
    began = time.monotonic()
    meter, refusals = open_power(files, on_gpu=True)
    assert meter is None
    assert refusals[-1] == "nvidia-smi tells no power"
    assert time.monotonic() - began < most


def test_a_sensor_that_goes_away_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_INTERVAL", 0.001)
    answers = iter([1.0, OSError(), None, -1.0, float("inf"), float("nan"), ValueError(), 2.0])
    over = threading.Event()

    def read() -> float | None:
        found = next(answers, over)
        if found is over:
            over.set()
            return None
        if isinstance(found, Exception):
            raise found
        return found

    meter = PolledPower("one", read)
    assert over.wait(5)
    assert [reading.watts for reading in meter.stop()] == [1.0, 2.0]


def test_the_mean_is_by_time_and_of_what_was_read() -> None:
    readings = [PowerReading(at, watts) for at, watts in ((0.0, 9.0), (1.0, 10.0), (3.0, 40.0), (4.0, 20.0))]
    assert mean_watts(readings, 0.0, 4.0) == (pytest.approx((10 + 2 * 40 + 20) / 4), 3)
    assert mean_watts(readings, 0.5, 2.0) == (pytest.approx((0.5 * 10 + 1 * 40) / 1.5), 2)
    assert mean_watts(readings, 3.9, 8.0) is None  # they tell of a small part alone
    assert mean_watts(readings, 5.0, 6.0) is None
    assert mean_watts([], 0.0, 1.0) is None
