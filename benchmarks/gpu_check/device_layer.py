"""The runtime's own layer over CUDA, on the GPU that is there: what it moves, measures, records and refuses.

It needs cuda-python and a GPU, and nothing of TensorRT. Whatever goes through the GPU is held against NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from outcome import CheckFailedError

from llava_deploy.engines.contract import DecoderShape
from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.tensorrt.buffers import Cache, Logits, Staging
from llava_deploy.runtime.tensorrt.cuda import ALIGNMENT, Device, DeviceMemory, DeviceMemoryError, Mark

ROWS, WIDTH, PITCH = 37, 200, 512  # of a copy of rows: how many, bytes of each, bytes from one to the next
COPIED = 1 << 28  # bytes of a copy that is timed
PLAUSIBLE_GB_PER_S = (0.1, 50_000.0)
REPLAYS = 3
NOWHERE = 1 << 60
"""An address that no memory has, the host's neither."""


def check() -> dict[str, Any]:
    """A part: every check, one after the other.

    Raises:
        BackendError: there is no GPU.
        CheckFailedError: one of them found something wrong.
    """
    device = Device()
    found: dict[str, dict[str, Any]] = {}
    for name, part in _CHECKS.items():
        try:
            found[name] = {"ok": True, **part(device)}
        except Exception as error:  # noqa: BLE001 (whatever it is, the others are tried)
            found[name] = {"ok": False, "said": f"{type(error).__name__}: {error}"}
        print(f"{'ok  ' if found[name]['ok'] else 'BAD '} {name}: {found[name]}", flush=True)
    result = {"gpu": device.name, "capability": device.capability, "checks": found}
    wrong = [name for name, one in found.items() if not one["ok"]]
    if wrong:
        raise CheckFailedError(f"{', '.join(wrong)}: {found[wrong[0]]['said']}", result)
    return result


def _staged_arrays(device: Device) -> dict[str, Any]:
    """Arrays of several dtypes, up in one copy; twice, the second time in the same memory."""
    staging, drawn = Staging(device, "a check"), np.random.default_rng(0)
    for batch in (3, 2):
        arrays: dict[str, np.ndarray] = {
            "inputs_embeds": drawn.standard_normal((batch, 5, 33)).astype(np.float16),
            "write_indices": drawn.integers(0, 1 << 40, batch),
            "attention_mask": drawn.integers(0, 2, (batch, 1, 5, 7)).astype(bool),
            "wide": drawn.standard_normal((batch, 1001), np.float32),
        }
        staged = staging.lay_out({name: (array.shape, array.dtype) for name, array in arrays.items()})
        for name, array in arrays.items():
            staged.host[name][...] = array
        staged.upload()
        for name, array in arrays.items():
            _require(staged.addresses[name] % ALIGNMENT == 0, f"{name} lies at {staged.addresses[name]:#x}")
            _same(_down(device, staged.addresses[name], array), array, name)
    return {}


def _rows(device: Device) -> dict[str, Any]:
    """Equal rows from and to memory with something between them, which stays."""
    source, target = _drawn(1, ROWS * PITCH), _drawn(2, ROWS * PITCH)
    from_, to = _up(device, source), _up(device, target)
    device.copy_rows((to.address + 16, PITCH), (from_.address + 48, PITCH), (ROWS, WIDTH))
    _same(_down(device, to.address, target), _rows_copied(source, target), "copied rows")
    return {}


def _clearing(device: Device) -> dict[str, Any]:
    """A copy within the GPU, and zeros in the middle of it."""
    source = _drawn(3, 100_001)
    from_, to = _up(device, source), device.allocate(source.nbytes, "a check")
    device.copy(to.address, from_.address, source.nbytes)
    device.clear(to.address + 777, 5_000)
    want = source.copy()
    want[777:5_777] = 0
    _same(_down(device, to.address, source), want, "a copy with zeros in it")
    return {}


def _cache_and_logits(device: Device) -> dict[str, Any]:
    """The cache begins as zeros; the first rows of logits come down."""
    shape = DecoderShape("float16", 64, 2, 2, 16, 1000, 128)
    cache = Cache(device, shape, 2, 40)
    part = np.zeros((2, shape.kv_heads, 40, shape.head_dim), np.float16)
    for name, address in cache.addresses.items():
        _same(_down(device, address, part), part, name)
    logits, values = Logits(device, 4, shape.vocab_size), _drawn(4, 4 * 4 * shape.vocab_size)
    from_ = _up(device, values)
    device.copy(logits.address, from_.address, values.nbytes)
    got = logits.download(3)
    device.synchronize()
    _same(got.view(np.uint8).ravel(), values[: got.nbytes], "logits")
    return {}


def _marks(device: Device) -> dict[str, Any]:
    """Copies, timed on the GPU: 10**9 bytes a second, those within it read and written."""
    size = min(COPIED, device.memory()[0] // 8)
    first, second = (device.allocate(size, "a copy that is timed") for _ in range(2))
    host = device.pin(size, "a copy that is timed")
    host.array(0, (size,), np.dtype(np.uint8))[:] = 1
    device.clear(first.address, size)
    works: dict[str, tuple[int, Callable[[], None]]] = {
        "copy_gb_per_s": (2 * size, lambda: device.copy(second.address, first.address, size)),
        "upload_gb_per_s": (size, lambda: device.upload(first.address, host.address, size)),
        "download_gb_per_s": (size, lambda: device.download(host.address, first.address, size)),
    }
    found = {}
    least, most = PLAUSIBLE_GB_PER_S
    for name, (moved, work) in works.items():
        rate = max(moved / _seconds(device, work) / 1e9 for _ in range(4))
        _require(least < rate < most, f"{name}: {rate:.3g} is not plausible")
        found[name] = round(rate, 1)
    return found


def _graphs(device: Device) -> dict[str, Any]:
    """Copies and zeros, recorded once, and replayed over other contents: nothing is done while they are recorded."""
    size = ROWS * PITCH
    pinned, back = device.pin(size, "a check"), device.pin(size, "a check")
    inside, middle = device.allocate(size, "a check"), device.allocate(size, "a check")
    before = _drawn(5, size)
    target = _up(device, before)

    def work() -> None:
        device.upload(inside.address, pinned.address, size)
        device.copy(middle.address, inside.address, size)
        device.clear(middle.address, 64)
        device.copy_rows((target.address + 16, PITCH), (middle.address + 48, PITCH), (ROWS, WIDTH))
        device.download(back.address, target.address, size)

    graph = device.capture(work)
    _same(_down(device, target.address, before), before, "what a recording must not touch")
    uint8, want = np.dtype(np.uint8), before
    for seed in range(REPLAYS):
        source = _drawn(10 + seed, size)
        pinned.array(0, (size,), uint8)[:] = source
        graph.launch()
        device.synchronize()
        cleared = source.copy()
        cleared[:64] = 0
        want = _rows_copied(cleared, want)
        _same(back.array(0, (size,), uint8), want, f"replay {seed + 1}")
    milliseconds = min(_seconds(device, graph.launch) for _ in range(10)) * 1e3
    return {"replay_ms": round(milliseconds, 4)}


def _broken_capture(device: Device) -> dict[str, Any]:
    """Waiting cannot be recorded; it is refused, what was let go meanwhile is freed, and the stream goes on."""
    blocks = [device.allocate(1 << 20, "a check")]

    def work() -> None:
        blocks.clear()
        device.synchronize()

    said = _refusal(lambda: device.capture(work))
    _require("StreamCapture" in said, said)
    _clearing(device)
    return {"said": said}


def _room(device: Device) -> dict[str, Any]:
    """Memory that was let go can be had again, and more than there is is refused, with the sizes."""
    free, total = device.memory()
    for _ in range(3):
        block = device.allocate(int(free * 0.6), "a check")
        del block
    want = 2 * total
    said = _refusal(lambda: device.allocate(want, "twice its memory"), DeviceMemoryError)
    _require(f"twice its memory: want {want:,} bytes on the GPU, of whose {total:,} " in said, said)
    _clearing(device)
    return {"said": said}


def _wrong_address(device: Device) -> dict[str, Any]:
    """Writing to memory that is none; the last check, as the GPU may be lost to the process after it."""

    def work() -> None:
        device.clear(NOWHERE, 1 << 16)
        device.synchronize()

    said = _refusal(work)
    _require(said.startswith("CUDA, cuda") and "cudaError" in said, said)
    return {"said": said}


_CHECKS: dict[str, Callable[[Device], dict[str, Any]]] = {
    "arrays up and down": _staged_arrays,
    "copies of rows": _rows,
    "copies and zeros": _clearing,
    "cache and logits": _cache_and_logits,
    "marks": _marks,
    "graphs": _graphs,
    "a capture that breaks": _broken_capture,
    "room": _room,
    "a wrong address": _wrong_address,
}


def _drawn(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def _rows_copied(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What copying rows from byte 48 to byte 16 makes of the target."""
    made = target.copy().reshape(ROWS, PITCH)
    made[:, 16 : 16 + WIDTH] = source.reshape(ROWS, PITCH)[:, 48 : 48 + WIDTH]
    return made.ravel()


def _up(device: Device, array: np.ndarray) -> DeviceMemory:
    block, pinned = device.allocate(array.nbytes, "a check"), device.pin(array.nbytes, "a check")
    pinned.array(0, array.shape, array.dtype)[...] = array
    device.upload(block.address, pinned.address, array.nbytes)
    device.synchronize()
    return block


def _down(device: Device, address: int, like: np.ndarray) -> np.ndarray:
    pinned = device.pin(like.nbytes, "a check")
    device.download(pinned.address, address, like.nbytes)
    device.synchronize()
    return pinned.array(0, like.shape, like.dtype).copy()


def _seconds(device: Device, work: Callable[[], None]) -> float:
    begun: Mark = device.mark()
    work()
    return device.mark().since(begun)


def _refusal(work: Callable[[], object], kind: type[BackendError] = BackendError) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    raise ValueError(f"want a {kind.__name__}, found none")


def _same(got: np.ndarray, want: np.ndarray, what: str) -> None:
    _require(got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {got.shape}")
    differ = int((got != want).sum())
    _require(not differ, f"{what}: {differ:,} of {want.size:,} values differ")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
