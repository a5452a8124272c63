"""The shipped model with its zero points lowered away says, token for token, what it says with them."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import onnx
import pytest

from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, read_manifest
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest
from llava_deploy.runtime import Llava

LAYERS = 4
QUESTIONS = 24


@pytest.fixture
def asymmetric_bundle(demo_checkpoint: Path, tmp_path: Path) -> Path:
    options = QuantizeOptions(group_size=32, symmetric=False, lm_head="int4")
    export(round_to_nearest(open_checkpoint(demo_checkpoint), options), tmp_path / "bundle", "int4")
    return tmp_path / "bundle"


@pytest.fixture
def lowered_bundle(asymmetric_bundle: Path, lower: Callable[[Path], Path], tmp_path: Path) -> Path:
    """The same bundle with the lowered decoder in the canonical one's place."""
    bundle = tmp_path / "lowered-bundle"
    shutil.copytree(asymmetric_bundle, bundle)
    decoder = lower(asymmetric_bundle / "decoder.onnx")
    for path in decoder.parent.iterdir():
        shutil.copy(path, bundle / path.name)
    manifest = read_manifest(bundle)
    files = tuple(describe_file(bundle, entry.path) for entry in manifest.files)
    text = dataclasses.replace(manifest, files=files).to_json()
    (bundle / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return bundle


def test_greedy_tokens_are_equal(asymmetric_bundle: Path, lowered_bundle: Path) -> None:
    asked = [*islice(examples(Split.HELD_OUT, seed=11), QUESTIONS)]
    prompts = [f"USER: <image>\n{example.question} ASSISTANT:" for example in asked]
    pictures = [[example.picture] for example in asked]
    tokens = []
    for bundle in (asymmetric_bundle, lowered_bundle):
        # Activations in float32: their rounding to int8, ONNX Runtime's default, is another matter.
        llava = Llava.load(bundle, threads=1, accuracy_level=1)
        answers = llava.generate(prompts, images=pictures, max_new_tokens=32)
        tokens.append([list(answer.token_ids) for answer in answers])
    assert tokens[0] == tokens[1]
    assert len({tuple(answer) for answer in tokens[0]}) > 1


def test_the_decoder_computes_group_means_once_for_each_input(lowered_bundle: Path) -> None:
    path = lowered_bundle / "decoder.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    nodes = onnx.load(path, load_external_data=False).graph.node
    found = Counter(node.op_type for node in nodes)
    assert found["DequantizeLinear"] == 7 * LAYERS + 1  # q, k, v, o, gate, up, down; lm_head
    assert found["ReduceMean"] == found["ReduceSum"] == 4 * LAYERS + 1  # of q, k, v; o; gate, up; down; lm_head
    assert all(len(node.input) == 2 for node in nodes if node.op_type == "DequantizeLinear")
