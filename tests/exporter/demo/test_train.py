"""A few training steps, start to checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava_deploy.exporter.demo.train import Recipe, practise, train
from llava_deploy.exporter.reference import from_checkpoint

FEW = Recipe(
    look_steps=3,
    look_rows=4,
    talk_steps=12,
    talk_rows=4,
    describe_steps=4,
    naming_steps=2,
    long_every=10,
    practice_steps=2,
    warm_up=2,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], list[str]]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained")
    lines: list[str] = []
    return out, train(FEW, out, lines.append), lines


def test_the_loss_falls(trained: tuple[Path, list[float], list[str]]) -> None:
    _, losses, lines = trained
    assert len(losses) == FEW.talk_steps + FEW.practice_steps
    assert losses[-1] < losses[0] - 1
    assert lines[0].startswith("look")


def test_the_checkpoint_loads(trained: tuple[Path, list[float], list[str]]) -> None:
    model = from_checkpoint(trained[0])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_transformers_loads_every_tensor(trained: tuple[Path, list[float], list[str]]) -> None:
    _, report = LlavaForConditionalGeneration.from_pretrained(trained[0], output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    short = replace(FEW, look_steps=1, talk_steps=1, practice_steps=1)
    weights = []
    for index, recipe in enumerate((short, short, replace(short, seed=1))):
        train(recipe, tmp_path / str(index), lambda _line: None)
        weights.append(load_file(tmp_path / str(index) / "model.safetensors"))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    assert not torch.equal(weights[0][name], weights[2][name])


def test_practice_can_be_done_again_from_the_file_of_the_talk_stage(tmp_path: Path) -> None:
    short = replace(FEW, look_steps=1, talk_steps=2)
    train(short, tmp_path / "whole", lambda _line: None)
    train(replace(short, practice_steps=0), tmp_path / "talk", lambda _line: None)
    practise(short, tmp_path / "talk", tmp_path / "practised", lambda _line: None)
    whole, practised = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "practised"))
    assert all(torch.equal(tensor, practised[name]) for name, tensor in whole.items())
