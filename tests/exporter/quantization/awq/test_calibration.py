"""Calibration files through the model's own template, tokenizer, picture settings and splice."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import InputError, OptionError
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.exporter.quantization.awq.calibration import calibration_samples, demo_calibration, read_calibration
from llava_deploy.exporter.quantization.awq.embeddings import embed_samples
from llava_deploy.runtime import Llava
from llava_deploy.runtime.prompt import render_chat

CPU = torch.device("cpu")
PICTURE = {"type": "image", "image": "pictures/red.png"}
ASKED = {"role": "user", "content": [PICTURE, {"type": "text", "text": "What is this?"}]}


@pytest.fixture
def calibrate(tmp_path: Path, demo: Checkpoint) -> Callable[..., Any]:
    """Write lines (texts, or values as JSON) beside a picture, and read them as samples of the demo model."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 80), (200, 30, 30)).save(tmp_path / "pictures" / "red.png")

    def read(*lines: Any) -> Any:
        path = tmp_path / "calibration.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return read_calibration(path, demo)

    return read


def text_of(sample: Any, checkpoint: Checkpoint) -> str:
    tokenizer = Tokenizer.from_buffer(checkpoint.tokenizer_json)
    ids = np.where(sample.ids == IMAGE_TOKEN_INDEX, tokenizer.token_to_id("<image>"), sample.ids)
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_the_decoder_gets_what_the_runtime_gives_it(
    calibrate: Any, demo: Checkpoint, demo_bundle: Path, tmp_path: Path
) -> None:
    (sample,) = calibrate({"messages": [ASKED]})
    (found,) = embed_samples(demo, [sample], 512, CPU)
    llava = Llava.load(demo_bundle)
    picture = tmp_path / "pictures" / "red.png"
    prompt = render_chat([{**ASKED, "content": [{**PICTURE, "image": picture}, ASKED["content"][1]]}], demo.chat)
    want = llava.encoder.encode([prompt], [[picture]], 512).tokens.inputs_embeds[0]
    assert found.shape == want.shape
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-3, atol=1e-4)


def test_answers_follow_their_prompts(calibrate: Any, demo: Checkpoint) -> None:
    second = {"role": "user", "content": "And its colour?"}
    says = [{"role": "assistant", "content": text} for text in ("A square.", "It is red.")]
    (sample,) = calibrate({"messages": [ASKED, says[0], second, says[1]]})
    text = text_of(sample, demo)
    assert text.endswith("ASSISTANT: A square.</s>USER: And its colour? ASSISTANT: It is red.</s>")
    assert sample.pixels.shape == (1, 3, 96, 96)


def test_text_alone(calibrate: Any, demo: Checkpoint) -> None:
    first, second = calibrate({"text": "Once upon a time"}, "", {"messages": [{"role": "user", "content": "Hello!"}]})
    assert text_of(first, demo).removeprefix("<s>") == "Once upon a time"
    assert text_of(second, demo).endswith("USER: Hello! ASSISTANT:")
    assert first.origin.endswith("calibration.jsonl, line 1")
    assert second.origin.endswith("calibration.jsonl, line 3")
    embedded = embed_samples(demo, (first, second), 512, CPU)
    table = torch.from_numpy(demo.tensors["language_model.embed_tokens.weight"].read().astype(np.float32))
    assert torch.equal(embedded[0], table[torch.from_numpy(first.ids)])


def test_a_data_uri(calibrate: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 80), (200, 30, 30)).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    inline = {"role": "user", "content": [{"type": "image", "image": uri}, ASKED["content"][1]]}
    first, second = calibrate({"messages": [ASKED]}, {"messages": [inline]})
    assert np.array_equal(first.pixels, second.pixels)


def test_long_samples_are_cut(calibrate: Any, demo: Checkpoint) -> None:
    samples = calibrate({"messages": [ASKED]}, {"text": "short"})
    whole, cut = (embed_samples(demo, samples, limit, CPU) for limit in (512, 30))
    assert [len(x) for x in cut] == [30, len(whole[1])]
    assert torch.equal(cut[0], whole[0][:30])


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", r"not JSON \(.*\); want {\"messages\""),
        ("[" * 100_000, r"not JSON \(.*recursion"),
        ('{"text": ' + "1" * 5000 + "}", r"not JSON \(.*4300 digits"),
        ({"messages": [{"role": "user", "content": [{**PICTURE, "image": "x" * 300}]}]}, "found File name too long"),
        ('"text"', 'want {"messages": .*, found "text"'),
        ({"messages": []}, "want one message at least, found none"),
        ({"text": ""}, "want {"),
        ({"text": "a", "messages": []}, "want {"),
        ({"conversations": []}, "want {"),
        (user({"type": "image", "image": "none.png"}), r"want a picture at .*none\.png, found none; relative paths"),
        (user({"type": "image", "image": 7}), "want a picture's path or data URI, found 7"),
        (user({"type": "image", "image": "https://host/a.png"}), "https://host/a.png"),
        (user({"type": "image", "image": "calibration.jsonl"}), "not a picture"),
        (user(PICTURE, PICTURE, {"type": "text", "text": "<image> and?"}), "1 placeholders .* 2 pictures"),
        (user({"type": "text", "text": "<image> and?"}), "1 placeholders '<image>' and 0 pictures"),
        ({"text": "See <image>."}, "1 placeholders '<image>' and 0 pictures"),
        (user({"type": "video"}), "message 0, part 0"),
        ({"messages": ["hello"]}, "message 0"),
        ({"messages": [{"role": "assistant", "content": "Yes."}]}, "want the user's message last, got no message"),
        ({"messages": [ASKED, {"role": "assistant", "content": 3}]}, "message 1: want the assistant's content as text"),
        ({"messages": [ASKED, {"role": "system", "content": "Be kind."}]}, "want the user's message last"),
    ],
)
def test_lines_that_cannot_be_used(calibrate: Any, line: Any, reason: str) -> None:
    with pytest.raises(InputError, match=rf"calibration\.jsonl, line 2: .*{reason}") as caught:
        calibrate({"text": "fine"}, line)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used(calibrate: Any, demo: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"calibration\.jsonl: want a calibration sample a line, found none"):
        calibrate("", "  ")
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read .* or the word 'demo'"):
        calibration_samples(str(tmp_path / "none.jsonl"), demo)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        calibration_samples(str(tmp_path / "binary"), demo)


def test_calibration_has_to_be_named(demo: Checkpoint) -> None:
    with pytest.raises(
        OptionError, match=r"want a file of JSON lines, .* or the word demo for drawn pictures"
    ) as caught:
        calibration_samples(None, demo)
    assert caught.value.option == "calibration"


def test_the_built_in_set(demo: Checkpoint) -> None:
    found = calibration_samples("demo", demo)
    again = demo_calibration(demo, 3)
    assert len(found) == 64
    for one, other in zip(found, again, strict=False):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.pixels, other.pixels)
    example = next(examples(Split.TRAIN))
    assert f"USER: {example.question} ASSISTANT: {example.answer}" in text_of(found[0], demo)
    assert {len(sample.pixels) for sample in found} == {1}
    assert len({sample.pixels.tobytes() for sample in found}) == 64


def test_a_byte_order_mark(calibrate: Any) -> None:
    assert len(calibrate('\ufeff{"text": "a"}')) == 1
