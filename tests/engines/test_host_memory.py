"""What of the memory can be had, within control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_deploy.engines.host_memory import HostMemory, host_memory

MEMINFO = "MemTotal: 9000 kB\nMemAvailable: 4000 kB\nSwapTotal: 20 kB\nSwapFree: 10 kB\n"


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def test_without_groups_it_is_what_the_system_says(tmp_path: Path) -> None:
    assert host_memory(tmp_path) == HostMemory(None, None, None, None, None)
    write(tmp_path, "proc/meminfo", MEMINFO)
    assert host_memory(tmp_path) == HostMemory(9000 << 10, 4000 << 10, 10 << 10, 20 << 10, None)
    here = host_memory()
    assert here.total is not None
    assert here.available is not None
    assert 0 < here.available <= here.total


@pytest.mark.parametrize("group", ["", "app.slice", "app.slice/one.service"])
def test_a_group_bounds_it_and_the_cache_of_files_counts_as_free(group: str, tmp_path: Path) -> None:
    place = f"sys/fs/cgroup/{group}"
    write(tmp_path, "proc/meminfo", MEMINFO)
    write(tmp_path, "proc/self/cgroup", "0::/app.slice/one.service\n")
    write(tmp_path, f"{place}/memory.current", "1024\n")
    write(tmp_path, f"{place}/memory.max", "max\n")
    assert host_memory(tmp_path).available == 4000 << 10
    write(tmp_path, f"{place}/memory.max", "5120\n")
    assert (host_memory(tmp_path).available, host_memory(tmp_path).limit) == (4096, 5120)
    write(tmp_path, f"{place}/memory.stat", "anon 512\ninactive_file 512\n")
    assert host_memory(tmp_path).available == 4608
    write(tmp_path, f"{place}/memory.current", "9999\n")
    assert host_memory(tmp_path).available == 0
