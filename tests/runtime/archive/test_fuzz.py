"""Ten thousand archives, wrong in random places: each is refused in words, or gives what it lists and no more."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import mutated_bytes, mutated_json, peak_memory, watched
from tiny_archive import framed, listing_for, members_of, tar_in, tar_of, tree, write_bundle

from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.engines.manifest import MANIFEST_NAME
from llava_deploy.runtime.archive.unpack import unpack

Make = Callable[[random.Random, bytes], bytes]


def of_the_frame(numbers: random.Random, archive: bytes) -> bytes:
    return mutated_bytes(numbers, archive)


def of_the_tar(numbers: random.Random, archive: bytes) -> bytes:
    return framed(mutated_bytes(numbers, tar_in(archive)))


def of_the_tar_at_a_border(numbers: random.Random, archive: bytes) -> bytes:
    """Few bytes in a header or at its ends, the checksum of the header put right at times."""
    tar = bytearray(tar_in(archive))
    at = 512 * numbers.randrange(len(tar) // 512)
    for _ in range(numbers.choice((1, 1, 2))):
        place = at + numbers.choice((0, 1, 99, 100, 107, 124, 134, 135, 136, 156, 157, 257, 263, 345, 511))
        tar[place] = numbers.choice((0, 32, 46, 47, 48, 49, 50, 53, 55, 120, 128, 255))
    block = tar[at : at + 512]
    if numbers.random() < 0.7:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        tar[at : at + 512] = block
    return framed(bytes(tar))


def of_the_listing(numbers: random.Random, archive: bytes) -> bytes:
    members = members_of(tar_in(archive))
    listing = mutated_json(numbers, json.loads(listing_for(members).to_bytes()))
    if numbers.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):  # in its own form, so that its meaning alone is wrong
            listing = (json.dumps(json.loads(listing), indent=1) + "\n").encode("ascii")
    return framed(tar_of(members, listing))


def of_a_manifest(numbers: random.Random, archive: bytes) -> bytes:
    """The listing agrees with it: what is wrong is its meaning."""
    members = members_of(tar_in(archive))
    path = numbers.choice([MANIFEST_NAME, MANIFEST_NAME, *(path for path in members if path.endswith("engine.json"))])
    members[path] = mutated_json(numbers, json.loads(members[path]))
    return framed(tar_of(members))


def of_the_members(numbers: random.Random, archive: bytes) -> bytes:
    """Members doubled, dropped, renamed or changed, and a listing that says so."""
    members = members_of(tar_in(archive))
    path = numbers.choice([*members])
    content = members.pop(path) if numbers.random() < 0.8 else members[path]
    name = numbers.choice(
        (path, f"{path}/x", f"../{path}", f"/{path}", "zz", "engines/a", "engines/b/engine.json", ".")
    )
    members[name] = mutated_bytes(numbers, content) if numbers.random() < 0.5 else content
    rest = sorted(members.keys() - {MANIFEST_NAME})
    order = [MANIFEST_NAME, *rest] if MANIFEST_NAME in members else rest
    return framed(tar_of({p: members[p] for p in order}))


OF_THE_WHOLE = (of_the_frame, of_the_tar, of_the_tar_at_a_border)
"""The listing's sha256 stay as they were, so what is taken is the bundle as it was."""


@pytest.mark.parametrize(
    ("make", "count", "deepest"),
    [
        (of_the_frame, 3500, "damaged"),
        (of_the_tar, 3000, "it was altered"),
        (of_the_tar_at_a_border, 1500, "whose header is another"),
        (of_the_listing, 1200, "accounts for"),
        (of_a_manifest, 800, "manifest.json: manifest."),
        (of_the_members, 800, "lacks "),
    ],
)
def test_archives(
    make: Make, count: int, deepest: str, archive_bytes: bytes, quick_place: Path, tmp_path: Path
) -> None:
    bundle = tree(write_bundle(tmp_path / "bundle"))
    place = quick_place / "deep" / "er"
    place.mkdir(parents=True)
    numbers = random.Random(make.__name__)
    before, said = peak_memory(), Counter[str]()
    for _ in range(count):
        content = make(numbers, archive_bytes)
        (place / "model.lvd").write_bytes(content)
        message = None
        with watched():
            try:
                unpack(place / "model.lvd", place / "again")
            except LlavaDeployError as error:
                message = str(error)
        if message is None:
            assert tree(place / "again") == (bundle if make in OF_THE_WHOLE else members_of(tar_in(content)))
            shutil.rmtree(place / "again")
        else:
            assert message.isprintable()
            said[message] += 1
        assert os.listdir(place) == ["model.lvd"], content.hex()  # noqa: PTH208 (ten thousand times)
    assert [*quick_place.rglob("*")] == [quick_place / "deep", place, place / "model.lvd"]
    assert peak_memory() - before < 200 << 20
    # That what is deep inside is reached, and that one message is not all that there is.
    assert len(said) > 20
    assert any(deepest in text for text in said), said.most_common(5)
