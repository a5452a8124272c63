"""A bundle is a checkpoint's, or it is said what tells them apart; see also the refusals of a recording."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.errors import BundleError, InputError
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.names import Precision
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.made_from import require_made_from
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_its_own_bundle(make_llava: Any, tmp_path: Path, precision: Precision, tied: bool) -> None:
    saved = make_llava(text={"hidden_size": 64, "tie_word_embeddings": tied}, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(saved.directory)
    options = QuantizeOptions(32, symmetric=False, lm_head="int8")
    written = round_to_nearest(checkpoint, options) if precision == "int4" else checkpoint
    export(written, tmp_path / "bundle", precision)
    manifest = read_manifest(tmp_path / "bundle")
    require_made_from(checkpoint, tmp_path / "bundle", manifest)
    require_made_from(written, tmp_path / "bundle", manifest)
    other = open_checkpoint(make_llava("other", seed=1, text={"hidden_size": 64, "tie_word_embeddings": tied},
                                       tie_word_embeddings=tied).directory)  # fmt: skip
    with pytest.raises(InputError, match=r"its weight .* is not that of"):
        require_made_from(other, tmp_path / "bundle", manifest)


def test_graphs_that_were_left_out(demo_bundle: Path, demo_checkpoint: Path) -> None:
    manifest = read_manifest(demo_bundle)
    graphs = tuple(entry for entry in manifest.files if entry.path.startswith("vision"))
    packed = replace(manifest, files=tuple(e for e in manifest.files if e not in graphs), left_out=graphs)
    with pytest.raises(BundleError, match="was left out when this bundle was packed"):
        require_made_from(open_checkpoint(demo_checkpoint), demo_bundle, packed)
