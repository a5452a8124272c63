"""Files of ``torch.save`` that are no weights, or were damaged: an error of ours, whatever torch makes of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

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
