"""The decoder on the GPU against ONNX Runtime, its graphs, and what happens when memory ends."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llava_deploy.engines.errors import BackendError, ContractError, OptionError
from llava_deploy.runtime.backend import Placement
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder
from llava_deploy.runtime.tensorrt.cuda import DeviceMemoryError

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

Embeddings = Callable[..., np.ndarray]


def same(found: np.ndarray, want: np.ndarray) -> None:
    """One graph in one backend: what differs is that the mask may be longer than what is visible."""
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def zeros(batch: int) -> np.ndarray:
    return np.zeros(batch, np.int64)


def test_ragged_rows_give_onnx_runtimes_logits(sessions: Any, reference: Any, embeddings: Embeddings) -> None:
    ours, theirs = sessions.decoder, reference[1]
    for batch in (3, 1, 3):
        ours.begin(batch)
        theirs.begin(batch)
        lengths = np.array([5, 17, 9])[:batch]
        prompt = embeddings(batch, int(lengths.max()))
        same(ours.step(prompt, zeros(batch), lengths - 1), theirs.step(prompt, zeros(batch), lengths - 1))
        for count in range(60):  # over the first bucket's end
            token = embeddings(batch, 1)
            write = lengths + count
            same(ours.step(token, write, zeros(batch)), theirs.step(token, write, zeros(batch)))


def test_a_prompt_may_come_in_pieces(sessions: Any, reference: Any, embeddings: Embeddings) -> None:
    ours, theirs = sessions.decoder, reference[1]
    ours.begin(2)
    theirs.begin(2)
    for at, seq in ((0, 96), (96, 96), (192, 40)):
        piece = embeddings(2, seq)
        last = np.array([seq - 1, 0])
        same(ours.step(piece, np.full(2, at), last), theirs.step(piece, np.full(2, at), last))


def test_steps_are_replayed_as_graphs_one_a_bucket(
    sessions: Any, fake_gpu: FakeGpu, embeddings: Embeddings, request: pytest.FixtureRequest
) -> None:
    """One graph holds a step of all parts."""
    decoder = sessions.decoder
    backend, parts = request.node.callspec.params["sessions"]
    count = len(parts)
    decoder.begin(1)
    decoder.step(embeddings(1, 60), zeros(1), np.array([59]))
    before = fake_gpu.calls.copy()
    for at in range(60, 70):  # 61..64 visible slots are of one bucket, 65..70 of the next
        decoder.step(embeddings(1, 1), np.array([at]), zeros(1))
    made = fake_gpu.calls - before
    assert made["create_execution_context"] == 2 * count
    profiles = Counter(context._profile for context in fake_gpu.contexts)
    assert profiles == {0: 1 + count, 1: 2 * count}  # tower and prompts; two buckets
    assert made["cudaStreamSynchronize"] == 10
    if backend == "tensorrt-rtx":
        assert made["execute_async_v3"] == 10 * count
        assert made["cudaStreamBeginCapture"] == 0
    else:
        # Each bucket: a run, a capture, and replays from then on, in which nothing is called but the launch.
        assert made["execute_async_v3"] == 4 * count
        assert made["cudaGraphInstantiate"] == 2
        assert made["cudaGraphLaunch"] == 8
        assert made["cudaMemcpyAsync"] == 8


def test_a_decode_that_cannot_be_captured_goes_on_and_says_so(
    load: Any, fake_gpu: FakeGpu, demo_bundle: Path, tmp_path: Path, reference: Any, embeddings: Embeddings
) -> None:
    fake_gpu.provide("tensorrt", "11.4.0.106")
    directory = fake_gpu.write_engine(demo_bundle, tmp_path / "engine", backend="tensorrt", version="11.4.0.106")
    ours, theirs = load(demo_bundle, directory, "tensorrt").decoder, reference[1]
    ours.begin(1)
    theirs.begin(1)
    fake_gpu.fail("cudaGraphInstantiate", error="cudaErrorNotSupported")
    with pytest.warns(RuntimeWarning, match="without CUDA graphs.*cudaErrorNotSupported"):
        first = ours.step(token := embeddings(1, 1), zeros(1), zeros(1))
    same(first, theirs.step(token, zeros(1), zeros(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for at in (1, 2):
            token = embeddings(1, 1)
            same(ours.step(token, np.array([at]), zeros(1)), theirs.step(token, np.array([at]), zeros(1)))
    assert fake_gpu.calls["cudaGraphLaunch"] == 0


def test_pictures_are_put_in_on_the_gpu(sessions: Any, reference: Any, embeddings: Embeddings) -> None:
    ours, (vision, theirs) = sessions.decoder, reference
    shape = sessions.manifest.vision
    pixels = np.random.default_rng(1).random((2, 3, shape.image_height, shape.image_width)).astype(np.float32)
    features = sessions.vision.encode(pixels)
    want = vision.encode(pixels)
    prompt = embeddings(2, 40)
    full, patches = prompt.copy(), shape.patches
    assert patches > 20
    prompt[0, 3:23], full[0, 3:23] = 0, want[1][2:22]
    prompt[1, 0:5], full[1, 0:5] = 0, want[0][:5]
    pictures = [Placement(0, 3, features[1], 2, 20), Placement(1, 0, features[0], 0, 5)]
    ours.begin(2)
    theirs.begin(2)
    last = np.array([39, 30])
    same(ours.step(prompt, zeros(2), last, pictures), theirs.step(full, zeros(2), last))


class _OnHost:
    """Features that another backend computed."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def numpy(self) -> np.ndarray:
        return self.values


def test_pictures_may_come_from_elsewhere(sessions: Any, reference: Any, embeddings: Embeddings) -> None:
    ours, theirs = sessions.decoder, reference[1]
    values, prompt = embeddings(1, 8)[0], embeddings(1, 10)
    full = prompt.copy()
    full[0, 4:7] = values[1:4]
    ours.begin(1)
    theirs.begin(1)
    found = ours.step(prompt, zeros(1), np.array([9]), [Placement(0, 4, _OnHost(values), 1, 3)])
    same(found, theirs.step(full, zeros(1), np.array([9])))


@pytest.mark.parametrize("name", ["cudaMalloc", "create_execution_context", "execute_async_v3", "cudaHostAlloc"])
def test_out_of_memory_fails_the_request_alone(
    name: str, sessions: Any, fake_gpu: FakeGpu, reference: Any, embeddings: Embeddings
) -> None:
    """At every place of a request where memory is asked for, and the request after it works."""
    ours, theirs = sessions.decoder, reference[1]
    prompt, token = embeddings(1, 20), embeddings(1, 1)
    theirs.begin(1)
    wants = theirs.step(prompt, zeros(1), np.array([19])).copy(), theirs.step(token, np.array([20]), zeros(1)).copy()

    def request() -> tuple[np.ndarray, np.ndarray]:
        ours.begin(1)
        first = ours.step(prompt, zeros(1), np.array([19])).copy()
        return first, ours.step(token, np.array([20]), zeros(1)).copy()

    failed = 0
    for at in range(1, 8):
        fake_gpu.fail(name, at)
        try:
            found = request()
        except DeviceMemoryError:
            failed += 1
        else:
            for got, want in zip(found, wants, strict=True):
                same(got, want)
        fake_gpu._failures.clear()
        for got, want in zip(request(), wants, strict=True):
            same(got, want)
    assert failed >= 1


def test_a_cache_too_large_says_what_to_do_and_a_smaller_one_fits(
    sessions: Any, fake_gpu: FakeGpu, embeddings: Embeddings
) -> None:
    decoder = sessions.decoder
    decoder.begin(1)
    fake_gpu.memory.total = fake_gpu.memory.used + 100_000
    with pytest.raises(DeviceMemoryError, match=r"KV cache of 4 x 256 tokens: want .* fewer prompts .*--max-len"):
        decoder.begin(4)
    with pytest.raises(ContractError, match=r"begin\(\)"):
        decoder.step(embeddings(4, 1), zeros(4), zeros(4))
    decoder.begin(1)
    assert np.isfinite(decoder.step(embeddings(1, 5), zeros(1), np.array([4]))).all()


def test_a_broken_gpu_says_that_the_process_must_start_again(
    sessions: Any, fake_gpu: FakeGpu, embeddings: Embeddings
) -> None:
    sessions.decoder.begin(1)
    fake_gpu.fail("cudaStreamSynchronize", error="cudaErrorLaunchFailure")
    with pytest.raises(BackendError, match=r"cudaErrorLaunchFailure.*start it again"):
        sessions.decoder.step(embeddings(1, 5), zeros(1), np.array([4]))


def test_what_does_not_fit_is_refused(sessions: Any, embeddings: Embeddings) -> None:
    decoder = sessions.decoder
    with pytest.raises(OptionError, match=r"batch: want 1 to 4 prompts at once.*--max-batch 5"):
        decoder.begin(5)
    decoder.begin(1)
    for wrong in (embeddings(2, 3), embeddings(1, 3).astype(np.float16), embeddings(1, 3)[:, :, :-1]):
        with pytest.raises(ContractError, match="inputs_embeds: want float32"):
            decoder.step(wrong, zeros(1), zeros(1))
    with pytest.raises(ContractError, match="1 to 96"):
        decoder.step(embeddings(1, 97), zeros(1), zeros(1))
    with pytest.raises(ContractError, match="up to 257"):
        decoder.step(embeddings(1, 1), np.array([256]), zeros(1))


def test_the_cache_outlives_smaller_batches_and_nothing_leaks(
    sessions: Any, fake_gpu: FakeGpu, embeddings: Embeddings
) -> None:
    decoder = sessions.decoder
    decoder.begin(3)
    blocks = len(fake_gpu.memory.device)
    for batch in (1, 2, 3, 1):
        decoder.begin(batch)
        decoder.step(embeddings(batch, 1), zeros(batch), zeros(batch))
    assert len(fake_gpu.memory.device) == blocks


def test_nothing_is_left_on_the_gpu(
    load: Any, fake_gpu: FakeGpu, demo_bundle: Path, tmp_path: Path, embeddings: Embeddings
) -> None:
    fake_gpu.provide("tensorrt", "11.4.0.106")
    directory = fake_gpu.write_engine(demo_bundle, tmp_path / "engine", backend="tensorrt", version="11.4.0.106")
    sessions = load(demo_bundle, directory, "tensorrt")
    shape = sessions.manifest.vision
    features = sessions.vision.encode(np.zeros((1, 3, shape.image_height, shape.image_width), np.float32))
    sessions.decoder.begin(1)
    sessions.decoder.step(embeddings(1, 30), zeros(1), np.array([29]), [Placement(0, 0, features[0], 0, 9)])
    for at in (30, 31):
        logits = sessions.decoder.step(embeddings(1, 1), np.array([at]), zeros(1))
    assert fake_gpu.live()["Graph"] == 1
    del sessions, features
    assert np.isfinite(logits).all()  # still in pinned memory
    assert set(fake_gpu.live()) == {"pinned blocks", "Stream"}
    del logits
    assert fake_gpu.live() == {}


def test_a_shorter_context_than_the_engines(
    load: Any, fake_gpu: FakeGpu, demo_bundle: Path, tmp_path: Path, embeddings: Embeddings
) -> None:
    directory = fake_gpu.write_engine(demo_bundle, tmp_path / "engine")
    decoder = load(demo_bundle, directory, max_len=100).decoder
    decoder.begin(1)
    with pytest.raises(ContractError, match="slot 100, got them up to 101"):
        decoder.step(embeddings(1, 1), np.array([100]), zeros(1))
    with pytest.raises(OptionError, match="max_len: want 1 to 256"):
        load(demo_bundle, directory, max_len=257)


def test_it_is_a_decoder_session() -> None:
    names = {name for name in vars(OnnxRuntimeDecoder) if not name.startswith("_")}
    from llava_deploy.runtime.tensorrt.decoder import TensorRtDecoder

    assert names <= set(vars(TensorRtDecoder))
