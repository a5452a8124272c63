from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX, DecoderShape, VisionShape
from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.goldens import (
    GOLDENS_FILE,
    GOLDENS_FORMAT_VERSION,
    Golden,
    GoldenMessage,
    GoldenPart,
    Goldens,
    golden_dtype,
    read_golden_array,
    read_goldens,
)
from llava_deploy.engines.manifest import (
    MANIFEST_NAME,
    ChatRecipe,
    ImageRecipe,
    Manifest,
    ModelCard,
    SpliceRecipe,
    describe_file,
    read_manifest,
)

VISION = VisionShape("float16", 28, 28, 4, 8)
DECODER = DecoderShape("float16", 8, 2, 1, 4, 11, 32)
GOLDEN = Golden(
    name="one-picture",
    messages=(GoldenMessage("user", (GoldenPart(None), GoldenPart("What is this?"))),),
    pictures=("goldens/one-picture/picture-1.png",),
    prompt="<image>\nWhat is this?",
    input_ids=(1, IMAGE_TOKEN_INDEX, 3, 4),
    token_ids=(5, 2),
)
GOLDENS = Goldens(GOLDENS_FORMAT_VERSION, {"torch": "2.13.0"}, "checkpoint", (GOLDEN,))
ARRAYS = {
    "pixel_values": np.ones((1, 3, 28, 28), np.float32),
    "image_features": np.ones((1, 4, 8), np.float16),
    "inputs_embeds": np.ones((7, 8), np.float16),
    "logits": np.ones((2, 11), np.float16),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A manifest with the goldens above, and nothing else."""
    (tmp_path / "goldens" / GOLDEN.name).mkdir(parents=True)
    (tmp_path / GOLDEN.pictures[0]).write_bytes(b"a picture")
    for name, values in ARRAYS.items():
        np.save(tmp_path / GOLDEN.path(name), values)
    return rewrite(tmp_path, GOLDENS.to_json())


def rewrite(bundle: Path, text: str) -> Path:
    (bundle / GOLDENS_FILE).write_text(text, encoding="utf-8")
    names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    manifest = Manifest(
        format_version=2,
        model=ModelCard("tiny", "llava-hf", "clip", "linear", "llama", "fp16", 1),
        vision=VISION,
        decoder=DECODER,
        image=ImageRecipe(False, (0, 0, 0), ("exact", 28, 28), 3, None, None, None, None),
        chat=ChatRecipe(None, "plain", "<image>", "split", None, None, None, None, (2,), ()),
        splice=SpliceRecipe(None),
        quantization=None,
        tools={},
        files=tuple(describe_file(bundle, name) for name in names if name != MANIFEST_NAME),
        left_out=(),
    )
    (bundle / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return bundle


def error_of(bundle: Path) -> str:
    with pytest.raises(BundleError) as raised:
        read_goldens(bundle, read_manifest(bundle))
    return str(raised.value)


def test_they_come_back_as_they_were(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert read_goldens(bundle, manifest) == GOLDENS
    for name, values in ARRAYS.items():
        found = read_golden_array(bundle, manifest, GOLDEN, name)
        assert found.dtype == values.dtype
        assert np.array_equal(found, values)


def test_equal_goldens_are_equal_bytes() -> None:
    assert dataclasses.replace(GOLDENS, tools={"torch": "2.13.0"}).to_json() == GOLDENS.to_json()
    assert GOLDENS.to_json().startswith('{\n "format_version": 1,\n "tools": {')


def test_a_bundle_without_any_says_how_to_record_them(demo_bundle: Path) -> None:
    with pytest.raises(BundleError, match="record them where the checkpoint is, with: llava-deploy record CHECKPOINT"):
        read_goldens(demo_bundle, read_manifest(demo_bundle))


def test_an_fp32_bundle_keeps_them_in_float32(demo_bundle: Path, demo_bundle_fp16: Path) -> None:
    assert golden_dtype(read_manifest(demo_bundle)) == np.float32
    assert golden_dtype(read_manifest(demo_bundle_fp16)) == np.float16


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: g.update(format_version=2), "want format_version 1, found 2"),
        (lambda g: g.pop("tools"), "goldens: missing ['tools'], unknown []"),
        (lambda g: g.update(goldens=[]), "want goldens of different names, found []"),
        (lambda g: g.update(goldens=g["goldens"] * 2), "of different names, found ['one-picture', 'one-picture']"),
        (lambda g: g["goldens"][0].update(input_ids=[1, 2]), "has 1 pictures, 1 in its messages, 0 in its ids"),
        (lambda g: g["goldens"][0].update(pictures=[]), "has 0 pictures, 1 in its messages, 1 in its ids"),
        (lambda g: g["goldens"][0].update(token_ids=[]), "and 0 tokens of an answer"),
        (lambda g: g["goldens"][0].update(pictures=["other.png"]), "wants ['other.png'], which the manifest lacks"),
        (lambda g: g["goldens"][0]["messages"][0].update(role="tool"), "goldens.goldens[0].messages[0].role"),
    ],
)
def test_what_is_no_form_of_goldens(bundle: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    data = json.loads(GOLDENS.to_json())
    edit(data)
    text = error_of(rewrite(bundle, json.dumps(data)))
    assert message in text
    assert text.endswith("record them again with: llava-deploy record CHECKPOINT BUNDLE")


@pytest.mark.parametrize("content", ["[]", "", "{", '"text"', "[" * 100_000])
def test_json_of_another_kind(bundle: Path, content: str) -> None:
    assert "cannot be read" in error_of(rewrite(bundle, content))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.ones((2, 12), np.float16), "found float16[2, 12]"),
        (np.ones((2, 11), np.float32), "found float32[2, 11]"),
        (np.array([{"a": 1}], dtype=object), "not an array"),
    ],
)
def test_another_array(bundle: Path, values: np.ndarray, found: str) -> None:
    np.save(bundle / GOLDEN.path("logits"), values)
    with pytest.raises(BundleError) as raised:
        read_golden_array(bundle, read_manifest(bundle), GOLDEN, "logits")
    assert found in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"nothing like an array"])
def test_a_file_that_is_no_array(bundle: Path, content: bytes) -> None:
    (bundle / GOLDEN.path("logits")).write_bytes(content)
    with pytest.raises(BundleError, match="not an array"):
        read_golden_array(bundle, read_manifest(bundle), GOLDEN, "logits")
