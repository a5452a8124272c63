"""Takes out of a virtual environment what an answer never needs; run by install.sh, with that environment's Python.

What goes:

- packages that only huggingface-hub brings: tokenizers requires it to download tokenizers, which nothing here does;
  and pygments and markdown-it, with which Rich sets programs and Markdown, which nothing here shows;
- tests;
- a second copy of ONNX Runtime for programs in C, where its Python module does not load it, and its tools for exports;
- a second copy of zstandard for PyPy, NumPy's tools for building, the checkpoint of `llava-deploy demo`, which needs
  PyTorch;
- pip and setuptools: a new version gets a new environment, which has its own.

    python -I trim.py [--dry-run]
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOTS = ("llava-deploy", "cuda-python", "tensorrt", "tensorrt-rtx-cu12")
LIBRARIES = ("cuda", "cudnn")
"""Extras of onnxruntime-gpu, which bring what it loads."""

NOT_FOLLOWED = {("tokenizers", "huggingface-hub"), ("rich", "pygments"), ("rich", "markdown-it-py")}
UNUSED = (
    "*/**/tests",
    "onnxruntime/transformers",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/datasets",
    "zstandard/_cffi.*.so",
    "numpy/_core/_simd.*.so",
    "numpy/distutils",
    "numpy/f2py",
    "llava_deploy/exporter/demo/checkpoint/model.safetensors",
)
INSTALLERS = ("pip", "setuptools", "wheel")


def normal(name: str) -> str:
    """A package's name as all spellings of it are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(installed: dict[str, metadata.Distribution]) -> set[str]:
    """Names of what the roots require, of every extra: one too many stays, rather than one too few."""
    found: set[str] = set()
    waiting = [name for name in ROOTS if name in installed]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in installed[name].requires or ():
            match = re.match(r"[\w.-]+", line)
            required = normal(match[0]) if match else ""
            extra = re.search(r"""extra == ["']([\w-]+)""", line)
            wanted = extra is None or name == "llava-deploy" or (name == "onnxruntime-gpu" and extra[1] in LIBRARIES)
            if required in installed and wanted and (name, required) not in NOT_FOLLOWED:
                waiting.append(required)
    return found


def files_of(distribution: metadata.Distribution, home: Path) -> Iterator[Path]:
    """Its files inside the environment."""
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file))).resolve()
        if path.is_relative_to(home):
            yield path


def unused_libraries(site: Path) -> Iterator[Path]:
    """ONNX Runtime's library for C, where the module for Python has all of it inside."""
    for library in sorted((site / "onnxruntime" / "capi").glob("libonnxruntime.so*")):
        others = (path for path in library.parent.glob("*.so*") if path != library)
        if not any(b"libonnxruntime.so" in path.read_bytes() for path in others):
            yield library


def main() -> None:
    """Say what goes, and remove it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="only say it")
    dry = parser.parse_args().dry_run
    if sys.prefix == sys.base_prefix:
        sys.exit("error: want a virtual environment, found the system's Python; run it with the environment's own")
    home = Path(sys.prefix).resolve()
    site = Path(sysconfig.get_path("purelib")).resolve()
    here = list(metadata.distributions(path=[str(site), str(Path(sysconfig.get_path("platlib")).resolve())]))
    installed = {normal(distribution.metadata["Name"]): distribution for distribution in here}
    keep = needed(installed)
    gone = sorted(set(installed) - keep - set(INSTALLERS))
    gone += [name for name in INSTALLERS if name in installed]
    paths = [path for pattern in UNUSED for path in sorted(site.glob(pattern))]
    paths += unused_libraries(site)
    freed = 0
    for name in gone:
        paths += files_of(installed[name], home)
    for path in paths:
        if path.is_dir():
            freed += sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
            if not dry:
                shutil.rmtree(path)
        elif path.exists():
            freed += path.lstat().st_size
            if not dry:
                path.unlink()
    if not dry:
        remove_empty(site)
    sys.stdout.write(f"{'would free' if dry else 'freed'} {freed / 1e6:.0f} MB: {', '.join(gone)}; tests and tools\n")


def remove_empty(site: Path) -> None:
    """Folders in which nothing is left but what Python compiled."""
    for path in sorted(site.rglob("*"), key=lambda path: -len(path.parts)):
        if path.is_dir() and all(child.name == "__pycache__" for child in path.iterdir()):
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
