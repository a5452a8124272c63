"""What a run leaves on disk after each layer, so that it can be stopped and picked up, and the result itself.

A directory with ``state.json`` (what the run is of), ``layer-0000.safetensors`` and so on (the result), and
``hidden-0003.safetensors``, what every sample looks like where layer 3 begins: the layers before it are done. Each file
appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llava_deploy.engines.errors import CheckpointError, InputError
from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.engines.staging import write_error
from llava_deploy.exporter.quantization.awq.layers import LinearReport, QuantizedLayer
from llava_deploy.exporter.quantization.weight import QuantizedSource, QuantizedWeight, WeightFormat
from llava_deploy.exporter.sources.tensors import TensorSource, open_file

_STATE, _LOCK = "state.json", "lock"
# The last is what safetensors writes before it renames.
_WRITTEN = re.compile(r"lock|(state\.json|(layer|hidden)-\d{4,}\.safetensors)(\.partial)?|\.tmp[A-Za-z0-9]{6}")
_FIRST = {_LOCK, _STATE, f"{_STATE}.partial"}  # what there may be before there is a state
_DATA, _SCALES, _ZERO_POINTS = "|data", "|scales", "|zero_points"
_REPORT = "report"
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
_ELSEWHERE = "move it away, or name another (on the command line it is -o with .awq behind it)"


@dataclass(frozen=True)
class AwqWeight(QuantizedSource):
    """A weight that AWQ quantised, in a layer's file."""

    name: str
    key: str
    shape: tuple[int, ...]
    format: WeightFormat
    path: Path
    size: int
    method: ClassVar[QuantizationMethod] = "awq"

    @property
    def origin(self) -> str:
        """File and key."""
        return f"{self.path} ({self.key})"

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.path,)

    @property
    def nbytes(self) -> int:
        """Of all its parts."""
        return self.size

    def read_quantized(self) -> QuantizedWeight:
        """The weight's parts, out of the file."""
        with safe_open(self.path, framework="numpy") as file:
            zero_points = None if self.format.symmetric else file.get_tensor(self.key + _ZERO_POINTS)
            data, scales = file.get_tensor(self.key + _DATA), file.get_tensor(self.key + _SCALES)
        return QuantizedWeight(self.format, data, scales, zero_points, None)


class WorkDirectory:
    """The directory of one run; see :func:`open_work`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resume(self, layers: int) -> tuple[int, list[torch.Tensor]] | None:
        """The layer that the run had reached, and its samples there, float32 ``[seq, hidden]``; ``None``: a new run."""
        for index in range(layers, -1, -1):
            path = self._hidden(index)
            if path.is_file():
                try:
                    with safe_open(path, framework="pt") as file:
                        return index, [file.get_tensor(str(number)) for number in range(len(file.keys()))]
                except SafetensorError as error:
                    raise _damaged(path) from error
        return None

    def keep_hidden(self, index: int, hidden: Sequence[torch.Tensor]) -> None:
        """Note that the layers before ``index`` are done; what was kept for the layer before is no longer wanted."""
        self._save(self._hidden(index), {str(number): x.numpy() for number, x in enumerate(hidden)}, None)
        self._hidden(index - 1).unlink(missing_ok=True)

    def keep_layer(self, index: int, layer: QuantizedLayer) -> None:
        """Write the result for one layer."""
        parts: dict[str, np.ndarray] = dict(layer.floats)
        for name, weight in layer.weights.items():
            parts[name + _DATA], parts[name + _SCALES] = weight.data, weight.scales
            if weight.zero_points is not None:
                parts[name + _ZERO_POINTS] = weight.zero_points
        report = json.dumps([dataclasses.asdict(row) for row in layer.report])
        self._save(self._layer(index), parts, {_REPORT: report})

    def layer_tensors(self, index: int, form: WeightFormat) -> dict[str, TensorSource]:
        """The tensors of a finished layer, by canonical names; nothing is read yet."""
        path = self._layer(index)
        if not path.is_file():
            raise _damaged(path)
        entries = open_file(path)
        sources: dict[str, TensorSource] = {}
        for key, entry in entries.items():
            name, mark, _ = key.partition("|")
            if not mark:
                sources[name] = entry
            elif key == name + _DATA:
                in_features, half = entry.shape
                parts = sum(
                    entries[name + part].nbytes for part in (_DATA, _SCALES, _ZERO_POINTS) if name + part in entries
                )
                sources[name] = AwqWeight(name, name, (2 * half, in_features), form, path, parts)
        return sources

    def layer_report(self, index: int) -> list[LinearReport]:
        """The errors of a finished layer's linear layers."""
        with safe_open(self._layer(index), framework="numpy") as file:
            rows = json.loads(file.metadata()[_REPORT])
        return [LinearReport(**row) for row in rows]

    def _save(self, path: Path, parts: Mapping[str, np.ndarray], metadata: dict[str, str] | None) -> None:
        # The names are sorted: what a file is made of says what its bytes are.
        tensors = {name: np.ascontiguousarray(parts[name]) for name in sorted(parts)}
        try:
            _appear(path, lambda partial: save_file(tensors, partial, metadata))
        except SafetensorError as error:  # how the library reports what the system says
            code = _SYSTEM_ERROR.search(str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error

    def _layer(self, index: int) -> Path:
        return self.path / f"layer-{index:04}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.path / f"hidden-{index:04}.safetensors"


@contextlib.contextmanager
def open_work(path: Path, fingerprint: Mapping[str, Any]) -> Iterator[WorkDirectory]:
    """Take a directory for a run, a new one or that of an earlier run of the same.

    Args:
        path: made where there is none.
        fingerprint: what the run is of, as JSON holds it; a part that differs from the earlier run's is named.

    Raises:
        InputError: it holds something else, or another process is at work in it.
        LlavaDeployError: it cannot be written.
    """
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError(
                f"{path}: want a directory for an AWQ run, found a file or a dead link; {_ELSEWHERE}"
            ) from error
        state = path / _STATE
        _require_ours(path)
        with (path / _LOCK).open("a") as lock:
            _take(lock.fileno(), path)
            wanted = json.loads(json.dumps(fingerprint))
            if state.is_file():
                _require_same(path, _read_state(state), wanted)
            else:
                _appear(state, lambda partial: partial.write_text(json.dumps(wanted, indent=1), encoding="utf-8"))
            yield WorkDirectory(path)
    except OSError as error:
        raise write_error(path, error) from error


def remove_work(path: Path) -> bool:
    """Remove what a run wrote to its directory, and the directory, unless another process is at work in it.

    Returns:
        Whether it is gone: a link stays, and so does a directory that holds something else.
    """
    with contextlib.suppress(OSError, InputError), (path / _LOCK).open("a") as lock:
        _take(lock.fileno(), path)
        for entry in path.iterdir():
            if _is_ours(entry):
                entry.unlink()
        path.rmdir()
    return not path.exists()


def _is_ours(entry: Path) -> bool:
    """Whether a run writes a file like this one; its lock is empty."""
    if entry.is_symlink() or not entry.is_file() or not _WRITTEN.fullmatch(entry.name):
        return False
    return entry.name != _LOCK or not entry.stat().st_size


def _require_ours(path: Path) -> None:
    """Somebody's own files are neither written over nor, when the run is done, removed."""
    begun = (path / _STATE).is_file()
    strange = (e for e in sorted(path.iterdir()) if not (_is_ours(e) and (begun or e.name in _FIRST)))
    foreign = [entry.name for entry in strange if os.path.lexists(entry)]  # another process renames its own meanwhile
    if foreign:
        raise InputError(
            f"{path}: want an empty directory or one of an AWQ run, found {foreign[0]!r} in it; {_ELSEWHERE}"
        )


def _take(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{path}: another process is at work in it; wait for it, or name another directory") from error
    except OSError:
        return  # a file system without locks


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(state, dict):
        raise _damaged(path)
    return state


def _require_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        shown = [f"{key} ({found.get(key)!s:.80}, now {wanted.get(key)!s:.80})" for key in differing]
        raise InputError(
            f"{path}: holds an AWQ run that this one cannot go on with, since it differs in {'; '.join(shown)}; "
            "name another directory, or remove this one to begin anew"
        )


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: want a whole file of an AWQ run, found none; remove the directory to begin anew")


def _appear(path: Path, write: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
