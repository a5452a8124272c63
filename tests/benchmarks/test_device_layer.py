"""The check of the runtime's layer over CUDA, on the GPU that is not there: it passes it, and sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.tensorrt.cuda import Device, Graph

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

GpuCheck = Callable[[str], ModuleType]


@pytest.fixture
def layer(gpu_check: GpuCheck, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The part, over little memory; what it does to an address that is none is allowed."""
    fake_gpu.memory.total = 1 << 25
    module = gpu_check("device_layer")
    yield module
    fake_gpu.illegal.clear()


def wrong_ones(gpu_check: GpuCheck, layer: ModuleType) -> list[str]:
    with pytest.raises(gpu_check("outcome").CheckFailedError) as caught:
        layer.check()
    checks: dict[str, Any] = caught.value.result["checks"]
    return [name for name, one in checks.items() if not one["ok"]]


def test_it_passes_and_says_how_fast_copies_are(layer: ModuleType) -> None:
    result = layer.check()
    assert result["capability"] == "sm89"
    marks = result["checks"]["marks"]
    assert marks["copy_gb_per_s"] == pytest.approx(2 * marks["upload_gb_per_s"], rel=0.1)
    assert result["checks"]["graphs"]["replay_ms"] == 1.0
    assert "twice its memory: want 67,108,864 bytes" in result["checks"]["room"]["said"]
    assert "start it again" in result["checks"]["a wrong address"]["said"]


def test_without_a_gpu_it_says_so(layer: ModuleType, fake_gpu: FakeGpu) -> None:
    fake_gpu.driver = 0
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        layer.check()


def test_zeros_that_are_not_written(gpu_check: GpuCheck, layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "clear", lambda *_: None)
    wrong = wrong_ones(gpu_check, layer)
    assert {"copies and zeros", "cache and logits", "graphs", "a wrong address"} <= set(wrong)
    assert "copies of rows" not in wrong


def test_rows_that_go_elsewhere(gpu_check: GpuCheck, layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Device.copy_rows
    monkeypatch.setattr(Device, "copy_rows", lambda self, to, *rest: copy(self, (to[0] + 1, to[1]), *rest))
    assert wrong_ones(gpu_check, layer) == ["copies of rows", "graphs"]


def test_a_graph_that_is_not_replayed(gpu_check: GpuCheck, layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "launch", lambda *_: None)
    assert wrong_ones(gpu_check, layer) == ["graphs"]


def test_work_that_is_done_while_it_is_recorded(
    gpu_check: GpuCheck, layer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Device.capture

    def eager(self: Device, work: Callable[[], None]) -> Graph:
        work()
        return capture(self, work)

    monkeypatch.setattr(Device, "capture", eager)
    assert "graphs" in wrong_ones(gpu_check, layer)


def test_a_clock_that_stands(gpu_check: GpuCheck, layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "_seconds", lambda *_: 1e-9)
    assert wrong_ones(gpu_check, layer) == ["marks"]
