"""Every kind of picture comes out as the same upright RGB pixels, and what is no picture is refused in one line."""

import base64
import io
import os
import random
import struct
import tempfile
import urllib.parse
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_deploy.engines.errors import PictureError
from llava_deploy.runtime.pictures import load_picture, picture_digest
from llava_deploy.runtime.pixels import MAX_PIXELS


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encode(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def same(image, pixels):
    return image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)


def refused(source, *parts):
    with pytest.raises(PictureError) as caught:
        load_picture(source)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_every_kind_of_source_gives_the_same_pixels(tmp_path, pixels):
    data = encode(Image.fromarray(pixels))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    consumed = io.BytesIO(data)
    consumed.read()
    plain_uri = "data:image/png," + urllib.parse.quote_from_bytes(data)
    encoded = base64.b64encode(data).decode()
    wrapped_uri = "DATA:image/png;base64,\n" + encoded[:20] + "\n " + encoded[20:]
    sources = [path, str(path), data, bytearray(data), memoryview(data), consumed]
    sources += [Image.fromarray(pixels), pixels, pixels[:, ::-1][:, ::-1], plain_uri, wrapped_uri]
    sources += ["data:;base64," + encoded.replace("+", "%2B")]
    for source in sources:
        assert same(load_picture(source), pixels), source
    with path.open("rb") as file, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(data)
        assert same(load_picture(file), pixels)
        assert same(load_picture(spooled), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(pixels), exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert same(load_picture(data), expected)
    assert same(load_picture(Image.open(io.BytesIO(data))), expected)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_unknown_orientations_mean_upright(pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert same(load_picture(encode(Image.fromarray(pixels), exif=exif)), pixels)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_picture_as_it_is_stored(pixels):
    assert same(load_picture(encode(Image.fromarray(pixels), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")), pixels)


def transparent_pictures():
    rng = np.random.default_rng(1)
    rgba = Image.fromarray(rng.integers(0, 256, (6, 8, 4), dtype=np.uint8))
    palette = Image.fromarray(rng.integers(0, 4, (6, 8), dtype=np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    by_index, by_table, opaque = palette.copy(), palette.copy(), palette
    by_index.info["transparency"] = 2
    by_table.info["transparency"] = bytes([0, 128, 255, 7])
    key = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    key.info["transparency"] = (1, 2, 3)
    return {
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "palette index": by_index,
        "palette table": by_table,
        "palette": opaque,
        "colour key": key,
    }


@pytest.mark.parametrize("kind", transparent_pictures())
def test_transparency_is_laid_over_white_as_the_processor_does(kind):
    image = transparent_pictures()[kind]
    before = image.tobytes()
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    expected = np.moveaxis(processor(image, return_tensors="np")["pixel_values"][0], 0, -1)
    assert same(load_picture(image), expected)
    assert image.tobytes() == before
    assert same(load_picture(encode(image)), expected)


def test_premultiplied_transparency_is_laid_over_white_too():
    straight = Image.new("RGBA", (2, 1), (200, 100, 0, 128))
    assert same(load_picture(straight.convert("RGBa")), np.asarray(load_picture(straight)))


def test_a_fully_transparent_picture_is_white():
    assert same(load_picture(np.zeros((2, 3, 4), np.uint8)), np.full((2, 3, 3), 255, np.uint8))
    assert same(load_picture(Image.new("La", (3, 2), (0, 0))), np.full((2, 3, 3), 255, np.uint8))


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    big_endian = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    pgm = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    for source in (
        values,
        values[..., None],
        Image.fromarray(values),
        encode(Image.fromarray(values)),
        big_endian,
        pgm,
    ):
        assert same(load_picture(source), expected)
    refused(Image.new("I", (2, 2), 70000), "0..65535", "70000")


def test_16_bit_colour_png_keeps_its_high_bytes():
    row = struct.pack(">6H", 0x1234, 0x8000, 0xFFFF, 0, 0x00FF, 0xFF00)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    )
    got = np.asarray(load_picture(png)).ravel().astype(int)
    assert np.abs(got - np.array([0x12, 0x80, 0xFF, 0, 1, 0xFF])).max() <= 1


def test_grey_cmyk_one_bit_and_float():
    grey = np.array([[0, 100, 255]], np.uint8)
    three = np.repeat(grey[..., None], 3, axis=2)
    assert same(load_picture(encode(Image.fromarray(grey))), three)
    assert same(load_picture(grey), three)
    assert same(load_picture(grey[..., None]), three)
    assert same(load_picture(grey.astype(np.float32) / 255), three)
    assert same(load_picture(Image.fromarray(grey.astype(np.float32) / 255)), three)
    assert same(load_picture(three.astype(np.float64) / 255), three)
    one_bit = Image.fromarray(grey > 50)
    assert same(load_picture(one_bit), np.repeat(((grey > 50) * 255).astype(np.uint8)[..., None], 3, axis=2))
    cmyk = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    data = encode(cmyk, "TIFF")
    assert same(load_picture(data), np.asarray(cmyk.convert("RGB")))
    assert np.asarray(load_picture(encode(cmyk, "JPEG")))[0, 0].tolist() == [0, 255, 255]


def test_the_first_frame_of_an_animation_is_taken(pixels):
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    assert same(load_picture(encode(frames[0], "PNG", save_all=True, append_images=frames[1:])), pixels)


def png_header(width, height):
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + data + struct.pack(">I", zlib.crc32(b"IHDR" + data))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10) + b"IDAT" + b"x" * 20


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None, 10**12])
def test_a_picture_too_large_by_its_header_is_refused_before_decoding(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    refused(png_header(100_000, 100_000), "too large", "pixels")
    width = MAX_PIXELS // 10_000 + 1
    refused(png_header(width, 10_000), "too large")
    monkeypatch.undo()


def test_a_broad_but_allowed_picture_raises_no_warning_and_changes_no_setting(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns from here to twice as many
    data = encode(Image.new("RGB", (50, 30)))
    settings = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filters = warnings.filters[:]
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(data))
        assert load_picture(data).size == (50, 30)
        assert warnings.filters == filters
    assert settings == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize(
    ("fmt", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("BMP", {}), ("WEBP", {})],
)
def test_a_truncated_picture_is_refused_or_whole_never_partial(fmt, options):
    noise = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), fmt, **options)
    whole = load_picture(data).tobytes()
    refusals = 0
    for length in random.Random(0).sample(range(len(data)), 60):
        try:
            got = load_picture(data[:length])
        except PictureError:
            refusals += 1
        else:
            assert got.tobytes() == whole
    assert refusals >= 55


def test_garbled_pictures_raise_nothing_but_picture_errors():
    noise = np.random.default_rng(3).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    draw = random.Random(0)
    for fmt in ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "JPEG2000"):
        data = encode(Image.fromarray(noise), fmt)
        for _ in range(60):
            garbled = bytearray(data)
            for _ in range(draw.randrange(1, 6)):
                garbled[draw.randrange(len(garbled))] = draw.randrange(256)
            try:
                load_picture(bytes(garbled))
            except PictureError:
                continue


def test_what_is_no_picture_is_refused(tmp_path):
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    os.mkfifo(tmp_path / "pipe")
    refused(b"", "empty")
    refused(empty, "empty.png", "empty")
    refused(text, "text.jpg", "not a picture")
    refused(tmp_path / "missing.png", "missing.png", "no such file")
    refused(tmp_path, "a directory")
    refused(tmp_path / "pipe", "not a regular file")
    refused("bad\0name.png", "cannot be read")
    refused("x" * 5000, "cannot be read")
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture")
    refused(io.StringIO("text"), "want bytes", "'rb'")
    closed = io.BytesIO(b"x")
    closed.close()
    refused(closed, "cannot be read")
    refused(7, "found int")
    refused(None, "found NoneType")


@pytest.mark.parametrize(
    "url", ["http://example.org/a.png", "HTTPS://example.org/a.png", "s3://b/a.png", "file:///a.png"]
)
def test_nothing_is_fetched(url):
    refused(url, "URL", "nothing is fetched")


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,@@@@", "not base64"),
        ("data:image/png;base64,abc", "not base64"),
        ("data:,hello%20world", "not a picture"),
    ],
)
def test_data_uris_that_hold_no_picture(uri, part):
    refused(uri, part, "data URI")


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((3, 4, 2), np.uint8), "channels last"),
        (np.zeros((1, 3, 4, 3), np.uint8), "one by one"),
        (np.zeros(5, np.uint8), "[height, width]"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4), np.int64), "want uint8"),
        (np.zeros((4, 4), bool), "want uint8"),
        (np.full((4, 4), 1.5), "0..1"),
        (np.full((4, 4), -0.1, np.float32), "0..1"),
        (np.full((4, 4), np.nan), "0..1"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "too large"),
    ],
)
def test_arrays_that_are_no_picture(array, part):
    refused(array, part)


def test_the_digest_tells_pixels_and_size_apart(pixels):
    image = Image.fromarray(pixels)
    changed = pixels.copy()
    changed[4, 6, 2] ^= 1
    assert picture_digest(image) == picture_digest(load_picture(encode(image)))
    assert len(picture_digest(image)) == 16
    digests = {picture_digest(Image.fromarray(p)) for p in (pixels, changed, pixels.reshape(7, 5, 3), pixels[:4])}
    assert len(digests) == 4
    assert picture_digest(Image.new("RGB", (1, 1))).hex() == "b1570eaa3407415a94837ad8b5399661"


def test_a_long_path_is_named_by_its_beginning_and_its_end(tmp_path):
    directory = tmp_path / ("x" * 100) / ("y" * 100)
    directory.mkdir(parents=True)
    refused(directory / "missing.png", "missing.png", "…", str(tmp_path)[:10])
    uri = "data:image/png;base64," + "A" * 5000
    with pytest.raises(PictureError) as caught:
        load_picture(uri)
    assert len(str(caught.value)) < 300


def test_a_png_that_cannot_hold_its_pixels_is_refused_before_decoding(monkeypatch):
    whole = encode(Image.new("1", (4000, 4000)))
    assert load_picture(whole).size == (4000, 4000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    refused(png_header(12_000, 12_000), "too large for the", "12000 x 12000")


def test_a_data_uri_with_half_a_character_is_refused():
    refused("data:image/png,\ud83d", "not a picture")
    refused("data:image/png;base64,AAAA\ud83d", "not base64")
