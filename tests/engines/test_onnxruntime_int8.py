"""Engines that compute in 8-bit integers: how near they are, which graph takes a step, and where they are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from llava_deploy.engines import onnxruntime_builder
from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, INT8_DECODER_GRAPH, read_engine_manifest
from llava_deploy.engines.errors import BundleError, OptionError
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, read_manifest
from llava_deploy.engines.names import INT8_FROM_TOKENS
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.engines.processor import has_int8_products
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest
from llava_deploy.runtime import Llava, backend_choice
from llava_deploy.runtime.backend_choice import choose_onnxruntime
from llava_deploy.runtime.bundle import open_bundle

needs_products = pytest.mark.skipif(not has_int8_products(), reason="no exact products of 8-bit integers here")
NAME = f"onnxruntime-{onnxruntime.__version__}-cpu"
QUESTIONS = 24


@pytest.fixture(scope="module", params=["fp32", "int4"])
def plain(request: pytest.FixtureRequest, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and its engine, nothing of it in 8-bit integers."""
    bundle = tmp_path_factory.mktemp("plain") / "bundle"
    checkpoint = open_checkpoint(demo_checkpoint)
    if request.param == "int4":
        checkpoint = round_to_nearest(checkpoint, QuantizeOptions(group_size=64, symmetric=False, lm_head="int8"))
    export(checkpoint, bundle, request.param)
    build_onnxruntime(bundle)
    return bundle


@pytest.fixture(scope="module")
def rounded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle; its engine computes in 8-bit integers wherever it may."""
    bundle = tmp_path_factory.mktemp("rounded") / "bundle"
    shutil.copytree(plain, bundle, ignore=shutil.ignore_patterns(ENGINES))
    build_onnxruntime(bundle, int8=("prefill", "vision"))
    return bundle


def asked(llava: Llava, size: int) -> list[np.ndarray]:
    """Logits of the first tokens of drawn questions, ``size`` at once."""
    found = []
    drawn = [*islice(examples(Split.HELD_OUT, 7), QUESTIONS)]
    for at in range(0, QUESTIONS, size):
        some = drawn[at : at + size]
        prompts = [f"USER: <image>\n{example.question} ASSISTANT:" for example in some]
        along = llava.logits_along(prompts, [[example.picture] for example in some], [[1]] * len(some))
        found += [*next(iter(along)).copy()]
    return found


@needs_products
@pytest.mark.parametrize("size", [1, 6])
def test_logits_are_near_those_of_the_floats(plain: Path, rounded: Path, size: int) -> None:
    want, found = (np.array(asked(Llava.load(path, threads=1), size)) for path in (plain, rounded))
    assert 1e-4 < (found - want).std() / want.std() < 0.03  # it is another computation, and near
    assert (found.argmax(1) == want.argmax(1)).all()


@needs_products
def test_what_an_engine_consists_of(plain: Path, rounded: Path) -> None:
    engine = read_engine_manifest(rounded / ENGINES / NAME)
    assert engine.key.int8 == ("vision", "prefill")
    kinds = {}
    for name in (VISION_GRAPH, DECODER_GRAPH, INT8_DECODER_GRAPH):
        kinds[name] = [node.op_type for node in ir.load(rounded / ENGINES / NAME / name).graph.all_nodes()]
    decoder = read_manifest(rounded).decoder
    for name in (VISION_GRAPH, INT8_DECODER_GRAPH):
        assert kinds[name].count("MatMulIntegerToFloat") > 0
        assert not {"MatMulNBits", "Gemm"} & {*kinds[name]}
    assert kinds[INT8_DECODER_GRAPH].count("MatMulIntegerToFloat") == 5 * decoder.layers + 1  # q, k, v are one
    floats = (plain / ENGINES / NAME / f"{VISION_GRAPH}.data").stat().st_size
    assert (rounded / ENGINES / NAME / f"{VISION_GRAPH}.data").stat().st_size < 0.4 * floats


@needs_products
def test_which_graph_takes_a_step(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llava = Llava.load(rounded, threads=1, max_len=64)
    shape, taken = read_manifest(rounded).decoder, []
    decoder: Any = llava.decoder
    few, many = decoder._sessions

    class Watched:
        def __init__(self, session: Any, name: str) -> None:
            self._session, self._name = session, name

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def run_with_iobinding(self, binding: Any) -> None:
            taken.append(self._name)
            self._session.run_with_iobinding(binding)

    monkeypatch.setattr(decoder, "_sessions", [Watched(few, "few"), Watched(many, "many")])
    most = INT8_FROM_TOKENS - 1
    steps: list[tuple[int, int, str]] = [
        (1, 1, "few"), (1, most, "few"), (most, 1, "few"), (2, 2, "few"),
        (1, most + 1, "many"), (most + 1, 1, "many"), (4, 2, "many"),
    ]  # fmt: skip
    for batch, tokens, want in steps:
        decoder.clear()
        decoder.begin(batch)
        embeds = np.zeros((batch, tokens, shape.hidden_size), shape.dtype)
        for start in (0, 16):
            logits = decoder.step(embeds, np.full(batch, start), np.zeros(batch, np.int64))
            assert np.isfinite(logits).all()
            assert taken.pop() == want, (batch, tokens)


@needs_products
def test_both_graphs_write_one_cache(plain: Path, rounded: Path) -> None:
    """A prompt through the one, tokens through the other, and a second turn behind them."""
    texts = []
    for path in (plain, rounded):
        llava = Llava.load(path, threads=1)
        example = next(iter(examples(Split.HELD_OUT, 11)))
        talk: list[dict[str, Any]] = [
            {
                "role": "user",
                "content": [{"type": "image", "image": example.picture}, {"type": "text", "text": example.question}],
            }
        ]
        said = []
        for question in ("What is in the picture?", "How many objects are there?"):
            pieces = [*llava.chat(talk, max_new_tokens=24)]
            said.append("".join(piece.text for piece in pieces))
            talk += [{"role": "assistant", "content": said[-1]}, {"role": "user", "content": question}]
        texts.append(said)
    assert texts[0] == texts[1]


def stamps(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


@needs_products
@pytest.mark.parametrize("order", [("vision", "prefill"), ("prefill", "vision", "vision")])
def test_an_engine_is_kept_for_the_same_parts(rounded: Path, order: Sequence[Any]) -> None:
    before = stamps(rounded / ENGINES / NAME)
    build_onnxruntime(rounded, int8=order)
    assert stamps(rounded / ENGINES / NAME) == before


@needs_products
def test_and_built_anew_for_others(rounded: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(rounded, tmp_path / "bundle")
    build_onnxruntime(bundle)
    assert not (bundle / ENGINES / NAME / INT8_DECODER_GRAPH).exists()
    build_onnxruntime(bundle, int8=("vision",))
    assert not (bundle / ENGINES / NAME / INT8_DECODER_GRAPH).exists()
    assert read_engine_manifest(bundle / ENGINES / NAME).key.int8 == ("vision",)


@pytest.mark.parametrize("wanted", ["vision", ("tower",), (None,), ("vision", 8)])
def test_what_is_no_part(plain: Path, wanted: Any) -> None:
    with pytest.raises(OptionError, match="int8: want some of vision, prefill, got "):
        build_onnxruntime(plain, int8=wanted)


def test_a_processor_without_such_products(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_builder, "has_int8_products", lambda: False)
    with pytest.raises(OptionError, match="int8: this processor has no exact products of 8-bit integers"):
        build_onnxruntime(plain, int8=("vision",))
    bundle = shutil.copytree(plain, tmp_path / "bundle")
    path = bundle / ENGINES / NAME / ENGINE_MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["key"]["int8"] = ["vision"]  # as built on another machine, or copied with its disk
    path.write_text(json.dumps(manifest), encoding="utf-8")
    monkeypatch.setattr(backend_choice, "has_int8_products", lambda: False)
    choice = choose_onnxruntime(open_bundle(bundle), onnxruntime.__version__, None, Integrity.QUICK)
    assert choice.vision == bundle / VISION_GRAPH
    assert "computes in 8-bit integers, for which this processor lacks exact products" in choice.reason


@needs_products
@pytest.mark.parametrize("name", [DECODER_GRAPH, INT8_DECODER_GRAPH])
def test_a_graph_that_the_manifest_does_not_list_is_not_loaded(rounded: Path, tmp_path: Path, name: str) -> None:
    bundle = shutil.copytree(rounded, tmp_path / "bundle")
    path = bundle / ENGINES / NAME / ENGINE_MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != name]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match=rf"want {name} in its manifest, found none; build it again"):
        Llava.load(bundle, threads=1)


@needs_products
def test_the_command_that_mends_an_engine_makes_the_same(rounded: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(rounded, tmp_path / "bundle")
    (bundle / ENGINES / NAME / INT8_DECODER_GRAPH).unlink()
    with pytest.raises(BundleError, match=r"llava-deploy build --int8 vision --int8 prefill --force$"):
        Llava.load(bundle)


@needs_products
def test_the_command(demo_bundle: Path, tmp_path: Path, invoke: Callable[..., Any]) -> None:
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    result = invoke("build", bundle, "--int8", "vision", "--int8", "prefill")
    assert result.exit_code == 0, result.output
    assert read_engine_manifest(bundle / ENGINES / NAME).key.int8 == ("vision", "prefill")
    assert Llava.load(bundle).backend.endswith(f"engine {NAME}, int8: vision and prefill")
    result = invoke("build", bundle, "--backend", "tensorrt-rtx", "--int8", "vision")
    assert result.exit_code == 2
    assert "--int8: of no effect with --backend tensorrt-rtx" in result.output
