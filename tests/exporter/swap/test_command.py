"""``llava-deploy swap``: checkpoints on the disk, adapters, and what is said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

Invoke = Callable[..., Result]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def export(invoke: Invoke, *words: object) -> Path:
    result = invoke("export", *words)
    assert result.exit_code == 0, result.stderr
    return Path(result.stdout.strip())


def test_a_merged_adapter(make_original: Any, invoke: Invoke, contents: Any, tmp_path: Path) -> None:
    """On the decoder, with the projector that was trained beside it; both parts make it the whole model."""
    saved = make_original(tower="inside")
    torch.manual_seed(3)
    settings = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj", "mm_projector.0"])
    model = get_peft_model(copy.deepcopy(saved.model), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "vision_tower" not in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "lora")
    merged = (saved.directory, "--lora", tmp_path / "lora")
    bundle = export(invoke, saved.directory, "-o", tmp_path / "bundle", "--precision", "fp16")
    want = contents(export(invoke, *merged, "-o", tmp_path / "want", "--precision", "fp16"))
    before = contents(bundle)
    result = invoke("swap", bundle, "--from", *merged, "--part", "decoder")
    assert (result.exit_code, result.stdout) == (0, f"{bundle}\n")
    assert (
        "its projector has other weights than the bundle's, which stay: swap it too, --part projector" in result.stderr
    )
    assert f"decoder of {saved.directory} in " in result.stderr
    found = contents(bundle)
    assert found["decoder.onnx.data"] == want["decoder.onnx.data"] != before["decoder.onnx.data"]
    assert found["vision.onnx.data"] == before["vision.onnx.data"]
    result = invoke("swap", bundle, "--from", *merged, "--part", "projector", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert contents(bundle) == want


def test_a_projector_in_a_file_of_its_own(make_original: Any, invoke: Invoke, contents: Any, tmp_path: Path) -> None:
    saved = make_original(tower="inside")
    path = saved.directory / "mm_projector.safetensors"
    save_file({k: v + 0.1 for k, v in saved.state().items() if "mm_projector" in k}, path)
    bundle = export(invoke, saved.directory, "-o", tmp_path / "bundle")
    want = contents(export(invoke, saved.directory, "--projector", path, "-o", tmp_path / "want"))
    assert contents(bundle) != want
    result = invoke("swap", bundle, "--from", saved.directory, "--projector", path, "--part", "projector")
    assert result.exit_code == 0, result.stderr
    assert contents(bundle) == want


def test_goldens_and_the_selftest(make_llava: Any, invoke: Invoke, tmp_path: Path) -> None:
    saved, other = (
        make_llava(text={"max_position_embeddings": 512}),
        make_llava("other", seed=1, text={"max_position_embeddings": 512}),
    )
    bundle = export(invoke, saved.directory, "-o", tmp_path / "bundle", "--goldens")
    result = invoke("swap", bundle, "--from", other.directory, "--part", "decoder")
    assert result.exit_code == 0, result.stderr
    assert invoke("selftest", bundle).exit_code == 0
    result = invoke("swap", bundle, "--from", other.directory, "--part", "projector", "--without-goldens")
    assert "the goldens, which were of the old weights, are dropped" in result.stderr
    assert invoke("selftest", bundle).exit_code != 0


def test_errors_are_one_line(make_llava: Any, invoke: Invoke, error_line: Any, tmp_path: Path) -> None:
    saved, deeper = make_llava(), make_llava("deeper", text={"num_hidden_layers": 3})
    bundle = export(invoke, saved.directory, "-o", tmp_path / "bundle")
    result = invoke("swap", bundle, "--from", deeper.directory, "--part", "decoder")
    assert result.exit_code == 2
    assert "and a swap changes weights only; layers: want 2, found 3; give a checkpoint" in error_line(result)
    result = invoke("swap", tmp_path, "--from", saved.directory, "--part", "decoder")
    assert "want a bundle directory" in error_line(result)
    assert invoke("swap", bundle, "--from", saved.directory).exit_code == 2
    assert invoke("swap", bundle, "--part", "decoder").exit_code == 2
