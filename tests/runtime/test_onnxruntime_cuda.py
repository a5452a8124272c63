"""The CUDA provider's sessions over the CPU's provider: which values go where, against the canonical graphs.

The graphs, the buffers and the bindings are those of a GPU; kernels, memory of a device and replayed runs are not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_deploy.engines.contract import DecoderShape
from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.manifest import DECODER_GRAPH, EMBEDDING_TABLE, VISION_GRAPH, Manifest, read_manifest
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.config import LM_HEAD
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest
from llava_deploy.runtime.cuda_provider import CUDA, Provider
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions, OnnxRuntimeVision
from llava_deploy.runtime.onnxruntime_cuda import OnnxRuntimeCudaDecoder, OnnxRuntimeCudaVision

ON_THE_CPU = Provider("CPUExecutionProvider", "cpu", captures=False)
MAX_LEN = 48
OPTIONS = OnnxRuntimeOptions(1, 0)
TOLERANCE = 0.15  # of float16 and int4 that are rounded elsewhere, 0.06 at worst; another slot or row is off by 1


@pytest.fixture(scope="module", params=["fp16", "fp16, tied", "int4"])
def bundle(request: pytest.FixtureRequest, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cuda") / "bundle"
    checkpoint = open_checkpoint(demo_checkpoint)
    if request.param == "int4":
        checkpoint = round_to_nearest(checkpoint, QuantizeOptions(64, False, "fp16"))
    if request.param == "fp16, tied":
        config = replace(checkpoint.config, decoder=replace(checkpoint.config.decoder, tie_word_embeddings=True))
        tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != LM_HEAD}
        checkpoint = replace(checkpoint, config=config, tensors=tensors)
    export(checkpoint, place, "int4" if request.param == "int4" else "fp16")
    engine = build_onnxruntime_cuda(place)
    assert (engine / EMBEDDING_TABLE).exists() == (request.param == "fp16, tied")
    return place


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.fixture(scope="module")
def decoder(bundle: Path, manifest: Manifest) -> OnnxRuntimeCudaDecoder:
    return OnnxRuntimeCudaDecoder(build_onnxruntime_cuda(bundle) / DECODER_GRAPH, manifest.decoder, MAX_LEN, ON_THE_CPU)


@pytest.fixture
def new_decoder(bundle: Path, manifest: Manifest) -> OnnxRuntimeCudaDecoder:
    """Without a cache."""
    return OnnxRuntimeCudaDecoder(build_onnxruntime_cuda(bundle) / DECODER_GRAPH, manifest.decoder, MAX_LEN, ON_THE_CPU)


@pytest.fixture(scope="module")
def canonical(bundle: Path, manifest: Manifest) -> OnnxRuntimeDecoder:
    return OnnxRuntimeDecoder(bundle / DECODER_GRAPH, manifest.decoder, MAX_LEN, OPTIONS)


def embeds(shape: DecoderShape, rng: np.random.Generator, batch: int, seq: int) -> np.ndarray:
    return (rng.standard_normal((batch, seq, shape.hidden_size)) * 0.5).astype(shape.dtype)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype == np.float32
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_steps_give_the_logits_of_the_canonical_graph(
    decoder: OnnxRuntimeCudaDecoder, canonical: OnnxRuntimeDecoder, data: st.DataObject
) -> None:
    """Rows of different lengths; prompts in pieces, in one or token by token; each row's past is its own."""
    shape = canonical._shape
    batch = data.draw(st.integers(1, 4), "batch")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), "seed"))
    for sessions in (decoder, canonical):
        sessions.clear()
        sessions.begin(batch)
    slots = np.zeros(batch, np.int64)
    while True:
        seq = data.draw(st.sampled_from([1, 1, 2, 7, 16]), "seq")
        if slots.max() + seq > MAX_LEN:
            return
        last = rng.integers(0, seq, batch)
        fed = embeds(shape, rng, batch, seq)
        wanted = canonical.step(fed, slots, last).copy()
        assert error(decoder.step(fed, slots, last), wanted) < TOLERANCE
        slots = slots + 1 + last  # what is behind a row's last token is written over


def test_fewer_rows_keep_the_buffers_and_more_get_new_ones(
    decoder: OnnxRuntimeCudaDecoder, canonical: OnnxRuntimeDecoder
) -> None:
    shape, rng = canonical._shape, np.random.default_rng(5)
    decoder.clear()
    for batch in (2, 1, 3, 1, 2):
        for sessions in (decoder, canonical):
            sessions.begin(batch)
        slots, last = np.zeros(batch, np.int64), np.full(batch, 4)
        prompt, token = embeds(shape, rng, batch, 5), embeds(shape, rng, batch, 1)
        wanted = canonical.step(prompt, slots, last).copy()
        assert error(decoder.step(prompt, slots, last), wanted) < TOLERANCE
        wanted = canonical.step(token, slots + 5, last * 0).copy()
        assert error(decoder.step(token, slots + 5, last * 0), wanted) < TOLERANCE


def test_the_number_of_a_replayed_run_never_comes_again_with_other_buffers(new_decoder: OnnxRuntimeCudaDecoder) -> None:
    seen: dict[int, int] = {}
    for batch in (1, 2, 1, 4, 2, 1, 4, 1):
        new_decoder.clear()  # which keeps the buffers
        new_decoder.begin(batch)
        single = new_decoder._singles[batch]
        address = new_decoder._cache[0, "key"].data_ptr()
        assert seen.setdefault(single.graph, address) == address
    assert len(seen) == 6  # a cache of one row; one of two, for two and one; one of four, for four, two and one


def test_clear_forgets_what_the_cache_held(decoder: OnnxRuntimeCudaDecoder, canonical: OnnxRuntimeDecoder) -> None:
    """NaN among the keys would come through the mask."""
    shape, rng = canonical._shape, np.random.default_rng(6)
    decoder.begin(1)
    decoder.step(np.full((1, 8, shape.hidden_size), np.nan, shape.dtype), np.zeros(1, np.int64), np.array([7]))
    for sessions in (decoder, canonical):
        sessions.clear()
        sessions.begin(1)
    fed = embeds(shape, rng, 1, 3)
    wanted = canonical.step(fed, np.zeros(1, np.int64), np.array([2])).copy()
    assert error(decoder.step(fed, np.zeros(1, np.int64), np.array([2])), wanted) < TOLERANCE


def test_embeddings_of_another_shape_or_dtype_are_refused(decoder: OnnxRuntimeCudaDecoder) -> None:
    """ONNX Runtime takes the bytes of float32 for float16 where a value is written over."""
    decoder.begin(2)
    hidden = decoder._shape.hidden_size
    wrong = [np.zeros(shape, np.float16) for shape in ((1, 1, hidden), (2, 1, hidden - 1), (3, 5, hidden))]
    for fed in (*wrong, np.zeros((2, 1, hidden), np.float32)):
        with pytest.raises(BackendError, match=rf"want float16 \[2, tokens, {hidden}\], found {fed.dtype} "):
            decoder.step(fed, np.zeros(2, np.int64), np.zeros(2, np.int64))


def test_without_room_for_more_rows_fewer_still_run(
    new_decoder: OnnxRuntimeCudaDecoder, canonical: OnnxRuntimeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, rng = canonical._shape, np.random.default_rng(8)

    def full(*_: object) -> object:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    new_decoder.begin(2)
    with monkeypatch.context() as patch:
        patch.setattr(Provider, "zeros", full)
        with pytest.raises(BackendError, match=rf"KV cache of 3 x {MAX_LEN} tokens wants .*Failed to.*smaller max_len"):
            new_decoder.begin(3)
    for sessions in (new_decoder, canonical):
        sessions.begin(1)
    fed = embeds(shape, rng, 1, 3)
    wanted = canonical.step(fed, np.zeros(1, np.int64), np.array([2])).copy()
    assert error(new_decoder.step(fed, np.zeros(1, np.int64), np.array([2])), wanted) < TOLERANCE


def test_inputs_that_do_not_fit_are_an_error_of_the_backend(
    new_decoder: OnnxRuntimeCudaDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is there already: only what single tokens are read from is new."""
    new_decoder.begin(3)

    def full(*_: object) -> object:
        raise RuntimeError("CUDA failure 2: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Provider, "value", full)
        with pytest.raises(BackendError, match=r"inputs for 2 prompts at once: .*out of memory; load .* smaller max_"):
            new_decoder.begin(2)
    new_decoder.begin(2)
    fed = np.zeros((2, 1, new_decoder._shape.hidden_size), np.float16)
    assert np.isfinite(new_decoder.step(fed, np.zeros(2, np.int64), np.zeros(2, np.int64))).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_of_one_slot(bundle: Path, manifest: Manifest, canonical: OnnxRuntimeDecoder, batch: int) -> None:
    decoder = OnnxRuntimeCudaDecoder(build_onnxruntime_cuda(bundle) / DECODER_GRAPH, manifest.decoder, 1, ON_THE_CPU)
    fed, first = embeds(manifest.decoder, np.random.default_rng(9), batch, 1), np.zeros(batch, np.int64)
    for sessions in (decoder, canonical):
        sessions.begin(batch)
    for _ in range(2):  # a row that has finished writes its last slot again
        wanted = canonical.step(fed, first, first).copy()
        assert error(decoder.step(fed, first, first), wanted) < TOLERANCE


@pytest.mark.parametrize("images", [1, 3])
def test_pictures_give_the_features_of_the_canonical_graph(bundle: Path, manifest: Manifest, images: int) -> None:
    shape = manifest.vision
    vision = OnnxRuntimeCudaVision(build_onnxruntime_cuda(bundle) / VISION_GRAPH, shape, ON_THE_CPU)
    canonical = OnnxRuntimeVision(bundle / VISION_GRAPH, shape, OPTIONS)
    first = None
    for seed in range(2):
        pixels = np.random.default_rng(seed).standard_normal((images, 3, shape.image_height, shape.image_width))
        found = vision.encode(pixels.astype(np.float32))
        np.testing.assert_allclose(found, canonical.encode(pixels.astype(np.float32)), atol=0.02)
        if first is not None:
            assert not np.shares_memory(first, found)  # features are kept, and the buffer is written over
        first = found


def test_an_onnxruntime_without_the_provider_says_so(bundle: Path, manifest: Manifest) -> None:
    if CUDA.name in onnxruntime.get_available_providers():
        provider = Provider("NoSuchExecutionProvider", "cpu", captures=False)
    else:
        provider = CUDA
    with pytest.raises(BackendError, match=rf"without {provider.name}.*llava-deploy doctor"):
        OnnxRuntimeCudaDecoder(build_onnxruntime_cuda(bundle) / DECODER_GRAPH, manifest.decoder, MAX_LEN, provider)
