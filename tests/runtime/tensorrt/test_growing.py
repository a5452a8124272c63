"""The decoder whose cache grows, in the dialect of TensorRT 10.3, on the fake GPU against ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llava_deploy.engines.engine_manifest import ENGINES, decoder_plans, read_engine_manifest
from llava_deploy.engines.errors import BackendError, ContractError, OptionError
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, read_manifest
from llava_deploy.engines.tensorrt_module import import_tensorrt
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest
from llava_deploy.runtime import Llava, cache_map
from llava_deploy.runtime.backend import DecoderSession, Placement
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions, OnnxRuntimeVision
from llava_deploy.runtime.tensorrt.cuda import Device, DeviceMemoryError
from llava_deploy.runtime.tensorrt.decoder import TensorRtDecoder
from llava_deploy.runtime.tensorrt.engine import Engine
from llava_deploy.runtime.tensorrt.growing import GrowingDecoder
from llava_deploy.runtime.tensorrt.plans import open_plans
from llava_deploy.runtime.tensorrt.vision import TensorRtVision

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

OLD = "10.3.0.26"
MAX_LEN = 40
Embeddings = Callable[..., np.ndarray]


@pytest.fixture(params=[(4,), (1, 2, 1)], ids=lambda parts: f"in {len(parts)}")
def engines(request: pytest.FixtureRequest, fake_gpu: FakeGpu, demo_bundle: Path, tmp_path: Path) -> list[Engine]:
    """Vision and decoder, in one part and in three."""
    fake_gpu.provide("tensorrt", OLD)
    directory = fake_gpu.write_engine(
        demo_bundle, tmp_path / "e", backend="tensorrt", version=OLD, cache="growing", parts=request.param
    )
    recipe = read_engine_manifest(directory).key.tensorrt
    assert recipe is not None
    return open_plans(directory, ["vision.plan", *decoder_plans(recipe)], import_tensorrt("tensorrt"), Device())


@pytest.fixture
def decoder(engines: list[Engine], demo_bundle: Path) -> GrowingDecoder:
    return GrowingDecoder(engines[1:], read_manifest(demo_bundle).decoder, MAX_LEN)


@pytest.fixture
def theirs(demo_bundle: Path) -> OnnxRuntimeDecoder:
    options = OnnxRuntimeOptions(1, None)
    return OnnxRuntimeDecoder(demo_bundle / DECODER_GRAPH, read_manifest(demo_bundle).decoder, MAX_LEN, options)


def both(sessions: tuple[DecoderSession, DecoderSession], *inputs: np.ndarray, rows: Any = slice(None)) -> None:
    """Run a step in both; the logits of some rows must be the same."""
    found, want = (session.step(*inputs).copy() for session in sessions)
    np.testing.assert_allclose(found[rows], want[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("waste", [0, 64])
@pytest.mark.parametrize("seed", range(3))
def test_random_sessions(
    decoder: GrowingDecoder, theirs: OnnxRuntimeDecoder, embeddings: Embeddings, monkeypatch: pytest.MonkeyPatch,
    fake_gpu: FakeGpu, waste: int, seed: int,
) -> None:  # fmt: skip
    """Ragged prompts in pieces, tokens of rows that end at different times, prompts that keep a part of the last."""
    monkeypatch.setattr(cache_map, "_WASTE", waste)
    rng = np.random.default_rng(seed)
    sessions = (decoder, theirs)
    for _ in range(5):
        batch = int(rng.integers(1, 5))
        for session in sessions:
            session.begin(batch)
        known = np.zeros(batch, np.int64)
        for _ in range(3):
            start = int(rng.integers(0, known.min() + 1))
            lengths = rng.integers(start + 1, MAX_LEN, batch)
            longest = int(lengths.max())
            for at in range(start, longest, 9):
                seq = min(9, longest - at)
                last = lengths - 1 - at
                ends = (last >= 0) & (last < seq)
                inputs = (embeddings(batch, seq), np.full(batch, at), np.where(ends, last, 0))
                both(sessions, *inputs, rows=ends)
            known = lengths
            for _ in range(6):
                write = np.minimum(known, MAX_LEN - 1)
                both(sessions, embeddings(batch, 1), write, np.zeros(batch, np.int64))
                known = np.minimum(known + rng.integers(0, 2, batch), MAX_LEN)
    assert fake_gpu.calls["cudaMemcpy2DAsync"] > 0


def test_a_picture_of_one_token_and_features_of_another_device(
    decoder: GrowingDecoder, engines: list[Engine], theirs: OnnxRuntimeDecoder, embeddings: Embeddings,
    demo_bundle: Path,
) -> None:  # fmt: skip
    """A piece that ends inside a picture may be one token long; features that are elsewhere come over the host."""

    class Elsewhere:
        def __init__(self, values: np.ndarray) -> None:
            self.numpy = values.copy

    shape = read_manifest(demo_bundle).vision
    pixels = np.random.default_rng(0).standard_normal((2, 3, shape.image_height, shape.image_width), np.float32)
    here = TensorRtVision(engines[0], shape).encode(pixels)
    known = OnnxRuntimeVision(demo_bundle / VISION_GRAPH, shape, OnnxRuntimeOptions(1, None)).encode(pixels)
    prompt = embeddings(1, 7)
    decoder.begin(1)
    theirs.begin(1)
    for at, seq in ((0, 1), (1, 6)):
        piece, begin, last = prompt[:, at : at + seq], np.array([at]), np.array([seq - 1])
        pictures = [Placement(0, 0, here[0], 0, 1)] if not at else [
            Placement(0, 0, here[0], 1, 2), Placement(0, 3, Elsewhere(known[1]), 4, 2)
        ]  # fmt: skip
        want = piece.copy()
        for one in pictures:
            source = known[0] if one.features is here[0] else known[1]
            want[0, one.at : one.at + one.count] = source[one.first : one.first + one.count]
        found = decoder.step(piece, begin, last, pictures).copy()
        np.testing.assert_allclose(found, theirs.step(want, begin, last), rtol=1e-4, atol=1e-4)


def test_a_step_that_fails_changes_nothing(
    decoder: GrowingDecoder, theirs: OnnxRuntimeDecoder, embeddings: Embeddings, fake_gpu: FakeGpu
) -> None:
    sessions = (decoder, theirs)
    for session in sessions:
        session.begin(2)
    both(sessions, embeddings(2, 30), np.zeros(2, np.int64), np.array([29, 5]))
    for length in range(8):  # with room for ten more: the fourth of these steps makes room first
        write, token = np.array([30, 6]) + length, embeddings(2, 1)
        fake_gpu.fail("execute_async_v3")
        with pytest.raises(DeviceMemoryError, match="OutOfMemory"):
            decoder.step(token, write, np.zeros(2, np.int64))
        both(sessions, token, write, np.zeros(2, np.int64))


def test_no_room_for_more_rows(decoder: GrowingDecoder, embeddings: Embeddings, fake_gpu: FakeGpu) -> None:
    decoder.begin(1)
    first = decoder.step(embeddings(1, 5), np.zeros(1, np.int64), np.array([4]))
    assert np.isfinite(first).all()
    fake_gpu.memory.total = fake_gpu.memory.used + 1000
    with pytest.raises(DeviceMemoryError, match=r"KV cache of 4 x 40 tokens, twice, .* fewer prompts .*\(--max-len\)"):
        decoder.begin(4)
    decoder.begin(1)  # there is room for the old one again
    assert np.isfinite(decoder.step(embeddings(1, 5), np.zeros(1, np.int64), np.array([4]))).all()


def test_the_old_buffers_make_room_for_the_new(decoder: GrowingDecoder, fake_gpu: FakeGpu) -> None:
    before = fake_gpu.memory.used
    decoder.begin(1)
    one_row = fake_gpu.memory.used - before
    fake_gpu.memory.total = before + 2 * one_row + 1000
    decoder.begin(2)


def test_single_tokens_run_in_decodes_profile(
    decoder: GrowingDecoder, embeddings: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for name in ("_prefill", "_decode"):
        context = getattr(decoder, name)
        monkeypatch.setattr(context, "run", lambda run=context.run, name=name: (runs.append(name), run()))
    decoder.begin(1)
    for at, seq in ((0, 1), (1, 5), (6, 1)):
        decoder.step(embeddings(1, seq), np.array([at]), np.array([seq - 1]))
    assert runs == ["_decode", "_prefill", "_decode"]


def test_what_does_not_fit(
    decoder: GrowingDecoder, engines: list[Engine], embeddings: Embeddings, demo_bundle: Path
) -> None:
    shape = read_manifest(demo_bundle).decoder
    with pytest.raises(ContractError, match=r"want begin\(\) before step\(\)"):
        decoder.step(embeddings(1, 1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    with pytest.raises(OptionError, match="batch: want 1 to 4 prompts at once"):
        decoder.begin(5)
    decoder.begin(2)
    with pytest.raises(ContractError, match=r"inputs_embeds: want float32\[2, 1 to 40, "):
        decoder.step(embeddings(1, 1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    with pytest.raises(BackendError, match="slots 0 to 39, and 40 to 40 are to be written"):
        decoder.step(embeddings(2, 1), np.full(2, 40), np.zeros(2, np.int64))
    with pytest.raises(OptionError, match="max_len: want 1 to 256, what the engine was built for, got 257"):
        GrowingDecoder(engines[1:], shape, 257)
    with pytest.raises(ContractError, match="want an engine whose cache is 'in-place', found 'growing'"):
        TensorRtDecoder(engines[1:], shape, MAX_LEN)
    engines[1].recipe = replace(engines[1].recipe, cache="in-place")
    with pytest.raises(ContractError, match="want an engine whose cache is 'growing', found 'in-place'"):
        GrowingDecoder(engines[1:], shape, MAX_LEN)


@pytest.fixture(params=["fp16", "int4"])
def bundle(request: pytest.FixtureRequest, demo_checkpoint: Path, demo_bundle_fp16: Path, tmp_path: Path) -> Path:
    """A bundle of its own, without engines."""
    to = tmp_path / "bundle"
    if request.param == "fp16":
        return shutil.copytree(demo_bundle_fp16, to, ignore=shutil.ignore_patterns(ENGINES))
    options = QuantizeOptions(group_size=32, symmetric=False, lm_head="int8")
    export(round_to_nearest(open_checkpoint(demo_checkpoint), options), to, "int4")
    return to


def test_answers_in_fp16_and_int4(bundle: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.provide("tensorrt", OLD)
    fake_gpu.write_engine(bundle, backend="tensorrt", version=OLD, cache="growing")
    ours = Llava.load(bundle)
    assert ours.backend.startswith(f"TensorRT {OLD} on Fake GPU (sm89)")
    level: Any = {} if ours.manifest.quantization is None else {"accuracy_level": 1}
    canonical = Llava.load(bundle, backend="onnxruntime", threads=1, max_len=256, **level)
    scenes = [*islice(examples(Split.HELD_OUT, seed=4), 6)]
    prompts = [f"USER: <image>\n{scene.question} ASSISTANT:" for scene in scenes]
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        images = [[scene.picture] for scene in scenes[part]]
        answers = [llava.generate(prompts[part], images, max_new_tokens=12) for llava in (ours, canonical)]
        found, want = ([answer.token_ids for answer in given] for given in answers)
        assert found == want
