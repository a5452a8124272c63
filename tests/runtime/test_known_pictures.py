"""A picture that did not change is decoded once, and one that changed is seen."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_deploy.engines.errors import PictureError
from llava_deploy.engines.names import FEATURES_KEPT
from llava_deploy.runtime import Llava
from llava_deploy.runtime.context import KnownPictures
from llava_deploy.runtime.pictures import load_picture, picture_digest, pixels_digest, source_key, take_picture

LONG_AGO = 1_600_000_000


def drawn(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def llava(demo_bundle: Path) -> Llava:
    return Llava.load(demo_bundle, backend="onnxruntime", threads=1, max_len=256)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened with Pillow."""
    opened: list[str] = []
    open_image = Image.open

    def counting(file: Any, *arguments: Any, **options: Any) -> Image.Image:
        opened.append(type(file).__name__)
        return open_image(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", counting)
    return opened


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written just now were written long ago."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)


def features(llava: Llava, *sources: Any) -> np.ndarray:
    batch = llava.encoder.encode(["<image>" * len(sources)], [list(sources)], llava.max_len)
    return batch.tokens.inputs_embeds


def twice(once: np.ndarray) -> np.ndarray:
    """What two pictures give, from what one does: the first token is BOS."""
    return np.concatenate([once, once[:, 1:]], axis=1)


SOURCES: dict[str, Callable[[Path, bytes], Any]] = {
    "path": lambda path, content: path,
    "name": lambda path, content: str(path),
    "bytes": lambda path, content: content,
    "memory": lambda path, content: memoryview(bytearray(content)),
    "data URI": lambda path, content: "data:image/png;base64," + base64.b64encode(content).decode(),
}


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("kind", SOURCES)
def test_what_did_not_change_is_decoded_once(llava: Llava, tmp_path: Path, decoded: list[str], kind: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(as_png(drawn(len(kind))))
    wanted = features(llava, drawn(len(kind)))
    for _ in range(3):
        np.testing.assert_array_equal(features(llava, SOURCES[kind](path, path.read_bytes())), wanted)
    assert len(decoded) == 1


@pytest.mark.usefixtures("later")
def test_a_file_that_changed_is_seen(llava: Llava, tmp_path: Path) -> None:
    path = tmp_path / "picture.bmp"
    drawn(100).save(path)
    first = features(llava, path)
    drawn(101).save(path)  # of the same size
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    second = features(llava, path)
    np.testing.assert_array_equal(second, features(llava, drawn(101)))
    assert (first != second).any()
    path.unlink()
    with pytest.raises(PictureError, match="no such file"):
        features(llava, path)


def test_a_file_of_just_now_is_decoded_again(llava: Llava, tmp_path: Path, decoded: list[str]) -> None:
    """It may change once more without a change of its time."""
    path = tmp_path / "picture.png"
    path.write_bytes(as_png(drawn(7)))
    os.utime(path, (LONG_AGO, LONG_AGO))
    features(llava, path)
    features(llava, path)
    assert len(decoded) == 2


def test_pixels_in_memory_are_looked_at_every_time(llava: Llava) -> None:
    image = drawn(8)
    first = features(llava, image)
    image.putpixel((3, 3), (255, 0, 255))
    assert (features(llava, image) != first).any()
    assert source_key(image) is None
    assert source_key(np.asarray(image)) is None
    assert source_key(io.BytesIO(as_png(image))) is None
    assert source_key("no such file.png") is None
    assert source_key("a\0b") is None


def test_a_picture_that_was_taken_is_not_looked_at_again(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    image = drawn(9)
    taken = take_picture(image)
    assert take_picture(taken) is taken
    assert taken.digest == picture_digest(load_picture(taken))
    wanted = features(llava, image)

    def refuse(*_: Any) -> bytes:
        raise AssertionError("its pixels were looked at")

    monkeypatch.setattr("llava_deploy.runtime.pictures.picture_digest", refuse)
    np.testing.assert_array_equal(features(llava, taken, taken), twice(wanted))


def test_a_known_image_is_hashed_where_it_lies(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    image = drawn(11)
    wanted = features(llava, image)

    def refuse(*_: Any) -> Image.Image:
        raise AssertionError("it was copied")

    monkeypatch.setattr("llava_deploy.runtime.pictures.upright_rgb", refuse)
    np.testing.assert_array_equal(features(llava, image), wanted)


def turned(image: Image.Image) -> Image.Image:
    image.getexif()[0x0112] = 6
    return image


def keyed(image: Image.Image) -> Image.Image:
    image.info["transparency"] = (0, 0, 0)
    return image


@pytest.mark.parametrize(
    "change", [turned, keyed, lambda image: image.convert("L"), lambda image: image.convert("RGBA")]
)
def test_what_is_not_taken_as_it_is_has_no_digest_before_it_is(change: Callable[[Image.Image], Image.Image]) -> None:
    image = drawn(12)
    assert pixels_digest(image) == picture_digest(load_picture(image))
    assert pixels_digest(change(image)) is None


def test_only_images_in_memory_have_a_digest_of_pixels(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(as_png(drawn(13)))
    with Image.open(path) as opened:
        assert pixels_digest(opened) is None
    assert pixels_digest(path) is None
    assert pixels_digest(Image.new("RGB", (0, 3))) is None


@pytest.mark.parametrize("size", [(1, 1), (7, 100_000), (100_000, 7), (1999, 701)])
def test_the_digest_is_of_all_pixels_in_order(size: tuple[int, int]) -> None:
    image = drawn(14, size)
    whole = hashlib.sha256(f"RGB {size[0]} {size[1]} ".encode() + image.tobytes()).digest()
    assert picture_digest(image) == whole[:16]


@pytest.mark.usefixtures("later")
def test_features_that_are_gone_are_made_again(llava: Llava, tmp_path: Path, decoded: list[str]) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(as_png(drawn(10)))
    wanted = features(llava, path)
    for seed in range(FEATURES_KEPT):
        features(llava, drawn(1000 + seed))
    np.testing.assert_array_equal(features(llava, path, path), twice(wanted))
    assert len(decoded) == 2


def test_few_digests_are_kept() -> None:
    known = KnownPictures()
    for number in range(1000):
        known.put(number, b"digest")
        assert known.get(0) == b"digest"
    assert sum(known.get(number) is not None for number in range(1000)) == 4 * FEATURES_KEPT
