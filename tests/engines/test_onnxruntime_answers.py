"""What the engine of a float16 or int4 bundle answers: greedy tokens and next-token scores of the canonical graphs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import onnx_ir as ir
import pytest

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest
from llava_deploy.runtime import Llava

QUESTIONS = 24


@dataclass(frozen=True)
class Built:
    """One bundle without an engine and with one."""

    canonical: Path
    engine: Path


@pytest.fixture(scope="module", params=["fp16", "int4", "int4, symmetric, head in int8"])
def built(request: pytest.FixtureRequest, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("answers")
    checkpoint, precision = open_checkpoint(demo_checkpoint), "int4"
    if request.param == "fp16":
        export(checkpoint, place / "canonical", "fp16")
    else:
        symmetric = request.param != "int4"
        options = QuantizeOptions(group_size=64, symmetric=symmetric, lm_head="int8" if symmetric else "fp16")
        export(round_to_nearest(checkpoint, options), place / "canonical", precision)
    shutil.copytree(place / "canonical", place / "engine")
    build_onnxruntime(place / "engine")
    return Built(place / "canonical", place / "engine")


def answers(bundle: Path, size: int) -> Iterator[tuple[int, ...]]:
    llava = Llava.load(bundle, threads=1)
    drawn = [*islice(examples(Split.HELD_OUT, 7), QUESTIONS)]
    for at in range(0, QUESTIONS, size):
        some = drawn[at : at + size]
        prompts = [f"USER: <image>\n{example.question} ASSISTANT:" for example in some]
        given = llava.generate(prompts, images=[[example.picture] for example in some], max_new_tokens=24)
        yield from (answer.token_ids for answer in given)


@pytest.mark.parametrize("size", [1, 6])
def test_greedy_tokens_are_the_canonical_graphs(built: Built, size: int) -> None:
    assert [*answers(built.engine, size)] == [*answers(built.canonical, size)]


def test_no_float16_is_left_in_an_engine_but_at_its_ends(built: Built) -> None:
    (directory,) = (built.engine / ENGINES).iterdir()
    for name in (VISION_GRAPH, DECODER_GRAPH):
        graph = ir.load(directory / name).graph
        assert ir.DataType.FLOAT16 not in {value.dtype for value in graph.initializers.values()}
        narrow = [value.name for value in (*graph.inputs, *graph.outputs) if value.dtype == ir.DataType.FLOAT16]
        assert narrow == (["pixel_values", "image_features"] if name == VISION_GRAPH else ["inputs_embeds"])
        casts = [node for node in graph.all_nodes() if node.op_type == "Cast"]
        assert len(casts) <= 4


def test_an_engine_is_the_graphs_their_floats_twice_as_wide_and_no_more(built: Built) -> None:
    (directory,) = (built.engine / ENGINES).iterdir()
    assert {path.suffix for path in directory.iterdir()} == {".onnx", ".data", ".json"}
    for name in (VISION_GRAPH, DECODER_GRAPH):
        tensors = [value.const_value for value in ir.load(built.canonical / name).graph.initializers.values()]
        widened = sum(t.nbytes * (2 if t.dtype == ir.DataType.FLOAT16 else 1) for t in tensors if t is not None)
        size = (directory / f"{name}.data").stat().st_size
        assert size < 1.1 * widened + len(tensors) * 4096  # tensors begin at pages


def test_a_bundle_is_built_by_a_relative_path(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built.canonical, tmp_path / "bundle")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    engine = build_onnxruntime(Path("../bundle"))
    assert (engine / DECODER_GRAPH).exists()


def test_engines_may_lie_behind_a_link(built: Built, tmp_path: Path) -> None:
    bundle = shutil.copytree(built.canonical, tmp_path / "bundle")
    (tmp_path / "disk").mkdir()
    (bundle / ENGINES).symlink_to(tmp_path / "disk")
    before = {path.name for path in bundle.iterdir()}
    assert (build_onnxruntime(bundle) / DECODER_GRAPH).exists()
    assert {path.name for path in bundle.iterdir()} == before
