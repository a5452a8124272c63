"""Results that are not whole leave what was there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llava_deploy.runtime.bench.whole_file import whole_file


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_earlier_result_stays_where_the_new_one_is_not_whole(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "before.json"
    path.write_text("earlier")
    with pytest.raises(type(error)), whole_file(path) as place:
        place.write_text("ne")
        raise error
    assert path.read_text() == "earlier"
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.write_text("earlier")
    link.symlink_to(path)
    with whole_file(link) as place:
        place.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [path, link]


def test_a_device_is_written_to(tmp_path: Path) -> None:
    with whole_file(Path(os.devnull)) as place:
        place.write_text("new")
    assert not Path(os.devnull).is_file()
