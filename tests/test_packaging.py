"""What is in the wheel, and what installing it brings along."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path, PurePosixPath

import pytest

from llava_deploy.exporter.demo.scenes import checkpoint_dir

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engines", "exporter", "runtime")
NEVER_IN_BASE = {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "onnxruntime", "ml-dtypes"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: a build inside the tree would leave its own folders there, and use old ones."""
    place = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "local", "demo-output")
    source = shutil.copytree(ROOT, place / "source", ignore=ignore)
    run = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", place]
    subprocess.run([*run, source], check=True, timeout=300, cwd=place)
    (path,) = place.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def requirements(metadata: Message) -> dict[str, set[str]]:
    """Extra, or "" for the base install, to the normalised names of what it requires."""
    found: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        assert name is not None
        found.setdefault(extra[1] if extra else "", set()).add(re.sub(r"[-_.]+", "-", name[0]).lower())
    return found


def test_every_module_on_the_disk_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    on_disk = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    in_wheel = {name.removeprefix("llava_deploy/") for name in wheel.namelist() if name.endswith(".py")}
    assert in_wheel == on_disk | {"cli.py"}


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_the_demo_checkpoint_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    on_disk = {path.name: path.read_bytes() for path in checkpoint_dir().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= on_disk.keys()
    prefix = "llava_deploy/exporter/demo/checkpoint/"
    assert {n.removeprefix(prefix): wheel.read(n) for n in wheel.namelist() if n.startswith(prefix)} == on_disk
    assert sum(map(len, on_disk.values())) <= 10_000_000


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile, metadata: Message) -> None:
    info = f"llava_deploy-{metadata['Version']}.dist-info"
    assert {PurePosixPath(name).parts[0] for name in wheel.namelist()} == {"llava_deploy", info}
    ours = [PurePosixPath(name) for name in wheel.namelist() if name.startswith("llava_deploy/")]
    assert {path.parts[1] for path in ours} == {"cli.py", *ROOMS}
    assert {path.suffix for path in ours if "checkpoint" not in path.parts} == {".py", ".css", ".jinja"}


def test_licence_readme_and_command(wheel: zipfile.ZipFile, metadata: Message) -> None:
    info = f"llava_deploy-{metadata['Version']}.dist-info"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert metadata["License-Expression"] == "Apache-2.0"
    _, _, described = wheel.read(f"{info}/METADATA").decode("utf-8").partition("\n\n")
    assert described == (ROOT / "README.md").read_text(encoding="utf-8")
    assert "llava-deploy = llava_deploy.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_base_install_is_the_runtime(metadata: Message) -> None:
    wanted = requirements(metadata)
    assert wanted[""] == {"click", "jinja2", "numpy", "pillow", "rich", "tokenizers", "zstandard"}
    assert not wanted[""] & NEVER_IN_BASE
    assert wanted["cpu"] == {"onnxruntime"}
    assert wanted["gpu"] == {"cuda-python", "onnxruntime-gpu"}
    assert {"torch", "transformers", "onnx", "onnxscript", "onnx-ir", "safetensors", "polygraphy"} <= wanted["export"]


def test_everything_required_is_pinned(metadata: Message) -> None:
    """The constraints name each direct requirement but two that nothing here was run with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    assert set().union(*requirements(metadata).values()) - {"onnxruntime-gpu", "tensorrt"} <= pins
    assert all(
        re.fullmatch(r"[a-z0-9-]+==[\w.]+(; python_version (<|>=) \"3\.11\")?", line)
        for line in lines
        if line[0] != "#"
    )


def test_the_unpacked_wheel_works_by_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    script = "import llava_deploy.cli, llava_deploy.runtime as r; print(llava_deploy.cli.__file__); print(r.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    run = [sys.executable, "-c", script]
    result = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    home = tmp_path / "llava_deploy"
    assert result.stdout.splitlines() == [str(home / "cli.py"), str(home / "runtime" / "__init__.py")]
