"""Goldens of a bundle in float16 are recorded with the weights that it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

from llava_deploy.engines.goldens import golden_dtype, read_golden_array, read_goldens
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import checkpoint_dir
from llava_deploy.exporter.export import export
from llava_deploy.exporter.goldens.record import record
from llava_deploy.exporter.goldens.rounded import RoundedTensor, rounded_to_float16
from llava_deploy.exporter.sources.tensors import TensorSource
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.selftest.selftest import selftest


class Finer(RoundedTensor):
    """A tensor in float32, a little off what float16 can hold."""

    @property
    def dtype(self) -> str:
        return "float32"

    def read(self) -> np.ndarray:
        values = self.source.read().astype(np.float32)
        drawn = np.random.default_rng(len(self.name)).uniform(-1, 1, values.shape)
        return (values * (1 + 4e-4 * drawn)).astype(np.float32)


def test_a_checkpoint_in_float32_as_a_bundle_in_float16(demo_checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(demo_checkpoint)
    tensors: dict[str, TensorSource] = {name: Finer(source) for name, source in opened.tensors.items()}
    finer = replace(opened, tensors=MappingProxyType(tensors))
    export(finer, tmp_path / "bundle", "fp16")
    record(finer, tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    table = np.load(tmp_path / "bundle" / "embed_tokens.npy", mmap_mode="r")
    for golden in read_goldens(tmp_path / "bundle", manifest).goldens:
        if not golden.pictures:
            embeds = read_golden_array(tmp_path / "bundle", manifest, golden, "inputs_embeds")
            assert embeds.dtype == golden_dtype(manifest)
            assert np.array_equal(embeds, table[list(golden.input_ids)])
    report = selftest(tmp_path / "bundle", Wanted("onnxruntime", threads=1))
    assert report.ok, report.sentence


def test_values_that_float16_holds_stay_as_they_are(demo_checkpoint: Path) -> None:
    opened = open_checkpoint(demo_checkpoint)
    rounded = rounded_to_float16(opened)
    for name, source in list(opened.tensors.items())[:3]:
        held = rounded.tensors[name]
        assert (held.name, held.key, held.shape, held.origin) == (source.name, source.key, source.shape, source.origin)
        assert (held.dtype, held.files, held.nbytes) == ("float16", source.files, source.nbytes)
        assert np.array_equal(held.read(), source.read())


def test_bfloat16_is_rounded_through_float32() -> None:
    class Brain(RoundedTensor):
        def read(self) -> np.ndarray:
            return np.array([1.0, 1.0078125, 3.0e-8], ml_dtypes.bfloat16)

    source = next(iter(open_checkpoint(checkpoint_dir()).tensors.values()))
    found = RoundedTensor(Brain(source)).read()
    assert found.dtype == np.float16
    assert found.tolist() == [1.0, 1.0078125, 5.960464477539063e-08]
