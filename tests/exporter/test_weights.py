"""Floats on their way into a file: every value that float16 has, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.engines.manifest import describe_file
from llava_deploy.exporter import weights
from llava_deploy.exporter.weights import write_embedding_table

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY_HALF[np.isfinite(EVERY_HALF)]


@dataclass(frozen=True)
class Values:
    """A tensor that is there already."""

    values: np.ndarray
    name: str = "table"
    key: str = "key"
    origin: str = "a file (key)"
    files: tuple[Path, ...] = ()

    @property
    def dtype(self) -> str:
        return self.values.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        return self.values


def written(path: Path, values: np.ndarray, dtype: str) -> np.ndarray:
    done: list[int] = []
    table, entry = write_embedding_table(path, Values(values), np.dtype(dtype), done.append)
    assert entry == describe_file(path.parent, path.name)
    assert sum(done) == values.nbytes
    found = np.load(path)
    assert np.array_equal(np.memmap(path, dtype, "r", table.offset, found.shape), found)
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_finite_float16_is_written_as_it_is(tmp_path: Path, dtype: str) -> None:
    found = written(tmp_path / "table.npy", FINITE.reshape(2, -1), dtype)
    assert found.tobytes() == FINITE.astype(dtype).tobytes()


@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_values_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: type) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    values = np.random.default_rng(0).standard_normal((43, 128)).astype(source)
    found = written(tmp_path / "table.npy", values, "float16")
    assert found.tobytes() == values.astype(np.float16).tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_whatever_is_not_finite_is_refused(tmp_path: Path, dtype: type) -> None:
    """One of each: infinities and the first and last NaN, of either sign, among negative and positive values."""
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    infinity = int(np.array(np.inf, dtype).view(bits))
    sign = 1 << (8 * bits.itemsize - 1)
    others = np.array([-1, 0, 1, np.finfo(dtype).max, np.finfo(dtype).min], dtype)
    for pattern in (infinity, infinity + 1, sign - 1, sign + infinity, sign + infinity + 1, 2 * sign - 1):
        bad = np.array([pattern], bits).view(dtype)
        for values in (bad, np.append(others, bad), np.append(bad, others)):
            with pytest.raises(CheckpointError, match="NaN or infinite"):
                write_embedding_table(tmp_path / "table.npy", Values(values), np.dtype(dtype), lambda _: None)


def test_values_that_float16_has_not_are_refused(tmp_path: Path) -> None:
    values = np.array([1.0, -70000.0], np.float32)
    with pytest.raises(CheckpointError, match=r"a file \(key\).*70000.*--precision fp32"):
        write_embedding_table(tmp_path / "table.npy", Values(values), np.dtype(np.float16), lambda _: None)
