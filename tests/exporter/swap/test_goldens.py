"""Goldens after a swap: PyTorch's answers with the new part, and all else as the bundle stores it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuned import DECODER, PROJECTOR, finetuned

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.goldens import GOLDENS, has_goldens, read_golden_array, read_goldens
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.names import SwapPart
from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.goldens.record import record
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.swap.swap import AfterSwap, swap
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.selftest.selftest import selftest

BEGINNINGS: dict[SwapPart, tuple[str, ...]] = {"projector": PROJECTOR, "decoder": DECODER}


@pytest.fixture(scope="module")
def shipped(demo_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(demo_checkpoint)


@pytest.fixture(scope="module")
def recorded(shipped: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of two precisions with goldens."""
    place = tmp_path_factory.mktemp("recorded")
    export(shipped, place / "fp16", "fp16")
    export(round_to_nearest(shipped, QuantizeOptions(32, False, "int8")), place / "int4", "int4")
    for path in place.iterdir():
        record(shipped, path)
    return {path.name: path for path in place.iterdir()}


def logits(bundle: Path) -> np.ndarray:
    manifest = read_manifest(bundle)
    golden = read_goldens(bundle, manifest).goldens[0]
    return read_golden_array(bundle, manifest, golden, "logits")[0].astype(np.float32)


@pytest.mark.parametrize("stored", ["fp16", "int4"])
@pytest.mark.parametrize("part", BEGINNINGS)
def test_they_are_of_the_new_weights(
    shipped: Checkpoint, recorded: dict[str, Path], tmp_path: Path, stored: str, part: SwapPart
) -> None:
    bundle = Path(shutil.copytree(recorded[stored], tmp_path / "bundle"))
    before = logits(bundle)
    # Another base: the rest of it is not what the bundle holds, and may not become the truth.
    other = finetuned(
        finetuned(shipped, BEGINNINGS[part]), ("language_model.", "vision_tower.", "projector.", "lm_"), 2
    )
    swap(other, bundle, part)
    assert np.abs(logits(bundle) - before).max() > 0.1
    report = selftest(bundle, Wanted("onnxruntime"))
    assert report.ok, report.sentence


def test_a_bundle_without_gets_none(shipped: Checkpoint, demo_bundle_fp16: Path, tmp_path: Path) -> None:
    bundle, says = Path(shutil.copytree(demo_bundle_fp16, tmp_path / "bundle")), list[str]()
    assert not has_goldens(swap(shipped, bundle, "projector", say=says.append))
    assert says == []


def test_a_checkpoint_that_has_no_answers(
    shipped: Checkpoint, recorded: dict[str, Path], drawn: Any, tmp_path: Path
) -> None:
    """A projector that fits, beside a decoder that is another one."""
    bundle, says = Path(shutil.copytree(recorded["fp16"], tmp_path / "bundle")), list[str]()
    sizes = {"hidden_size": shipped.config.decoder.hidden_size, "vocab_size": shipped.config.decoder.vocab_size}
    other = drawn(0, {"decoder": {**sizes, "num_hidden_layers": 1}})
    vision, projector = shipped.config.vision, shipped.config.projector
    own = {name: s for name, s in shipped.tensors.items() if not name.startswith(("language_model.", "lm_head."))}
    config = type(other.config)(**{**vars(other.config), "vision": vision, "projector": projector})
    other = type(other)(
        **{**vars(other), "config": config, "tensors": {**other.tensors, **own}, "image": shipped.image}
    )
    with pytest.raises(
        InputError, match=r"the rest of it is another model .*layers: want 4, found 1.*--without-goldens"
    ):
        swap(other, bundle, "projector")
    swap(other, bundle, "projector", goldens=AfterSwap.DROP, say=says.append)
    assert says == ["the goldens, which were of the old weights, are dropped"]
    assert not has_goldens(read_manifest(bundle))
    assert not (bundle / GOLDENS).exists()
