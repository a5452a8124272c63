"""Pictures of every kind that the runtime takes, drawn here; thousands of ways to break them; and bombs."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, features

BYTES_EACH = 400
"""Mutants of each seed by its bytes; what is said of a format's structure comes on top."""

STRUCTURED_EACH = 300
NASTY = (0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
SIGNATURE = b"\x89PNG\r\n\x1a\n"

Mutator = Callable[[random.Random, bytes], bytes]


def encode(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, interlace: int, raw: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))
    return SIGNATURE + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def interlaced() -> bytes:
    """8 x 8, grey, in the seven passes of Adam7."""
    passes = ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))  # columns, rows
    raw = b"".join((b"\0" + bytes(range(columns))) * rows for columns, rows in passes)
    return png(8, 8, 8, 0, 1, raw)


def seeds() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    rgba = Image.fromarray(rng.integers(0, 256, (20, 24, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (20, 24), dtype=np.uint16))
    palette, grey, cmyk = rgb.quantize(16), rgb.convert("L"), rgb.convert("CMYK")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    texts = (chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 99)), chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"y")))
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(b"\0" * 300))
    found = {
        "png": encode(rgb, "PNG", exif=exif),
        "png rgba": encode(rgba, "PNG"),
        "png palette": encode(palette, "PNG", transparency=3),
        "png 16": encode(deep, "PNG"),
        "png one bit": encode(grey.convert("1"), "PNG"),
        "png interlaced": interlaced(),
        "png chunks": png(4, 2, 8, 2, 0, (b"\0" + bytes(12)) * 2, *texts, profile),
        "apng": encode(rgb, "PNG", **frames),
        "jpeg": encode(rgb, "JPEG", exif=exif),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg cmyk": encode(cmyk, "JPEG"),
        "webp": encode(rgb, "WEBP", exif=exif),
        "webp lossless": encode(rgba, "WEBP", lossless=True),
        "webp animated": encode(rgb, "WEBP", **frames),
        "gif": encode(palette, "GIF", transparency=1),
        "gif animated": encode(rgb, "GIF", **frames),
        "bmp": encode(rgb, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "ppm": encode(rgb, "PPM"),
        "pgm 16": encode(deep, "PPM"),
        "pbm": encode(grey.convert("1"), "PPM"),
        "ppm text": b"P3\n2 2\n255\n1 2 3 4 5 6 7 8 9 10 11 12\n",
        "tiff": encode(rgb, "TIFF", exif=exif),
        "tiff lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(rgba, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(rgb, "TIFF", compression="jpeg"),
        "tiff fax": encode(grey.convert("1"), "TIFF", compression="group4"),
        "tiff cmyk": encode(cmyk, "TIFF"),
        "tiff 16": encode(deep, "TIFF"),
        "tiff float": encode(Image.fromarray(rng.random((5, 4), np.float32)), "TIFF"),
        "tiff pages": encode(rgb, "TIFF", **frames),
        "jpeg2000": encode(rgb, "JPEG2000"),
        "jpeg2000 palette": encode(grey, "JPEG2000", no_jp2=True),
    }
    if features.check("avif"):
        found["avif"] = encode(rgb, "AVIF", exif=exif)
    return found


SEEDS = seeds()


def flip(draw: random.Random, data: bytes) -> bytes:
    garbled = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        garbled[draw.randrange(len(garbled))] ^= 1 << draw.randrange(8)
    return bytes(garbled)


def overwrite(draw: random.Random, data: bytes) -> bytes:
    """A number of 1, 2 or 4 bytes becomes one that programs stumble over; mostly near the start, where headers are."""
    width = draw.choice((1, 2, 4))
    at = draw.randrange(max(1, min(len(data), draw.choice((40, 200, len(data)))) - width))
    number = (draw.choice(NASTY) & ((1 << 8 * width) - 1)).to_bytes(width, draw.choice(("big", "little")))
    return data[:at] + number + data[at + width :]


def truncate(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def cut(draw: random.Random, data: bytes) -> bytes:
    begin = draw.randrange(len(data))
    return data[:begin] + data[begin + draw.randrange(1, 40) :]


def repeat(draw: random.Random, data: bytes) -> bytes:
    begin = draw.randrange(len(data))
    return data[:begin] + data[begin : begin + draw.randrange(1, 200)] * draw.choice((2, 3, 50)) + data[begin:]


def splice(draw: random.Random, data: bytes) -> bytes:
    other = draw.choice(list(SEEDS.values()))
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], len(SIGNATURE)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    return found


def in_chunks(draw: random.Random, data: bytes) -> bytes:
    """A PNG whose chunks are changed, doubled, dropped or exchanged, with sums that are right; some lengths lie."""
    chunks = png_chunks(data)
    at = draw.randrange(len(chunks))
    kind, body = chunks[at]
    change = draw.randrange(7)
    if change <= 2 and body:
        chunks[at] = kind, draw.choice((flip, overwrite, cut))(draw, body)
    elif change == 3:
        chunks.insert(draw.randrange(len(chunks) + 1), (kind, body))
    elif change == 4:
        del chunks[at]
    elif change == 5:
        draw.shuffle(chunks)
    else:
        names = b"PLTE tRNS iCCP zTXt iTXt tEXt eXIf acTL fcTL fdAT gAMA pHYs".split()
        chunks.insert(draw.randrange(len(chunks) + 1), (draw.choice(names), draw.randbytes(draw.randrange(40))))
    whole = SIGNATURE + b"".join(chunk(*each) for each in chunks)
    return overwrite(draw, whole) if draw.random() < 0.1 else whole


def in_segments(draw: random.Random, data: bytes) -> bytes:
    """A JPEG one of whose markers' lengths, sizes or tables is changed."""
    markers = [at for at in range(len(data) - 9) if data[at] == 0xFF and 0xC0 <= data[at + 1] <= 0xFE]
    at = draw.choice(markers) + draw.randrange(2, 9)
    return data[:at] + struct.pack(">H", draw.choice(NASTY) & 0xFFFF) + data[at + 2 :]


def in_directory(draw: random.Random, data: bytes) -> bytes:
    """A TIFF with an entry of its directory changed, or a directory that goes on where it began."""
    first = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[first : first + 2], "little")
    after = first + 2 + 12 * count
    if draw.random() < 0.15:
        place, value = after, draw.choice((first, first + 12, 4, 8, len(data) - 2))
    else:
        place, value = first + 2 + 12 * draw.randrange(count) + 4 * draw.randrange(3), draw.choice((first, *NASTY))
    return data[:place] + struct.pack("<I", value) + data[place + 4 :]


STRUCTURED: dict[str, Mutator] = {"png": in_chunks, "apng": in_chunks, "jpeg": in_segments, "tiff": in_directory}
PLAIN: tuple[Mutator, ...] = (flip, flip, overwrite, overwrite, truncate, cut, repeat, splice)


def mutants(name: str) -> list[bytes]:
    draw = random.Random(name)
    data = SEEDS[name]
    structured = STRUCTURED.get(name.partition(" ")[0])
    made = [draw.choice(PLAIN)(draw, data) for _ in range(BYTES_EACH)]
    for _ in range(0 if structured is None else STRUCTURED_EACH):
        mutant = structured(draw, data)
        made.append(draw.choice(PLAIN)(draw, mutant) if draw.random() < 0.1 and mutant else mutant)
    return made


def zeros(gibibytes: int) -> bytes:
    """A zlib stream, without its end, of that many zeros: its second block stands for a mebibyte and is repeated."""
    packer = zlib.compressobj(9)
    blocks = [packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)]
    return blocks[0] + blocks[1] * (1024 * gibibytes - 1)


def webp_canvas(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    frame = b"ANMF" + struct.pack("<I", 16) + bytes(6) + bytes(6) + bytes(4)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes((2, 0, 0, 0)) + size * 2 + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    return b"RIFF" + struct.pack("<I", len(body + frame)) + body + frame


def tiff(width: int, height: int) -> bytes:
    """Its only strip is a deflate stream of gibibytes."""
    strip = zeros(2)
    entries = ((256, width), (257, height), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (278, height))
    entries += ((279, len(strip)),)
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(entries)) + directory + bytes(4)


def bombs() -> dict[str, bytes]:
    """Little to read and much to have; by their headers, or within chunks that a header does not tell of."""
    row = b"\0" + bytes(24)
    stream = zeros(2)
    jpeg = bytearray(SEEDS["jpeg grey"])
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = b"\xff\xff\xff\xff"
    bmp = bytearray(SEEDS["bmp"])
    bmp[18:26] = struct.pack("<ii", 60_000, -60_000)
    gif = bytearray(SEEDS["gif"])
    gif[6:10] = b"\xff\xff\xff\xff"
    return {
        "too large: png": png(100_000, 100_000, 8, 2, 0, b""),
        "too large: png rows": png(24, 4_194_836, 16, 0, 0, bytes(49 * 20)),
        "too large: jpeg": bytes(jpeg),
        "too large: bmp": bytes(bmp),
        "too large: gif": bytes(gif),
        "too large: ppm": b"P6\n99999 99999\n255\n",
        "too large: tiff": tiff(1 << 20, 1 << 20),
        "webp canvas": webp_canvas(1 << 14),
        "tiff strip": tiff(8, 8),
        "png data": SIGNATURE + png(8, 8, 8, 2, 0, row * 8)[8:33] + chunk(b"IDAT", stream) + chunk(b"IEND", b""),
        "png zTXt": png(8, 8, 8, 2, 0, row * 8, chunk(b"zTXt", b"k\0\0" + stream)),
        "png iTXt": png(8, 8, 8, 2, 0, row * 8, chunk(b"iTXt", b"k\0\1\0\0\0" + stream)),
        "png iCCP": png(8, 8, 8, 2, 0, row * 8, chunk(b"iCCP", b"p\0\0" + stream)),
    }
