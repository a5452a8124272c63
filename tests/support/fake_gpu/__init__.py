"""A GPU that is not there: cuda-python and TensorRT for tests, with engines that ONNX Runtime runs.

The fixture ``fake_gpu`` (``tests/conftest.py``) puts it in the place of ``cuda.bindings.runtime`` and ``tensorrt_rtx``:

    def test_something(fake_gpu, demo_bundle, tmp_path):
        directory = fake_gpu.write_engine(demo_bundle, tmp_path / "engine")     # vision.plan, decoder.plan, engine.json
        ...                                                                     # load it as on a machine with a GPU
        assert fake_gpu.calls["cudaGraphLaunch"] == 3
        assert fake_gpu.live() == {}                                            # after the sessions have gone: no leak

Without a directory, ``write_engine`` writes into the bundle's own ``engines/``: give it a copy of the shared bundles.

What it refuses, and how it differs from a plain stub:

- functions, enums and argument counts are those of the real modules; a name that they do not have raises;
- memory of the device has addresses that the host cannot read; it holds garbage (NaN) until it is written, and so does
  pinned memory; reading past a block or after it was freed breaks the device for good, as on a real GPU;
- streams run their work late, when somebody waits: a buffer that is reused too early gives wrong numbers;
- an error that nobody has taken note of (``cudaGetLastError``) is taken by TensorRT for one of its own;
- memory that is allocated, freed or waited for while a stream captures breaks the capture;
- a graph whose execution context has gone, or has other shapes since, writes NaN;
- engines hold shapes against their profiles, addresses against alignment, ``present`` against ``past``;
- ``fail(name, at=n)`` makes the n-th call from now on fail, ``memory.total`` is all there is, ``driver = 0`` is a
  machine without a driver and ``driver = 11040`` one with an old one, ``capability`` is the GPU's;
- an engine is refitted from a file with all of its weights, ``unknown_weights`` are those that it has no name for;
- ``provide("tensorrt", "10.3.0")`` installs the full TensorRT, ``withhold("tensorrt_rtx")`` takes a module away.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest

from fake_gpu.calls import CudaError, real
from fake_gpu.cuda import FakeCuda
from fake_gpu.memory import Memory
from fake_gpu.plans import write_engine
from fake_gpu.tensorrt import FakeContext, FakeEngine, FakeTensorRt, open_session
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt_module import TensorRtBackend
from llava_deploy.engines.tensorrt_recipe import EngineLimits

RTX = "1.7.1.116"
LIMITS = EngineLimits(
    max_batch=4, max_len=256, max_seq=96, max_images=3, opt_batch=1, opt_seq=64, opt_total=64, opt_images=1
)


class FakeGpu:
    """The device and what is installed for it; see the module's text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
        self.memory = Memory(1 << 30)
        self.capability = (8, 9)
        self.driver = 12090
        self.devices = 1
        self.calls: Counter[str] = Counter()
        self.illegal: list[str] = []
        self.broken: Any = None
        self.last_error: Any = None
        self.unknown_weights: set[str] = set()
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.engines: weakref.WeakSet[FakeEngine] = weakref.WeakSet()
        self.cuda = FakeCuda(self)
        self._failures: dict[tuple[str, int], Any] = {}
        self._sessions: dict[Path, onnxruntime.InferenceSession] = {}
        self._monkeypatch, self._place = monkeypatch, place
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        self.provide("tensorrt_rtx", RTX)
        self.withhold("tensorrt")

    def provide(self, module: str, version: str) -> None:
        """Install ``tensorrt`` or ``tensorrt_rtx``."""
        self._monkeypatch.setitem(sys.modules, module, FakeTensorRt(self, module, version))

    def withhold(self, module: str) -> None:
        """A module that cannot be imported."""
        self._monkeypatch.setitem(sys.modules, module, None)

    def fail(self, name: str, at: int = 1, error: str = "cudaErrorMemoryAllocation") -> None:
        """Make the call of ``name`` that is the ``at``-th from now fail; a method of TensorRT gives False or None."""
        self._failures[name, self.calls[name] + at] = getattr(real.cudaError_t, error)

    def asked_to_fail(self, name: str) -> bool:
        return self._failures.pop((name, self.calls[name]), None) is not None

    def fail_where_asked(self, name: str) -> None:
        error = self._failures.pop((name, self.calls[name]), None)
        if error is not None:
            raise CudaError(error)

    def require_driver(self) -> None:
        if self.driver < 12000:
            raise CudaError(real.cudaError_t.cudaErrorInsufficientDriver)
        if not self.devices:
            raise CudaError(real.cudaError_t.cudaErrorNoDevice)
        if self.broken is not None:
            raise CudaError(self.broken)

    def live(self) -> dict[str, int]:
        """How many of what there is on the device still."""
        gc.collect()
        held = {
            "device blocks": len(self.memory.device),
            "pinned blocks": len(self.memory.pinned),
            "contexts": len(self.contexts),
            "engines": len(self.engines),
            **self.cuda.live(),
        }
        return {name: count for name, count in held.items() if count}

    def session(self, path: Path) -> onnxruntime.InferenceSession:
        if path not in self._sessions:
            self._sessions[path] = open_session(path)
        return self._sessions[path]

    def new_place(self) -> Path:
        """An empty directory that lasts as long as the GPU."""
        place = self._place / str(len(list(self._place.iterdir())))
        place.mkdir()
        return place

    def write_engine(
        self,
        bundle: Path,
        directory: Path | None = None,
        *,
        backend: TensorRtBackend = "tensorrt-rtx",
        version: str = RTX,
        limits: EngineLimits = LIMITS,
        capabilities: tuple[str, ...] = ("sm89",),
        cache: CacheForm = "in-place",
        parts: tuple[int, ...] | None = None,
        passes: Sequence[ir.passes.InPlacePass] | None = None,
        version_compatible: bool = False,
        refittable: bool = False,
    ) -> Path:
        """An engine's directory that this GPU runs.

        ``parts`` are the layers of each plan of the decoder, by default one; ``passes`` go over the decoder in place of
        the usual ones.
        """
        return write_engine(
            bundle, directory, self.new_place(), backend=backend, version=version, limits=limits,
            capabilities=capabilities, cache=cache, parts=parts, passes=passes, version_compatible=version_compatible,
            refittable=refittable,
        )  # fmt: skip
