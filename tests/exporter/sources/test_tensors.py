"""Files that are no weights, or were damaged: an error of ours, with its reason, whatever torch makes of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.sources.tensors import open_file


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    return path


def test_a_tensor_without_values(tmp_path: Path) -> None:
    source = open_file(saved(tmp_path, {"a": torch.empty(3, device="meta")}))["a"]
    with pytest.raises(CheckpointError, match=r"want values of .*, found torch.strided torch.float32 on meta"):
        source.read()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("dtype", "is_quantised"),
    [
        (torch.int8, True),
        (torch.uint8, True),
        (torch.int32, True),
        (torch.float8_e4m3fn, True),
        (torch.float64, False),
        (torch.complex64, False),
        (torch.bool, False),
    ],
    ids=str,
)
def test_why_a_dtype_is_refused(tmp_path: Path, dtype: torch.dtype, suffix: str, is_quantised: bool) -> None:
    path, content = tmp_path / f"weights{suffix}", {"a": torch.zeros(2, 4, dtype=dtype)}
    (save_file if suffix == ".safetensors" else torch.save)(content, path)
    with pytest.raises(CheckpointError, match="want values of float32, float16, bfloat16, found") as caught:
        open_file(path)["a"].read()
    assert ("quantised" in str(caught.value)) == is_quantised
    assert ("convert the tensor to one of these" in str(caught.value)) != is_quantised


def test_a_tensor_that_torch_has_quantised(tmp_path: Path) -> None:
    source = open_file(saved(tmp_path, {"a": torch.ones(3)}))["a"]
    source = replace(source, dtype="torch.strided torch.qint8 on cpu")  # type: ignore[type-var]
    with pytest.raises(CheckpointError, match="quantised in a form that is not read"):
        source.read()


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_what_would_run_is_named_and_does_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": Touch(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match=r"would run code that the file brings along \(.*GLOBAL posix.system"):
        open_file(path)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_calls_torch_with_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As three altered bytes can make it do."""

    def load(*_: Any, **__: Any) -> None:
        raise TypeError("set_() received an invalid combination of arguments\n - got (int)")

    path = saved(tmp_path, {"a": torch.ones(3)})
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError, match="damaged, cut short") as caught:
        open_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [None, 0, 100])
def test_a_file_that_shrinks_or_goes_after_it_was_opened(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64, 64)}, path)
    source = open_file(path)["a"]
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    with pytest.raises(CheckpointError, match=r"model.safetensors \(a\): cannot be read any more .* was changed"):
        source.read()
