"""Which processors multiply 8-bit integers exactly."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from llava_deploy.engines.processor import has_int8_products


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
