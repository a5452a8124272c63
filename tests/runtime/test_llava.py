"""The whole runtime over the demo bundle: batches, streams, conversations, the cache, the limits."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_deploy.engines.errors import BackendError, BundleError, InputError, PromptError
from llava_deploy.engines.manifest import MANIFEST_NAME
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.runtime import Integrity, Llava, Piece, SamplingOptions

QUESTION = "USER: <image>\n{} ASSISTANT:"


@pytest.fixture(scope="module")
def loaded(demo_bundle: Path) -> Llava:
    return Llava.load(demo_bundle, threads=1)


@pytest.fixture
def llava(loaded: Llava) -> Llava:
    """The model with nothing in its cache."""
    loaded.generate(["a", "b"], max_new_tokens=1)  # another batch size: the one-row context is forgotten
    return loaded


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Image.Image, str]]:
    return [(example.picture, example.question) for example in islice(examples(Split.HELD_OUT, seed=5), 4)]


@pytest.fixture
def counted(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Tokens that each run of the decoder computed, and pictures that each run of the tower encoded."""
    counts: dict[str, list[int]] = {"decoder": [], "vision": []}

    def count(name: str, run: Callable[..., np.ndarray], axis: int) -> Callable[..., np.ndarray]:
        def counting(first: np.ndarray, *rest: Any) -> np.ndarray:
            counts[name].append(first.shape[axis])
            return run(first, *rest)

        return counting

    monkeypatch.setattr(llava.decoder, "step", count("decoder", llava.decoder.step, 1))
    monkeypatch.setattr(llava.encoder.vision, "encode", count("vision", llava.encoder.vision.encode, 0))
    return counts


def ask(picture: Image.Image, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def joined(pieces: Iterator[Piece]) -> tuple[str, tuple[int, ...], Piece]:
    found = list(pieces)
    return "".join(p.text for p in found), tuple(i for p in found for i in p.token_ids), found[-1]


def test_chat_streams_what_generate_answers(llava: Llava, scenes: list[Any]) -> None:
    for picture, question in scenes:
        text, ids, last = joined(llava.chat(ask(picture, question)))
        assert text.strip()
        assert last.finish_reason == "stop"
        assert last.timings is not None
        assert last.timings.new_tokens == len(ids)
        from_prompt = llava.generate([render(llava, picture, question)], [[picture]])[0]
        assert (from_prompt.text, from_prompt.token_ids) == (text, ids)


def render(llava: Llava, picture: Image.Image, question: str) -> str:
    from llava_deploy.runtime.prompt import render_chat

    return render_chat(ask(picture, question), llava.manifest.chat)


def test_every_piece_but_the_last_has_text(llava: Llava, scenes: list[Any]) -> None:
    picture, question = scenes[0]
    *before, last = llava.chat(ask(picture, question))
    assert all(piece.text and piece.finish_reason is None and piece.timings is None for piece in before)
    assert last.timings is not None
    assert last.timings.ttft > 0
    assert last.timings.vision + last.timings.prefill <= last.timings.ttft


def test_second_turn_computes_only_what_is_new(llava: Llava, scenes: list[Any], counted: dict[str, list[int]]) -> None:
    example = next(iter(examples(Split.HELD_OUT, seed=6)))  # a picture that no other test shows
    messages = ask(example.picture, example.question)
    text, ids, first = joined(llava.chat(messages))
    assert first.timings is not None
    assert counted == {"decoder": [first.timings.prompt_tokens] + [1] * (len(ids) - 1), "vision": [1]}
    assert first.timings.reused_tokens == 0
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "What colour is the star?"}]
    counted["decoder"].clear()
    again, _, second = joined(llava.chat(messages))
    assert second.timings is not None
    new = second.timings.prompt_tokens - second.timings.reused_tokens
    assert second.timings.reused_tokens >= first.timings.prompt_tokens
    assert counted["decoder"][0] == new
    assert new < 40
    assert counted["vision"] == [1]
    llava.generate(["x", "y"], max_new_tokens=1)
    fresh, _, anew = joined(llava.chat(messages))
    assert anew.timings is not None
    assert anew.timings.reused_tokens == 0
    assert fresh == again


def test_another_picture_is_not_the_same_context(llava: Llava, scenes: list[Any]) -> None:
    (one, question), (two, _) = scenes[:2]
    joined(llava.chat(ask(one, question)))
    reused, _, last = joined(llava.chat(ask(two, question)))
    assert last.timings is not None
    assert last.timings.reused_tokens < last.timings.prompt_tokens - llava.manifest.vision.patches
    llava.generate(["x", "y"], max_new_tokens=1)
    assert joined(llava.chat(ask(two, question)))[0] == reused


def test_same_prompt_again_computes_one_token(llava: Llava, scenes: list[Any], counted: dict[str, list[int]]) -> None:
    picture, question = scenes[0]
    first, _, _ = joined(llava.chat(ask(picture, question)))
    counted["decoder"].clear()
    assert joined(llava.chat(ask(picture, question)))[0] == first
    assert set(counted["decoder"]) == {1}


def test_a_stream_left_half_way(llava: Llava, scenes: list[Any]) -> None:
    """The next answer is right, and the abandoned one says so when it is taken up again."""
    (one, first), (two, second) = scenes[:2]
    want, _, _ = joined(llava.chat(ask(two, second)))
    abandoned = llava.chat(ask(one, first))
    next(abandoned)
    assert joined(llava.chat(ask(two, second)))[0] == want
    with pytest.raises(BackendError, match="another answer was started"):
        list(abandoned)


def test_streams_begun_before_either_runs(llava: Llava) -> None:
    """Only the newest runs, and the record of what the cache holds stays right."""
    one, two = "USER: what is this? ASSISTANT:", "USER: what colour is it, and where? ASSISTANT:"
    want = [llava.generate([prompt, "x"], max_new_tokens=8)[0].token_ids for prompt in (one, two)]
    waiting = llava.stream(one, max_new_tokens=8)
    newest = llava.stream(two, max_new_tokens=8)
    with pytest.raises(BackendError, match="another answer was started"):
        next(waiting)
    assert joined(newest)[1] == want[1]
    assert joined(llava.stream(one, max_new_tokens=8))[1] == want[0]


def test_a_batch_that_does_not_fit_the_memory(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache took the place of the old one, so nothing of the old one is reused afterwards."""
    prompt = "USER: what is this? ASSISTANT:"
    want = llava.generate([prompt], max_new_tokens=8)[0].token_ids

    def full(array: np.ndarray) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(llava.decoder, "_value", full)
        with pytest.raises(BackendError, match="the KV cache of 3 x"):
            llava.generate([prompt] * 3, max_new_tokens=1)
    assert llava.generate([prompt], max_new_tokens=8)[0].token_ids == want


def test_the_arrays_of_a_step_live_until_it_has_run(
    llava: Llava, scenes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime up to 1.31 keeps neither the arrays nor the OrtValues that are bound."""
    llava.generate(["a"], max_new_tokens=1)
    bound: dict[str, weakref.ref[Any]] = {}
    times = 0

    class Forgetful(dict[str, Any]):
        def __setitem__(self, name: str, value: Any) -> None:
            nonlocal times
            times += 1
            bound[name] = weakref.ref(value)

    monkeypatch.setattr(llava.decoder._bindings[0], "_bound_inputs", Forgetful())
    run = llava.decoder._sessions[0].run_with_iobinding

    def running(binding: Any) -> None:
        assert len(bound) == 3  # of an engine that reads neither mask nor positions
        assert all(value() is not None for value in bound.values())
        run(binding)

    monkeypatch.setattr(llava.decoder._sessions[0], "run_with_iobinding", running)
    picture, question = scenes[0]
    assert len(llava.generate([QUESTION.format(question)], [[picture]], max_new_tokens=3)[0].token_ids) == 3
    assert times == 3 + 3  # a prompt, and the first of single tokens


def test_batch_is_each_alone(llava: Llava, scenes: list[Any]) -> None:
    prompts = [QUESTION.format(question) for _, question in scenes] + ["no picture at all"]
    images = [[picture] for picture, _ in scenes] + [[]]
    together = llava.generate(prompts, images, max_new_tokens=12)
    for prompt, row, answer in zip(prompts, images, together, strict=True):
        alone = llava.generate([prompt], [row], max_new_tokens=12)[0]
        assert (alone.text, alone.token_ids, alone.finish_reason) == (
            answer.text,
            answer.token_ids,
            answer.finish_reason,
        )
        assert answer.timings.new_tokens == len(answer.token_ids)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_pieces(llava: Llava, scenes: list[Any], monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    prompts = [QUESTION.format(scenes[0][1]), "short"]
    whole = llava.generate(prompts, [[scenes[0][0]], []], max_new_tokens=8)
    monkeypatch.setattr(llava.decoder, "max_seq", chunk)
    pieces = llava.generate(prompts, [[scenes[0][0]], []], max_new_tokens=8)
    assert [answer.token_ids for answer in pieces] == [answer.token_ids for answer in whole]


def test_cache_is_written_in_place(llava: Llava, scenes: list[Any]) -> None:
    """Past and present are one buffer, the same one from answer to answer."""
    joined(llava.chat(ask(scenes[0][0], scenes[0][1])))
    buffers = {value.data_ptr() for value in llava.decoder._caches.values()}  # type: ignore[attr-defined]
    outputs = [value.data_ptr() for value in llava.decoder._bindings[0].get_outputs()]  # type: ignore[attr-defined]
    assert len(buffers) == 2 * llava.manifest.decoder.layers
    assert buffers <= set(outputs)
    joined(llava.chat(ask(scenes[1][0], scenes[1][1])))
    assert buffers == {value.data_ptr() for value in llava.decoder._caches.values()}  # type: ignore[attr-defined]


def test_more_pictures_than_one_run_of_the_tower_takes(llava: Llava, counted: dict[str, list[int]]) -> None:
    pictures = [example.picture for example in islice(examples(Split.HELD_OUT, seed=7), 19)]
    prompts = [QUESTION.format("What is in the picture?")] * len(pictures)
    together = llava.generate(prompts, [[picture] for picture in pictures], max_new_tokens=4)
    assert counted["vision"] == [16, 3]
    alone = llava.generate(prompts[-1:], [pictures[-1:]], max_new_tokens=4)[0]
    assert alone.token_ids == together[-1].token_ids


def test_limits(llava: Llava) -> None:
    whole = llava.generate(["USER: hello ASSISTANT:"], max_new_tokens=20)[0]
    answer = llava.generate(["USER: hello ASSISTANT:"], max_new_tokens=len(whole.token_ids) - 1)[0]
    assert (answer.finish_reason, answer.token_ids) == ("length", whole.token_ids[:-1])
    with pytest.raises(InputError, match="max_new_tokens: want 1 or more, got 0"):
        llava.generate(["a"], max_new_tokens=0)


def test_context_full(demo_bundle: Path, scenes: list[Any]) -> None:
    """An answer that fills the cache ends with a reason; a prompt of one token too many is refused."""
    picture, question = scenes[0]
    prompt = QUESTION.format(question)
    whole = Llava.load(demo_bundle, threads=1).generate([prompt], [[picture]])[0]
    length = whole.timings.prompt_tokens
    for room in range(len(whole.token_ids) - 1):  # one more, and the answer would fit
        small = Llava.load(demo_bundle, threads=1, max_len=length + room)
        for _ in range(2):  # the second time with the context still in the cache
            _, ids, last = joined(small.stream(prompt, [picture], max_new_tokens=50))
            assert last.finish_reason == "context"
            assert ids == whole.token_ids[: room + 1]
    small = Llava.load(demo_bundle, threads=1, max_len=length - 1)
    with pytest.raises(PromptError, match=rf"prompt 0: {length} tokens .* the context holds {length - 1}"):
        small.generate([prompt], [[picture]])


def test_context_full_in_a_batch(demo_bundle: Path) -> None:
    small = Llava.load(demo_bundle, threads=1, max_len=16)
    hot = SamplingOptions(temperature=50.0, seed=3)
    answers = small.generate(["a", "a b c d e f"], max_new_tokens=100, sampling=hot)
    assert "context" in {answer.finish_reason for answer in answers}
    for answer in answers:
        assert answer.finish_reason in ("context", "stop")
        if answer.finish_reason == "context":
            assert answer.timings.prompt_tokens + len(answer.token_ids) == 17  # the last token needs no slot


def test_stop_strings_end_an_answer(llava: Llava, scenes: list[Any]) -> None:
    picture, question = scenes[0]
    whole = llava.generate([QUESTION.format(question)], [[picture]])[0].text
    cut = llava.generate([QUESTION.format(question)], [[picture]], stop=[whole[3:5]])[0]
    assert cut.text == whole[: whole.index(whole[3:5])]
    assert cut.finish_reason == "stop"
    text, _, last = joined(llava.stream(QUESTION.format(question), [picture], stop=[whole[3:5]]))
    assert (text, last.finish_reason) == (cut.text, "stop")


def test_seed_decides(llava: Llava) -> None:
    hot = SamplingOptions(temperature=3.0, seed=11)
    one, two = (llava.generate(["USER: hello ASSISTANT:"], max_new_tokens=20, sampling=hot)[0] for _ in range(2))
    other = llava.generate(["USER: hello ASSISTANT:"], max_new_tokens=20, sampling=SamplingOptions(3.0, seed=12))[0]
    assert one.token_ids == two.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("prompts", "pictures", "message"),
    [
        ([], [], "want one at least, got none"),
        (["a"], [1], "0 placeholders '<image>' and 1 pictures"),
        (["<image> a"], [0], "1 placeholders '<image>' and 0 pictures"),
        (["<image><image>", "<image>"], [1, 2], "prompt 0: 2 placeholders '<image>' and 1 pictures"),
        (["a", "b"], [0], "one list of pictures a prompt, 2, got 1"),
    ],
)
def test_pictures_and_placeholders(llava: Llava, prompts: list[str], pictures: list[int], message: str) -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(PromptError, match=message):
        llava.generate(prompts, [[image] * count for count in pictures])


def test_arguments_are_refused_before_the_first_piece(llava: Llava) -> None:
    with pytest.raises(PromptError, match="placeholders"):
        llava.stream("<image>")


@pytest.mark.parametrize("ids", [[5, 100000], [-1]])
def test_token_ids_outside_the_vocabulary(llava: Llava, ids: list[int]) -> None:
    with pytest.raises(PromptError, match=r"token id (100000|-1) is outside the vocabulary"):
        llava.encoder.embed(np.array(ids))


@pytest.mark.parametrize("max_len", [0, -1, 10**9])
def test_max_len_outside_the_model(demo_bundle: Path, max_len: int) -> None:
    with pytest.raises(InputError, match="max_len: want 1 to "):
        Llava.load(demo_bundle, max_len=max_len)


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx.data", "embed_tokens.npy", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["byte", "short", "gone"])
def test_altered_files_are_refused(demo_bundle: Path, tmp_path: Path, name: str, damage: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).unlink()
    if damage != "gone":
        (bundle / name).write_bytes(data if damage == "byte" else data[:-1])
    with pytest.raises(BundleError, match=f"{name}: .*export the bundle again"):
        Llava.load(bundle, integrity=Integrity.QUICK)


def test_a_table_of_another_shape(demo_bundle: Path, tmp_path: Path) -> None:
    """A manifest that agrees with its files but not with itself is refused too."""
    from llava_deploy.engines.manifest import describe_file

    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    np.save(bundle / "embed_tokens.npy", np.zeros((3, 2), np.float32))
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    entry = describe_file(bundle, "embed_tokens.npy")
    for file in manifest["files"]:
        if file["path"] == entry.path:
            file |= {"size": entry.size, "sha256": entry.sha256}
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"embed_tokens\.npy: want float32\[.*found float32\[3, 2\]"):
        Llava.load(bundle)
