"""What the probe makes of CUDA's driver library, which here is an object with its functions."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest

from llava_deploy.runtime.doctor import probe

ATTRIBUTES = {75: 8, 76: 9, 18: 0, 20: 3}


class Library:
    """CUDA's driver with one GPU."""

    def __init__(self, init: int = 0, context: int = 0) -> None:
        self._init, self._context = init, context
        self.destroyed = 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._init

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12040
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 7
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"Abacus GPU"
        return 0

    def cuDeviceGetUuid(self, identity: Any, device: Any) -> int:  # noqa: N802
        identity.raw = bytes(range(16))
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> int:  # noqa: N802
        value._obj.value = ATTRIBUTES[number]
        return 0

    def cuCtxCreate_v2(self, context: Any, flags: int, device: Any) -> int:  # noqa: N802
        return self._context

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = 3 << 30, 4 << 30
        return 0

    def cuCtxDestroy_v2(self, context: Any) -> int:  # noqa: N802
        self.destroyed += 1
        return 0

    def cuGetErrorName(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"CUDA_ERROR_NO_DEVICE" if code == 100 else None
        return 0 if code == 100 else 1


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: Library | None) -> Any:
    monkeypatch.setattr(probe, "_first_library", lambda: (library, "libcuda.so.1: no such file"))
    probe.main(["cuda"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_gpu_is_described_and_tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    library = Library()
    found = said(monkeypatch, capsys, library)
    assert (found["loaded"], found["cuda"], found["code"]) == (True, 12040, None)
    assert found["devices"] == [
        {
            "name": "Abacus GPU",
            "uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f",
            "capability": "sm89",
            "integrated": False,
            "compute_mode": 3,
            "free": 3 << 30,
            "total": 4 << 30,
            "error": None,
        }
    ]
    assert library.destroyed == 1


def test_a_gpu_that_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device = said(monkeypatch, capsys, Library(context=46))["devices"][0]
    assert (device["error"], device["free"]) == ("no context can be made on it (error 46)", None)


def test_without_a_gpu_or_a_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(monkeypatch, capsys, Library(init=100))
    assert (found["error"], found["devices"]) == ("cuInit: CUDA_ERROR_NO_DEVICE (100)", [])
    assert said(monkeypatch, capsys, None) == {"error": "libcuda.so.1: no such file", "loaded": False}


def test_numbers_of_attributes_are_cudas() -> None:
    driver = pytest.importorskip("cuda.bindings.driver").CUdevice_attribute
    names = ("COMPUTE_MODE", "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "INTEGRATED")
    ours = (probe._COMPUTE_MODE, probe._MAJOR, probe._MINOR, probe._INTEGRATED)
    assert ours == tuple(int(getattr(driver, f"CU_DEVICE_ATTRIBUTE_{name}")) for name in names)
    assert ctypes.sizeof(ctypes.c_void_p) == 8
