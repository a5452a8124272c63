"""Bundles of the shipped checkpoint with its goldens, made once a session, and copies of them that may be changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from llava_deploy.engines.manifest import MANIFEST_NAME, Manifest, describe_file, read_manifest
from llava_deploy.engines.names import Precision
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.goldens.record import record
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.selftest.report import SelftestReport
from llava_deploy.runtime.selftest.selftest import selftest

ONE_THREAD = Wanted(threads=1)


@pytest.fixture(scope="session")
def recorded_bundle(demo_bundle: Path, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle with goldens, and its engine; not to be written to."""
    bundle = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("recorded") / "bundle", copy_function=os.link)
    record(open_checkpoint(demo_checkpoint), bundle)
    return bundle


@pytest.fixture(scope="session")
def recorded_in(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], Path]:
    """Bundles in fp16 and in int4 with goldens and an engine; not to be written to."""
    place = tmp_path_factory.mktemp("recorded-in")

    def make(precision: Precision) -> Path:
        bundle = place / precision
        if not bundle.exists():
            opened = open_checkpoint(demo_checkpoint)
            rounded = round_to_nearest(opened, QuantizeOptions(128, symmetric=False, lm_head="fp16"))
            export(rounded if precision == "int4" else opened, bundle, precision)
            record(opened, bundle)
            build_onnxruntime(bundle)
        return bundle

    return make


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a bundle, whose files are the same ones until they are replaced; ``without`` leaves out names."""

    def copy(bundle: Path, *without: str, name: str = "copy") -> Path:
        ignored = shutil.ignore_patterns(*without) if without else None
        return shutil.copytree(bundle, tmp_path / name, copy_function=os.link, ignore=ignored)

    return copy


@pytest.fixture
def own() -> Callable[[Path], Path]:
    """Make a file of a copy one that may be written into."""

    def owned(path: Path) -> Path:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        return path

    return owned


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """Write the manifest of a copy anew, changed, with the sizes and hashes of its files as they are."""

    def write(bundle: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
        manifest = change(read_manifest(bundle))
        files = tuple(describe_file(bundle, entry.path) for entry in manifest.files)
        (bundle / MANIFEST_NAME).unlink()
        (bundle / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")

    return write


@pytest.fixture
def scaled(own: Callable[[Path], Path]) -> Callable[[Path, str, float], None]:
    """Multiply an initializer of a graph, in its external data."""

    def scale(graph: Path, name: str, factor: float) -> None:
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
            if tensor.name == name:
                where = {entry.key: entry.value for entry in tensor.external_data}
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                data = own(graph.parent / where["location"])
                values = np.memmap(data, dtype, "r+", int(where["offset"]), tuple(tensor.dims))
                values *= dtype.type(factor)
                values.flush()
                return
        raise LookupError(name)

    return scale


@pytest.fixture
def tested() -> Callable[..., SelftestReport]:
    """Test a bundle with one thread."""

    def test(bundle: Path, wanted: Wanted = ONE_THREAD) -> SelftestReport:
        return selftest(bundle, wanted)

    return test
