"""System, memory, power modes and heat, of boards, containers and machines that say little."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_machine import GB, FakeMachine

from llava_deploy.runtime.doctor.diagnosis import Diagnosis
from llava_deploy.runtime.doctor.findings import Finding
from llava_deploy.runtime.doctor.system import Ran

Diagnose = Callable[[], Diagnosis]
FindingOf = Callable[[str], Finding]


def test_a_jetson_in_a_lower_power_mode(machine: FakeMachine, diagnose: Diagnose, finding: FindingOf) -> None:
    machine.become_orin_nano("25W")
    warning = finding("power mode 25W, and this board can do MAXN_SUPER")
    assert (warning.level, warning.advice) == ("warning", "sudo nvpmodel -m 2, where supply and cooling allow it")
    assert finding("the GPU's clock varies from 306 to 1020 MHz").level == "hint"
    host = diagnose().host
    assert (host.l4t, host.jetpack, host.processor) == ("36.4.3", "6.2+b77", "ARM Cortex-A78AE")
    assert host.board == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    verdicts = {verdict.backend: verdict for verdict in diagnose().backends}
    assert verdicts["tensorrt"].how == "TensorRT 10.3.0 on Orin (sm87)"
    assert verdicts["tensorrt-rtx"].how.startswith("TensorRT for RTX 1.7 does not run on sm87")
    assert diagnose().graphics.smi_trouble == ""


def test_a_jetson_in_its_highest_mode_with_its_clocks_fixed(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.become_orin_nano("MAXN_SUPER")
    machine.write("/sys/class/devfreq/17000000.gpu/min_freq", "1020000000")
    assert {finding.level for finding in diagnose().findings} == {"ok"}


def test_without_jetpacks_tensorrt_a_jetson_is_told_of_it(machine: FakeMachine, finding: FindingOf) -> None:
    machine.become_orin_nano("MAXN_SUPER")
    del machine.packages["tensorrt"], machine.probes["module tensorrt"]
    assert "sudo apt install nvidia-jetpack" in finding("but no TensorRT").advice


@pytest.mark.parametrize(
    ("modes", "highest"),
    [
        ("< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=15W >\n< POWER_MODEL ID=3 NAME=50W >\n", "MAXN"),
        ("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n", "15W"),
        ("< POWER_MODEL ID=0 NAME=MODE_15W >\n< POWER_MODEL ID=1 NAME=MODE_120W >\n", "MODE_120W"),
    ],
)
def test_the_highest_mode(machine: FakeMachine, diagnose: Diagnose, modes: str, highest: str) -> None:
    machine.become_orin_nano("25W")
    machine.write("/etc/nvpmodel.conf", modes)
    assert diagnose().power.highest == highest


def test_a_mode_that_only_root_may_ask_for(machine: FakeMachine, diagnose: Diagnose, finding: FindingOf) -> None:
    machine.become_orin_nano("25W")
    machine.programs["nvpmodel"] = Ran(1, "NVPM ERROR: permission denied\n")
    assert finding("the power mode is not known").found.endswith("'NVPM ERROR: permission denied'")
    machine.write("/var/lib/nvpmodel/status", "pmode:0001 fmode:quiet\n")
    assert (diagnose().power.mode, diagnose().power.trouble) == ("25W", "")


def test_heat_and_a_weak_supply(machine: FakeMachine, finding: FindingOf, diagnose: Diagnose) -> None:
    for zone, name, heat in (("0", "cpu-thermal", "52000"), ("1", "gpu-thermal", "99500")):
        machine.write(f"/sys/class/thermal/thermal_zone{zone}/type", name)
        machine.write(f"/sys/class/thermal/thermal_zone{zone}/temp", heat)
        machine.write(f"/sys/class/thermal/thermal_zone{zone}/trip_point_0_type", "active")
        machine.write(f"/sys/class/thermal/thermal_zone{zone}/trip_point_0_temp", "50000")
        machine.write(f"/sys/class/thermal/thermal_zone{zone}/trip_point_1_type", "passive")
        machine.write(f"/sys/class/thermal/thermal_zone{zone}/trip_point_1_temp", "99000")
    machine.write("/sys/class/hwmon/hwmon3/oc3_event_cnt", "7")
    assert diagnose().power.hottest == (99.5, "gpu-thermal")
    assert finding("too hot").found.endswith(": gpu-thermal")
    assert "7 times" in finding("too much current").found


def test_little_memory_is_a_warning(machine: FakeMachine, finding: FindingOf) -> None:
    machine.memory(7_800_000, 2_050_000)
    warning = finding("memory available")
    assert (warning.level, warning.found) == ("warning", "2.1 GB of 8.0 GB memory available")
    machine.memory(64_000_000, 12_000_000)
    assert finding("memory available").level == "warning"


@pytest.mark.parametrize("directory", ["/sys/fs/cgroup", "/sys/fs/cgroup/system.slice/llava.service"])
def test_a_control_groups_limit_counts(machine: FakeMachine, finding: FindingOf, directory: str) -> None:
    machine.write("/proc/self/cgroup", "0::/system.slice/llava.service\n")
    machine.write(f"{directory}/memory.max", str(4 * GB))
    machine.write(f"{directory}/memory.current", str(3 * GB))
    machine.write(f"{directory}/memory.stat", f"anon 1\ninactive_file {2 * GB}\n")
    ok = finding("memory available")
    assert ok.found == (
        "3.0 GB of 4.0 GB memory available (limit of the container or service; the machine has 16.4 GB)"
    )


def test_control_groups_of_the_first_version_and_without_a_limit(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.write("/proc/self/cgroup", "5:memory:/docker/abc\n3:cpu:/docker/abc\n0::/../..\n")
    machine.write("/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", str(2**63 - 4096))
    machine.write("/sys/fs/cgroup/memory.max", "max")
    assert diagnose().memory.limit is None
    machine.write("/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", str(GB))
    memory = diagnose().memory
    assert (memory.limit, memory.available) == (GB, GB)


def test_a_machine_without_proc_is_no_crash(machine: FakeMachine, diagnose: Diagnose) -> None:
    for name in ("proc/cpuinfo", "proc/meminfo", "etc/os-release"):
        (machine.root / name).unlink()
    diagnosis = diagnose()
    assert (diagnosis.memory.total, diagnosis.host.processor, diagnosis.host.cores) == (None, None, 8)
    assert [finding.found for finding in diagnosis.findings if finding.level == "warning"] == [
        "the system does not say how much memory it has"
    ]
    assert diagnosis.trouble == ""


def test_files_that_are_not_what_they_should_be(machine: FakeMachine, diagnose: Diagnose) -> None:
    for name in ("/etc/nv_tegra_release", "/etc/nvpmodel.conf", "/proc/driver/nvidia/version", "/proc/self/cgroup"):
        machine.write(name, "\0\xff: nonsense : 1\n0::\n5:memory\n")
    machine.write("/proc/meminfo", "MemTotal: many kB\nMemAvailable:\n")
    machine.write("/sys/class/thermal/thermal_zone0/temp", "warm")
    (machine.root / "proc/device-tree/model").mkdir(parents=True)
    assert diagnose().host.l4t is None


def test_a_strange_system_is_told_what_there_are_no_wheels_for(machine: FakeMachine, finding: FindingOf) -> None:
    machine.machine = "riscv64"
    assert finding("riscv64: there are no wheels").level == "warning"
    machine.machine = "x86_64"
    machine.write("/proc/cpuinfo", "flags : avx2\n")
    assert finding("no exact products").level == "hint"
    machine.disk = GB
    assert finding("1.0 GB free on the disk").level == "warning"


@pytest.mark.parametrize(
    ("path", "text", "kind"),
    [
        ("/.dockerenv", "", "docker"),
        ("/run/.containerenv", "", "podman"),
        ("/run/systemd/container", "systemd-nspawn\n", "systemd-nspawn"),
        ("/proc/1/cgroup", "0::/kubepods/burstable\n", "kubepods"),
        ("/proc/1/cgroup", "0::/init.scope\n", None),
    ],
)
def test_containers_are_known(machine: FakeMachine, diagnose: Diagnose, path: str, text: str, kind: str | None) -> None:
    machine.write(path, text)
    assert diagnose().host.container == kind
