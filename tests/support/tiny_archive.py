"""A bundle of a few kilobytes with everything that one can hold, and archives of it that are wrong in one place."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import zstandard

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.engine_manifest import (
    ENGINE_FORMAT_VERSION,
    ENGINES,
    EngineKey,
    EngineManifest,
    source_digest,
)
from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.engines.goldens import GOLDENS_FILE, Golden, GoldenMessage, GoldenPart, Goldens
from llava_deploy.engines.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    ChatRecipe,
    FileEntry,
    ImageRecipe,
    Manifest,
    ModelCard,
    SpliceRecipe,
    describe_file,
)
from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.layout import END, member_header, padded
from llava_deploy.runtime.archive.listing import LISTING_NAME, Listing, listing_of
from llava_deploy.runtime.archive.pack import pack

ENGINE = "onnxruntime-9.9.9-cpu"
EVERYTHING = PackOptions(engines=(ENGINE,))
FILES = {
    "decoder.onnx": b"a graph" * 9,
    "decoder.onnx.data": bytes(range(256)) * 4,
    "embed_tokens.npy": b"rows" * 128,  # a multiple of a block
    "tokenizer.json": b"{}",
    "vision.onnx": b"",
    "vision.onnx.data": b"\0" * 100,
}
GOLDENS = Goldens(
    format_version=1,
    tools={"torch": "2.13.0"},
    decoder_weights="checkpoint",
    goldens=(Golden("text", (GoldenMessage("user", (GoldenPart("hi"),)),), (), "USER: hi", (1, 5), (7, 2)),),
)


def manifest_of(files: tuple[FileEntry, ...]) -> Manifest:
    """A manifest of tiny shapes."""
    return Manifest(
        format_version=FORMAT_VERSION,
        model=ModelCard("tiny", "llava-hf", "clip", "mlp2x_gelu", "llama", "fp32", 1234),
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
        quantization=None,
        tools={"numpy": "2.0"},
        files=files,
        left_out=(),
    )


def write_bundle(bundle: Path, files: Mapping[str, bytes] | None = None) -> Path:
    """A bundle with goldens and an engine, as far as an archive looks at them; ``files`` beside or instead of FILES."""
    contents = {**FILES, **({} if files is None else files), GOLDENS_FILE: GOLDENS.to_json().encode()}
    contents["goldens/text/logits.npy"] = _npy(np.zeros((2, 11), np.float32))
    contents["goldens/text/inputs_embeds.npy"] = _npy(np.zeros((2, 8), np.float32))
    for path, content in contents.items():
        (bundle / path).parent.mkdir(parents=True, exist_ok=True)
        (bundle / path).write_bytes(content)
    manifest = manifest_of(tuple(describe_file(bundle, path) for path in sorted(contents)))
    (bundle / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    engine = bundle / ENGINES / ENGINE
    engine.mkdir(parents=True)
    for name in ("vision.onnx", "decoder.onnx"):
        (engine / name).write_bytes(name.encode() * 5)
    key = EngineKey("onnxruntime", "9.9.9", "cpu", source_digest(manifest), None, None)
    built = (describe_file(engine, "vision.onnx"), describe_file(engine, "decoder.onnx"))
    text = EngineManifest(ENGINE_FORMAT_VERSION, key, {"onnx-ir": "1"}, built).to_json()
    (engine / "engine.json").write_text(text, encoding="utf-8")
    return bundle


def packed(bundle: Path, options: PackOptions = EVERYTHING) -> bytes:
    """The bytes of a bundle's archive."""
    output = bundle.parent / "packed.lvd"
    pack(bundle, output, options, replace=output.exists())
    return output.read_bytes()


def not_packed(bundle: Path, options: PackOptions = EVERYTHING) -> str:
    """Why a bundle is not packed; nothing is left behind."""
    beside = sorted(bundle.parent.iterdir())
    with pytest.raises(LlavaDeployError) as raised:
        pack(bundle, bundle.parent / "new.lvd", options)
    assert sorted(bundle.parent.iterdir()) == beside
    return str(raised.value)


def tree(bundle: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {p.relative_to(bundle).as_posix(): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


def tar_in(archive: bytes) -> bytes:
    """The content of an archive's frame."""
    return zstandard.ZstdDecompressor().decompress(archive)


def framed(tar: bytes, *, checksum: bool = True, size: bool = True, window_log: int = 20) -> bytes:
    """Any content in a frame."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window_log, write_checksum=checksum, write_content_size=size
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(tar)


def with_header(
    tar: bytes, path: str, *, name: str | None = None, kind: bytes = b"0", link: str = "", mode: int = 0o644
) -> bytes:
    """A tar whose header of the member ``path`` is another one, of a right checksum and the same size."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        at = opened.getmember(path).offset
    block = bytearray(tar[at : at + 512])
    block[:100] = (path if name is None else name).encode().ljust(100, b"\0")
    block[100:108] = b"%07o\0" % mode
    block[156:157] = kind
    block[157:257] = link.encode().ljust(100, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return tar[:at] + bytes(block) + tar[at + 512 :]


def members_of(tar: bytes) -> dict[str, bytes]:
    """Members but the listing, by path."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        contents = {member.name: opened.extractfile(member) for member in opened.getmembers()}
        return {name: file.read() for name, file in contents.items() if file is not None and name != LISTING_NAME}


def entries_of(members: Mapping[str, bytes]) -> tuple[FileEntry, ...]:
    """What a listing says of members."""
    return tuple(FileEntry(path, len(c), hashlib.sha256(c).hexdigest()) for path, c in members.items())


def tar_of(members: Mapping[str, bytes], listing: bytes | None = None) -> bytes:
    """A tar of any members; its listing is right for them, in their order, unless it is given."""
    if listing is None:
        listing = listing_for(members).to_bytes()
    everything = {LISTING_NAME: listing, **members}
    return b"".join(member_header(path, len(c)) + padded(c) for path, c in everything.items()) + END


def listing_for(members: Mapping[str, bytes]) -> Listing:
    """The listing of members in their order."""
    entries = entries_of(members)
    return dataclasses.replace(listing_of(manifest_of(()), entries), members=entries)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
