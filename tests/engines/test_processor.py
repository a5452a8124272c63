"""Which processors multiply 8-bit integers exactly."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from llava_deploy.engines.processor import (
    count_physical_cores,
    has_int8_products,
    processor_name,
    vector_extensions,
)


@pytest.mark.parametrize(
    ("machine", "text", "has"),
    [
        ("x86_64", "processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("AMD64", "flags : fpu avx2 avx_vnni\n", True),
        ("x86_64", "flags : fpu avx2 avx512f avx512bw\nbugs : avx_vnni\n", False),
        ("x86_64", "", False),
        ("x86_64", None, False),
        ("aarch64", None, True),
        ("arm64", "", True),
        ("riscv64", "flags : none", False),
    ],
)
def test_exact_products_of_integers(
    machine: str, text: str | None, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert has_int8_products(path) == has


ORIN = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n"
INTEL = "processor : 0\nmodel name : Abacus 9000\nphysical id : 0\ncore id : 0\nflags : avx2 avx512f avx512_vnni\n"


@pytest.mark.parametrize(
    ("text", "name", "extensions"),
    [
        (INTEL, "Abacus 9000", ("AVX2", "AVX-512", "AVX-512 VNNI")),
        (ORIN, "ARM Cortex-A78AE", ("NEON", "NEON fp16", "NEON dot products")),
        ("CPU part : 0xfff\n", None, ()),
        (None, None, ()),
    ],
)
def test_what_it_is_called_and_has(
    text: str | None, name: str | None, extensions: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert processor_name(path) == name
    assert vector_extensions(path) == extensions
    assert count_physical_cores(path, 6) == (1 if text == INTEL else 6)


def test_the_architecture_may_be_given(tmp_path: Path) -> None:
    assert has_int8_products(tmp_path / "none", "aarch64")
    assert not has_int8_products(tmp_path / "none", "x86_64")
