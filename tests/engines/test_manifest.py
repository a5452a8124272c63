from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    ChatRecipe,
    FileEntry,
    ImageRecipe,
    Manifest,
    ModelCard,
    QuantizationRecipe,
    SpliceRecipe,
    describe_file,
    read_manifest,
)

MANIFEST = Manifest(
    format_version=FORMAT_VERSION,
    model=ModelCard("tiny", "llava-hf", "clip", "mlp2x_gelu", "llama", "int4-awq", 1234),
    vision=VisionShape("float32", 28, 28, 4, 8),
    decoder=DecoderShape("float32", 8, 2, 1, 4, 11, 32),
    image=ImageRecipe(
        pad_to_square=False,
        pad_color=(1, 2, 3),
        resize=("shortest_edge", 28),
        resample=3,
        crop=(28, 28),
        rescale_factor=1 / 255,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    ),
    chat=ChatRecipe("{{ x }}", "vicuna_v1", "<image>", "split", 7, 1, "<s>", "</s>", (2,), ("###",)),
    splice=SpliceRecipe(None),
    quantization=QuantizationRecipe("awq", 128, False, "int8", 29, 4),
    tools={"numpy": "2.0"},
    files=(FileEntry("vision.onnx", 5, "a" * 64), FileEntry("deep/decoder.onnx", 6, "b" * 64)),
    left_out=(),
)
Edit = Callable[[dict[str, Any]], object]


def write(bundle: Path, text: str) -> Path:
    (bundle / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return bundle


def edited(bundle: Path, edit: Edit) -> Path:
    data = json.loads(MANIFEST.to_json())
    edit(data)
    return write(bundle, json.dumps(data))


def error_of(bundle: Path) -> str:
    with pytest.raises(BundleError) as raised:
        read_manifest(bundle)
    return str(raised.value)


def test_round_trip(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path, MANIFEST.to_json())) == MANIFEST


def test_equal_manifests_are_equal_bytes() -> None:
    again = dataclasses.replace(MANIFEST, tools={"numpy": "2.0"})
    assert again.to_json() == MANIFEST.to_json()
    assert MANIFEST.to_json().startswith('{\n "format_version": 2,\n "model": {\n  "name": "tiny",')


def test_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        assert error_of(place) == (
            f"{place}: want a bundle directory with manifest.json, found none; "
            "make one with: llava-deploy export CHECKPOINT -o BUNDLE"
        )


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000],
    ids=["empty", "cut", "bytes", "deep", "long number"],
)
def test_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    assert f"{tmp_path / MANIFEST_NAME}: not JSON (" in error_of(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version(tmp_path: Path, version: object) -> None:
    text = error_of(edited(tmp_path, lambda m: m.update(format_version=version)))
    assert f"want format_version 2, found {version!r}; export the bundle again with this version" in text


@pytest.mark.parametrize("content", ["[]", '"text"', "3", "null"])
def test_json_of_another_kind(tmp_path: Path, content: str) -> None:
    assert "want format_version 2, found None" in error_of(write(tmp_path, content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("chat"), "manifest: missing ['chat'], unknown []"),
        (lambda m: m.update(note="x"), "manifest: missing [], unknown ['note']"),
        (lambda m: m["decoder"].pop("layers"), "manifest.decoder: missing ['layers'], unknown []"),
        (lambda m: m["image"].update(bicubic=True), "manifest.image: missing [], unknown ['bicubic']"),
        (lambda m: m.update(vision=[]), "manifest.vision: want an object, found list"),
        (lambda m: m["decoder"].update(layers="2"), "manifest.decoder.layers: want <class 'int'>, found '2'"),
        (lambda m: m["decoder"].update(layers=True), "manifest.decoder.layers: want <class 'int'>, found True"),
        (lambda m: m["decoder"].update(layers=2.0), "manifest.decoder.layers: want <class 'int'>, found 2.0"),
        (lambda m: m["image"].update(pad_to_square=0), "manifest.image.pad_to_square: want <class 'bool'>, found 0"),
        (lambda m: m["image"].update(mean=[1, 2]), "manifest.image.mean: want"),
        (lambda m: m["image"].update(resize=["exact", "1", 2]), "manifest.image.resize: want"),
        (lambda m: m["image"].update(rescale_factor="0.1"), "manifest.image.rescale_factor: want"),
        (lambda m: m["image"].update(rescale_factor=10**400), "int too large to convert to float"),
        (lambda m: m["chat"].update(conversation="chatml"), "manifest.chat.conversation: want typing.Literal["),
        (lambda m: m["chat"].update(stop_token_ids=2), "manifest.chat.stop_token_ids: want"),
        (lambda m: m["chat"].update(stop_token_ids=[2, "3"]), "manifest.chat.stop_token_ids[1]: want"),
        (lambda m: m["splice"].update(padding_side="left"), "manifest.splice: missing [], unknown ['padding_side']"),
        (lambda m: m["tools"].update(numpy=2), "manifest.tools['numpy']: want <class 'str'>, found 2"),
        (lambda m: m["files"].append({"path": "x"}), "manifest.files[2]: missing ['size', 'sha256'], unknown []"),
        (lambda m: m.update(files={}), "manifest.files: want"),
    ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path: Path, edit: Edit, message: str) -> None:
    text = error_of(edited(tmp_path, edit))
    assert text.startswith(f"{tmp_path / MANIFEST_NAME}: {message}")
    assert text.endswith("; export the bundle again")


def test_a_whole_number_passes_for_a_float(tmp_path: Path) -> None:
    manifest = read_manifest(edited(tmp_path, lambda m: m["image"].update(mean=[0, 1, 0.5])))
    assert manifest.image.mean == (0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "..", "../other", "deep/../../other", "..\\other", "deep\\x", "C:\\x", "", ".", "a\0b"],
)
def test_a_path_that_may_leave_the_bundle(tmp_path: Path, path: str) -> None:
    text = error_of(edited(tmp_path, lambda m: m["files"][0].update(path=path)))
    assert text == f"{tmp_path / MANIFEST_NAME}: file path {path!r} leaves the bundle; do not use this bundle"


def test_a_path_that_stands_twice(tmp_path: Path) -> None:
    assert "stands twice" in error_of(edited(tmp_path, lambda m: m["files"][0].update(path="deep/decoder.onnx")))
    twice = edited(tmp_path, lambda m: m.update(left_out=m["files"][:1]))
    assert "stands twice" in error_of(twice)


@pytest.mark.parametrize("path", ["deep//decoder.onnx", "./deep/decoder.onnx", "deep/", "a\nb", "a\ud800b", "a\u202eb"])
def test_a_path_that_is_not_plain(tmp_path: Path, path: str) -> None:
    assert "want a plain relative path" in error_of(edited(tmp_path, lambda m: m["files"][0].update(path=path)))


def test_entry() -> None:
    assert MANIFEST.entry("vision.onnx").size == 5
    with pytest.raises(BundleError, match=r"no file 'other' is listed"):
        MANIFEST.entry("other")


def test_describe_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / "x").write_bytes(content)
    assert describe_file(tmp_path, "x") == FileEntry("x", 1_280_000, hashlib.sha256(content).hexdigest())


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
whole = st.integers(0, 2**53)
size, side, level = st.integers(1, 2**31 - 1), st.integers(1, 2**16), st.integers(0, 255)
dtype = st.sampled_from(["float32", "float16"])
fraction = st.floats(allow_nan=False, allow_infinity=False)
rgb = st.none() | st.tuples(fraction, fraction, fraction)
recipes = st.builds(QuantizationRecipe, group_size=st.none() | size, weights=size)


def manifests(precisions: list[str], recipes: st.SearchStrategy[Any]) -> st.SearchStrategy[Manifest]:
    return st.builds(
        Manifest,
        format_version=st.just(FORMAT_VERSION),
        model=st.builds(ModelCard, text, text, text, text, text, st.sampled_from(precisions), whole),
        vision=st.builds(VisionShape, dtype, size, size, size, size),
        decoder=st.builds(DecoderShape, dtype, *[size] * 6),
        image=st.builds(
            ImageRecipe,
            pad_to_square=st.booleans(),
            pad_color=st.tuples(level, level, level),
            resize=st.none() | st.tuples(st.just("shortest_edge"), side) | st.tuples(st.just("exact"), side, side),
            resample=st.integers(0, 5),
            crop=st.none() | st.tuples(side, side),
            rescale_factor=st.none() | fraction,
            mean=rgb,
            std=rgb.filter(lambda value: value is None or 0 not in value),
        ),
        chat=st.builds(
            ChatRecipe,
            template=st.none() | text,
            conversation=st.sampled_from(["vicuna_v1", "llama_2", "mistral", "plain"]),
            placeholder=text,
            tokenization=st.sampled_from(["split", "added_token"]),
            image_token_id=st.none() | whole,
            bos_token_id=st.none() | whole,
            bos_token=st.none() | text,
            eos_token=st.none() | text,
            stop_token_ids=st.lists(whole, max_size=3).map(tuple),
            stop_strings=st.lists(text, max_size=3).map(tuple),
        ),
        splice=st.builds(SpliceRecipe, st.none() | whole),
        quantization=recipes,
        tools=st.dictionaries(text, text, max_size=3),
        files=st.lists(
            st.builds(FileEntry, st.from_regex(r"[a-z]{1,6}(/[a-z]{1,6})?", fullmatch=True), whole, text),
            max_size=3,
            unique_by=lambda entry: entry.path,
        ).map(tuple),
        left_out=st.just(()),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifest=manifests(["fp32", "fp16"], st.none()) | manifests(["int4", "int4-awq"], recipes))
def test_every_manifest_comes_back_as_it_was(tmp_path: Path, manifest: Manifest) -> None:
    assert read_manifest(write(tmp_path, manifest.to_json())) == manifest
