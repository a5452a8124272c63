"""The benchmarks' modules, imported as their scripts have them: by their bare names, from their own directories."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """A module of ``benchmarks``, ``benchmarks/gpu_check`` or ``benchmarks/peers`` by its name."""
    with pytest.MonkeyPatch.context() as patch:
        for directory in (BENCHMARKS / "peers", BENCHMARKS, BENCHMARKS / "gpu_check"):
            patch.syspath_prepend(str(directory))
        yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(BENCHMARKS):
            del sys.modules[name]


@pytest.fixture(scope="session")
def gpu_check(benchmark: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """The same, of the GPU check's."""
    return benchmark


@pytest.fixture(scope="session")
def demo_bundles(gpu_check: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model as the check exports it, by its weights; not to be written to."""
    place = tmp_path_factory.mktemp("gpu-check")
    bundles = {weights: place / weights for weights in ("fp16", "int4")}
    for weights, bundle in bundles.items():
        gpu_check("demo").make_bundle(weights, str(bundle))
    return bundles
