"""llava-hf checkpoints, every generation of key names, against the model that transformers saved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.weights import expected_tensors


def assert_holds(checkpoint: Checkpoint, want: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
    for name, source in checkpoint.tensors.items():
        assert source.name == name
        np.testing.assert_array_equal(source.read(), want[name].numpy(), err_msg=name)


def test_every_generation_of_key_names(make_llava: Any, rename_tensors: Any, generation: Any) -> None:
    saved = make_llava()
    rename_tensors(saved.directory, generation)
    checkpoint = open_checkpoint(saved.directory)
    assert checkpoint.config.layout == "llava-hf"
    assert_holds(checkpoint, saved.canonical())
    assert {rule for key, rule in checkpoint.left_out.items() if "layers.2" in key} == {
        "a tower layer past the feature layer"
    }
    assert len(checkpoint.left_out) == 16 + 2  # the last tower layer, and post_layernorm


def test_sharded(make_llava: Any) -> None:
    saved = make_llava(shard="50KB")
    assert len(list(saved.directory.glob("*.safetensors"))) > 2
    assert_holds(open_checkpoint(saved.directory), saved.canonical())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(make_llava: Any, dtype: torch.dtype) -> None:
    saved = make_llava(dtype=dtype)
    checkpoint = open_checkpoint(saved.directory)
    name = "language_model.layers.1.mlp.down_proj.weight"
    values = checkpoint.tensors[name].read()
    assert values.dtype == {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}[dtype]
    np.testing.assert_array_equal(values.astype(np.float32), saved.canonical()[name].float().numpy())


def test_reading_copies_nothing(make_llava: Any) -> None:
    checkpoint = open_checkpoint(make_llava().directory)
    values = checkpoint.tensors["language_model.embed_tokens.weight"].read()
    assert isinstance(values, np.memmap)
    assert not values.flags.writeable


def test_opening_reads_no_values(make_llava: Any, tmp_path: Path) -> None:
    """A sparse file of 8 GB takes as long as a small one."""
    saved = make_llava(text={"hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 4096})
    start = time.perf_counter()
    open_checkpoint(saved.directory)
    assert time.perf_counter() - start < 2.0
