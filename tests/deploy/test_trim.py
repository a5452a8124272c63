"""What trim.py keeps, of environments that are only their packages' metadata."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trim() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("trim", ROOT / "deploy" / "trim.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(site: Path, **packages: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """Packages and what they require."""
    for name, required in packages.items():
        folder = site / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        lines = [f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0"]
        lines += [f"Requires-Dist: {line}" for line in required]
        (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = metadata.distributions(path=[str(site)])
    return {distribution.metadata["Name"].lower(): distribution for distribution in found}


def test_cudas_libraries_stay_with_onnx_runtime(trim: ModuleType, tmp_path: Path) -> None:
    """They come by its extras, which nothing requires."""
    packages = installed(
        tmp_path,
        llava_deploy=("numpy", 'onnxruntime-gpu>=1.25; extra == "gpu"', 'torch; extra == "export"'),
        numpy=(),
        onnxruntime_gpu=(
            "protobuf",
            'sympy; extra == "symbolic"',
            'nvidia-cuda-runtime~=13.0; extra == "cuda"',
            "nvidia-cudnn-cu13~=9.0; extra == 'cudnn'",
        ),
        protobuf=(),
        sympy=("mpmath",),
        mpmath=(),
        nvidia_cuda_runtime=(),
        nvidia_cudnn_cu13=("nvidia-cublas",),
        nvidia_cublas=(),
        requests=(),
    )
    gone = set(packages) - trim.needed(packages)
    assert gone == {"sympy", "mpmath", "requests"}
