"""The shipped model's bundles with goldens, in each precision; not to be written to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_deploy.engines.names import Precision
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.goldens.record import STANDARD, record_goldens
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions

Shipped = Callable[[Precision], Path]


@pytest.fixture(scope="session")
def shipped_bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """A bundle by its precision, exported with goldens once."""
    home = tmp_path_factory.mktemp("goldens")

    def bundle(precision: Precision) -> Path:
        if not (home / precision).exists():
            torch.set_num_threads(1)
            checkpoint = open_checkpoint(demo_checkpoint)
            if precision == "int4":
                checkpoint = round_to_nearest(checkpoint, QuantizeOptions(32, symmetric=False, lm_head="int8"))
            export(
                checkpoint,
                home / precision,
                precision,
                record=lambda directory, manifest: record_goldens(checkpoint, directory, manifest, STANDARD),
            )
        return home / precision

    return bundle


@pytest.fixture
def own_bundle(shipped_bundle: Shipped, tmp_path: Path) -> Shipped:
    """A copy of one, to write to."""
    return lambda precision: Path(shutil.copytree(shipped_bundle(precision), tmp_path / "bundle"))
