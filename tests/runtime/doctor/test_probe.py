"""What the probe makes of CUDA's driver library, which here is an object with its functions."""

from __future__ import annotations

import ctypes
import importlib
import json
import types
from typing import Any

import numpy as np
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


def test_the_convolution_is_one_and_runs_where_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(probe._CONVOLUTION)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Conv"]
    half = onnx.TensorProto.FLOAT16
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {half}
    probe.main(["provider", "CPUExecutionProvider", "run"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"loaded": True}


class Runtime:
    """An ONNX Runtime that goes on without a provider, or whose GPU computes this."""

    __file__ = "/nowhere/onnxruntime/__init__.py"

    def __init__(self, providers: list[str], result: float) -> None:
        self._providers, self._result = providers, result
        self.preloaded = 0

    def preload_dlls(self) -> None:
        self.preloaded += 1

    def SessionOptions(self) -> Any:  # noqa: N802
        return types.SimpleNamespace()

    def InferenceSession(self, model: bytes, settings: Any, *, providers: list[str], enable_fallback: int) -> Runtime:  # noqa: N802
        assert (model, enable_fallback) == (probe._CONVOLUTION, 0)
        return self

    def get_providers(self) -> list[str]:
        return self._providers

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert [(name, array.shape, array.dtype) for name, array in feed.items()] == [
            ("x", (1, 3, 4, 4), np.float16),
            ("w", (2, 3, 2, 2), np.float16),
        ]
        return [np.full((1, 2, 3, 3), self._result, np.float16)]


@pytest.mark.parametrize(
    ("providers", "result", "answer"),
    [
        (["CUDAExecutionProvider", "CPUExecutionProvider"], 12, {"loaded": True}),
        (["CUDAExecutionProvider"], 11, {"error": "CUDAExecutionProvider computes wrong values"}),
        (["CPUExecutionProvider"], 12, {"error": "ONNX Runtime cannot start CUDAExecutionProvider"}),
    ],
)
def test_a_provider_has_to_compute(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    providers: list[str],
    result: float,
    answer: dict[str, Any],
) -> None:
    runtime = Runtime(providers, result)
    import_module = importlib.import_module
    monkeypatch.setattr(
        probe.importlib, "import_module", lambda name: runtime if name == "onnxruntime" else import_module(name)
    )
    probe.main(["provider", "CUDAExecutionProvider", "run"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == answer
    assert runtime.preloaded == 1


def test_numbers_of_attributes_are_cudas() -> None:
    driver = pytest.importorskip("cuda.bindings.driver").CUdevice_attribute
    names = ("COMPUTE_MODE", "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "INTEGRATED")
    ours = (probe._COMPUTE_MODE, probe._MAJOR, probe._MINOR, probe._INTEGRATED)
    assert ours == tuple(int(getattr(driver, f"CU_DEVICE_ATTRIBUTE_{name}")) for name in names)
    assert ctypes.sizeof(ctypes.c_void_p) == 8
