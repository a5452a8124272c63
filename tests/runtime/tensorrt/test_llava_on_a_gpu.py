"""The whole runtime on the fake GPU, both cache forms, against ONNX Runtime: the same prompts give the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import Result
from cuda.bindings import runtime
from PIL import Image

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.errors import BackendError, BundleError, OptionError
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.runtime import Llava, Piece, SamplingOptions

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

QUESTION = "USER: <image>\n{} ASSISTANT:"
MAX_LEN = 256
FORMS = {"in-place": "tensorrt-rtx", "growing": "tensorrt"}
OLD = "10.3.0.26"

AddEngine = Callable[..., Path]


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Image.Image, str]]:
    return [(example.picture, example.question) for example in islice(examples(Split.HELD_OUT, seed=5), 6)]


@pytest.fixture(scope="module")
def loaded(demo_bundle: Path) -> Llava:
    return Llava.load(demo_bundle, backend="onnxruntime", threads=1, max_len=MAX_LEN)


@pytest.fixture
def on_cpu(loaded: Llava) -> Llava:
    """ONNX Runtime with nothing in its cache."""
    loaded.generate(["a", "b"], max_new_tokens=1)  # another batch size: the one-row context is forgotten
    return loaded


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own, without engines."""
    return shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))


@pytest.fixture
def add_engine(bundle: Path, fake_gpu: FakeGpu) -> AddEngine:
    """Put an engine into the bundle whose cache is of that form."""

    def add(cache: str) -> Path:
        if cache == "in-place":
            return fake_gpu.write_engine(bundle)
        fake_gpu.provide("tensorrt", OLD)
        return fake_gpu.write_engine(bundle, backend="tensorrt", version=OLD, cache=cache)

    return add


@pytest.fixture(params=FORMS)
def on_gpu(request: pytest.FixtureRequest, bundle: Path, add_engine: AddEngine) -> Llava:
    """The demo model through each form of cache."""
    add_engine(request.param)
    return Llava.load(bundle, backend=FORMS[request.param])


def ask(picture: Image.Image, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def joined(pieces: Iterator[Piece]) -> tuple[str, tuple[int, ...], Piece]:
    found = list(pieces)
    return "".join(p.text for p in found), tuple(i for p in found for i in p.token_ids), found[-1]


def both(gpu: Llava, cpu: Llava, call: Callable[[Llava], Any]) -> Any:
    """What both give, which must be the same."""
    found, want = call(gpu), call(cpu)
    assert found == want
    return found


def test_the_demos_questions_in_batches(on_gpu: Llava, on_cpu: Llava, scenes: list[Any]) -> None:
    prompts = [QUESTION.format(question) for _, question in scenes]
    images = [[picture] for picture, _ in scenes]

    def answers(llava: Llava, at: int, size: int) -> list[Any]:
        given = llava.generate(prompts[at : at + size], images[at : at + size], max_new_tokens=24)
        return [(answer.token_ids, answer.text, answer.finish_reason) for answer in given]

    for size in (1, 4, 2, 1):
        for at in range(0, len(prompts), size):
            for tokens, _, reason in both(on_gpu, on_cpu, lambda llava, at=at, size=size: answers(llava, at, size)):
                assert tokens
                assert reason == "stop"


def test_ragged_prompts_without_and_with_several_pictures(on_gpu: Llava, on_cpu: Llava, scenes: list[Any]) -> None:
    """The second row is longer than what the engine takes at once, and its pieces end inside a picture."""
    pictures = [picture for picture, _ in scenes]
    prompts = ["hello there", "<image> a <image> star <image> and <image> moon", QUESTION.format("Well?")]
    images = [[], pictures[:4], pictures[1:2]]
    rows = on_gpu.encoder.encode(prompts, images, MAX_LEN).tokens
    assert rows.inputs_embeds.shape[1] > on_gpu.decoder.max_seq
    assert {one.features for one in rows.part(0, on_gpu.decoder.max_seq)[1]} & {
        one.features for one in rows.part(on_gpu.decoder.max_seq, rows.inputs_embeds.shape[1])[1]
    }
    both(on_gpu, on_cpu, lambda llava: [a.token_ids for a in llava.generate(prompts, images, max_new_tokens=20)])


def test_conversations_reuse_what_the_cache_holds(
    on_gpu: Llava, on_cpu: Llava, scenes: list[Any], fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = on_gpu.encoder.vision.encode

    def counting(pixels: np.ndarray) -> Any:
        encoded.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(on_gpu.encoder.vision, "encode", counting)

    def said(messages: list[dict[str, Any]]) -> Callable[[Llava], tuple[str, tuple[int, ...], str, int, int]]:
        def say(llava: Llava) -> tuple[str, tuple[int, ...], str, int, int]:
            text, ids, last = joined(llava.chat(messages, max_new_tokens=24))
            assert last.timings is not None
            return text, ids, str(last.finish_reason), last.timings.prompt_tokens, last.timings.reused_tokens

        return say

    (one, first), (two, second) = scenes[:2]
    messages = ask(one, first)
    text, ids, _, prompt, reused = both(on_gpu, on_cpu, said(messages))
    assert reused == 0
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "What colour is the star?"}]
    known = both(on_gpu, on_cpu, said(messages))[-1]
    assert known >= prompt
    assert both(on_gpu, on_cpu, said(messages))[-1] > known
    branch = [*messages[:2], {"role": "user", "content": "And now something else, at length: where is it?"}]
    assert prompt <= both(on_gpu, on_cpu, said(branch))[-1] < MAX_LEN
    both(on_gpu, on_cpu, said(ask(two, second)))
    both(on_gpu, on_cpu, said(ask(one, first)))
    assert both(on_gpu, on_cpu, said(messages))[-1] >= len(ids)
    both(on_gpu, on_cpu, lambda llava: [a.token_ids for a in llava.generate(["x", "y z"], max_new_tokens=3)])
    assert both(on_gpu, on_cpu, said(messages))[-1] == 0
    assert encoded == [1, 1]


def test_nobody_waits_between_the_tower_and_the_first_token(
    on_gpu: Llava, scenes: list[Any], fake_gpu: FakeGpu
) -> None:
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaFree")
    counts = []
    for picture, _ in scenes[:3]:
        before = sum(fake_gpu.calls[name] for name in waits)
        answer = on_gpu.generate([QUESTION.format("Well?")], [[picture]], max_new_tokens=2)[0]
        assert len(answer.token_ids) == 2
        counts.append(sum(fake_gpu.calls[name] for name in waits) - before)
    assert counts[-1] == 2, counts  # for each token's logits; the first time buffers are made


def test_the_towers_time_is_the_gpus(
    on_gpu: Llava, scenes: list[Any], fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has gone on long before: what it waits for in the first step is not the decoder's."""
    ended: list[int] = []

    def elapsed(_begin: Any, end: Any) -> tuple[Any, float]:
        ended.append(int(end))
        return runtime.cudaError_t.cudaSuccess, 250.0

    monkeypatch.setattr(fake_gpu.cuda, "cudaEventElapsedTime", elapsed)
    picture, question = scenes[0]
    first, again = (on_gpu.generate([QUESTION.format(question)], [[picture]])[0].timings for _ in range(2))
    assert first.vision == pytest.approx(0.25)
    assert first.prefill == 0  # it was not as long as what the tower is said to have taken
    assert again.vision == 0
    assert again.prefill > 0
    assert len(ended) == 1


def test_a_full_context_and_samples(bundle: Path, add_engine: AddEngine, demo_bundle: Path) -> None:
    """Rows end at different times, and go on writing to their last slot; the growing cache is packed on the way."""
    hot = SamplingOptions(temperature=50.0, seed=3)
    prompts = ["a", "a b c d e f", "a b c"]
    small = Llava.load(demo_bundle, backend="onnxruntime", threads=1, max_len=24)
    want = small.generate(prompts, max_new_tokens=100, sampling=hot)
    assert "context" in {answer.finish_reason for answer in want}
    for cache, backend in FORMS.items():
        add_engine(cache)
        llava = Llava.load(bundle, backend=backend, max_len=24)
        assert llava.max_len == 24
        found = llava.generate(prompts, max_new_tokens=100, sampling=hot)
        assert [a.token_ids for a in found] == [a.token_ids for a in want]
        assert [a.finish_reason for a in found] == [a.finish_reason for a in want]


def test_logits_along_given_answers(on_gpu: Llava, on_cpu: Llava, scenes: list[Any]) -> None:
    prompts, images = [QUESTION.format(scenes[0][1]), "hello"], [[scenes[0][0]], []]
    answers = [[7, 8, 9], [5, 6, 7, 8, 9, 10]]
    pairs = zip(*(llava.logits_along(prompts, images, answers) for llava in (on_gpu, on_cpu)), strict=True)
    for count, (found, want) in enumerate(pairs):
        rows = [count < len(answer) for answer in answers]
        np.testing.assert_allclose(found[rows], want[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_on_the_gpu(
    bundle: Path, add_engine: AddEngine, fake_gpu: FakeGpu, form: str, scenes: list[Any]
) -> None:
    add_engine(form)
    llava = Llava.load(bundle, backend=FORMS[form])
    pieces = llava.chat(ask(*scenes[0]), max_new_tokens=24)
    next(pieces)
    assert fake_gpu.live()
    del llava, pieces
    assert fake_gpu.live() == {}


@pytest.mark.parametrize(("name", "at"), [("execute_async_v3", 1), ("execute_async_v3", 3), ("cudaMalloc", 1)])
def test_out_of_memory_fails_the_request_alone(
    on_gpu: Llava, on_cpu: Llava, scenes: list[Any], fake_gpu: FakeGpu, name: str, at: int
) -> None:
    messages = ask(*scenes[0])
    want = joined(on_cpu.chat(messages, max_new_tokens=8))[:2]
    fake_gpu.fail(name, at)
    with pytest.raises(BackendError, match=r"memory|OutOfMemory|bytes on the GPU"):
        joined(on_gpu.chat(messages, max_new_tokens=8))
    for _ in range(2):
        assert joined(on_gpu.chat(messages, max_new_tokens=8))[:2] == want


def test_values_that_overflowed_are_gone_with_their_request(
    on_gpu: Llava, on_cpu: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the mask hides still meets a weight of 0, and 0 x NaN is NaN."""
    embed = on_gpu.encoder.embed
    for batch in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(on_gpu.encoder, "embed", lambda ids: embed(ids) * np.float32(np.nan))
            with pytest.raises(BackendError, match="want finite values, found nan"):
                on_gpu.generate(["a long question, " * 9] * batch)
        both(on_gpu, on_cpu, lambda llava: llava.generate(["hello there"], max_new_tokens=6)[0].token_ids)


def test_auto_takes_the_engine_and_falls_back_aloud(bundle: Path, add_engine: AddEngine, fake_gpu: FakeGpu) -> None:
    name = add_engine("in-place").name
    assert Llava.load(bundle).backend == f"TensorRT for RTX 1.7.1.116 on Fake GPU (sm89), engine {name}"
    fake_gpu.fail("deserialize_cuda_engine")
    assert "on the CPU, canonical graphs" in (said := Llava.load(bundle).backend)
    assert "; not TensorRT for RTX: " in said
    assert "OutOfMemory" in said
    fake_gpu.fail("deserialize_cuda_engine")
    with pytest.raises(BackendError, match="OutOfMemory"):
        Llava.load(bundle, backend="tensorrt-rtx")
    fake_gpu.driver = 0
    assert "; not TensorRT for RTX: no NVIDIA driver is loaded" in Llava.load(bundle).backend
    with pytest.raises(BackendError, match="no NVIDIA driver is loaded"):
        Llava.load(bundle, backend="tensorrt-rtx")


@pytest.mark.parametrize("name", ["vision.plan", "decoder.plan"])
def test_an_altered_plan_never_reaches_tensorrt(
    bundle: Path, add_engine: AddEngine, fake_gpu: FakeGpu, name: str
) -> None:
    path = add_engine("in-place") / name
    path.write_bytes(path.read_bytes()[:-1] + b"\n")
    for backend in ("auto", "tensorrt-rtx"):
        before = fake_gpu.calls["deserialize_cuda_engine"]
        with pytest.raises(
            BundleError, match=rf"{name}: .* the file was altered; .*llava-deploy build {bundle} .*--for"
        ):
            Llava.load(bundle, backend=backend)
        assert fake_gpu.calls["deserialize_cuda_engine"] - before <= (name == "decoder.plan")


def test_limits_of_the_engine_are_said_by_option(bundle: Path, add_engine: AddEngine) -> None:
    for cache, backend in FORMS.items():
        add_engine(cache)
        with pytest.raises(OptionError, match=r"max_len: engine .* was built for 256, got 257; build another with: "):
            Llava.load(bundle, backend=backend, max_len=257)
        llava = Llava.load(bundle, backend=backend)
        with pytest.raises(
            OptionError, match="batch: want 1 to 4 prompts at once, what the engine was built for, got 5"
        ):
            llava.generate(["a"] * 5)
        assert len(llava.generate(["a"] * 4, max_new_tokens=1)) == 4


def test_the_commands_answer_on_the_gpu(
    bundle: Path, add_engine: AddEngine, scenes: list[Any], on_cpu: Llava, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    name = add_engine("in-place").name
    picture, question = scenes[0]
    picture.save(tmp_path / "picture.png")
    said = invoke("run", bundle, "--image", tmp_path / "picture.png", "--prompt", question, "--max-new-tokens", "24")
    assert said.exit_code == 0
    assert said.stdout.strip() == joined(on_cpu.chat(ask(picture, question), max_new_tokens=24))[0].strip()
    assert f"TensorRT for RTX 1.7.1.116 on Fake GPU (sm89), engine {name}" in said.stderr
    few = ("--per-kind", "2", "--max-new-tokens", "12", "--backend")
    scores = [invoke("eval", bundle, "--json", *few, backend).stdout for backend in ("tensorrt-rtx", "onnxruntime")]
    found, want = ({**json.loads(score), "seconds": None} for score in scores)
    assert found == want
    refused = invoke("eval", bundle, "--batch", "5", *few, "tensorrt-rtx")
    assert "--batch: want 1 to 4 prompts at once, what the engine was built for, got 5" in refused.stderr
