"""The documents against what they describe."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import click
import pytest

from llava_deploy import cli
from llava_deploy.engines.contract import IR_VERSION, OPSET_VERSION, DecoderShape, VisionShape
from llava_deploy.engines.manifest import (
    FORMAT_VERSION,
    ChatRecipe,
    FileEntry,
    ImageRecipe,
    Manifest,
    ModelCard,
    QuantizationRecipe,
    SpliceRecipe,
)

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").glob("*.md")])
SECTIONS = (ModelCard, VisionShape, DecoderShape, ImageRecipe, ChatRecipe, SpliceRecipe, QuantizationRecipe, FileEntry)


def code(text: str) -> set[str]:
    """Everything in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(path: Path) -> None:
    named = re.findall(
        r"\b((?:engines|exporter|runtime|tests|docs)/[\w/]+\.(?:py|md))", path.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(path: Path) -> None:
    for name, rest in re.findall(r"llava-deploy +([a-z]+)([^\n`]*)", path.read_text(encoding="utf-8")):
        command = cli.main.commands.get(name)
        assert isinstance(command, click.Command), name
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z0-9-]+", rest.partition("#")[0])) <= options


def test_the_bundle_format_names_every_field() -> None:
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    assert f"# The bundle format, version {FORMAT_VERSION}\n" in text
    for kind in (Manifest, *SECTIONS):
        assert {field.name for field in dataclasses.fields(kind)} <= code(text)
    assert f"opset {OPSET_VERSION}, IR {IR_VERSION}" in text


def test_the_graph_contracts_are_written_down() -> None:
    text = (ROOT / "docs" / "graphs.md").read_text(encoding="utf-8")
    vision = VisionShape("float32", 28, 28, 4, 8).spec()
    decoder = DecoderShape("float32", 8, 1, 1, 4, 11, 32).spec()
    for spec in (vision, decoder):
        names = {tensor.name.replace(".0.", ".{i}.") for tensor in (*spec.inputs, *spec.outputs)}
        assert names <= code(text)
        assert {dim.name for dim in spec.dims} <= set(re.findall(r'"(\w+)"', text))
