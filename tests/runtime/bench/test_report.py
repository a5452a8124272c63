"""A result on the disk and back, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.errors import InputError
from llava_deploy.runtime.bench.report import SCHEMA_VERSION, Report, Samples, read_report


def test_a_result_is_read_as_it_was_written(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(report.to_json(), encoding="utf-8")
    assert read_report(path) == report
    plain = json.loads(report.to_json())
    assert plain["schema"] == SCHEMA_VERSION
    assert plain["first_token"]["total"]["each"] == list(report.first_token.total.each)


def test_samples() -> None:
    assert Samples.of([3.0, 1.0, 2.0, 9.0]) == Samples(2.5, 1.0, 9.0, (3.0, 1.0, 2.0, 9.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON, or only a part of it"),
        ("[" * 100_000, "not JSON, or only a part of it"),
        ("\xff", "of schema 1, found none"),
        ('"text"', "of schema 1, found none"),
        ("[1]", "of schema 1, found none"),
        ("{}", "of schema 1, found none"),
        ('{"schema": 2}', "of schema 1, found 2"),
        ('{"schema": true}', "of schema 1, found True"),
        ('{"schema": 1}', "missing ["),
    ],
)
def test_what_is_no_result(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(text) if text == "\xff" else text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_report(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "llava-deploy bench" in str(caught.value)


def test_a_truncated_result_and_one_that_is_not_text(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    path.write_text(report.to_json()[:-500], encoding="utf-8")
    with pytest.raises(InputError, match="only a part of it"):
        read_report(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(InputError, match="not JSON"):
        read_report(path)


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "nowhere.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=said):
            read_report(path)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("decode", 0, "share"), "much", "result.decode[0].share"),
        (("decode", 0, "share"), float("nan"), "result.decode[0].share"),
        (("machine", "memory"), 1.5, "result.machine.memory"),
        (("backend", "name"), "abacus", "result.backend.name"),
        (("options", "rounds"), 0, "rounds"),
        (("bandwidth", "kind"), "guess", "result.bandwidth.kind"),
        (("first_token", "extra"), 1, "unknown ['extra']"),
    ],
)
def test_values_that_do_not_fit_are_named(
    report: Report, tmp_path: Path, place: tuple[Any, ...], value: object, said: str
) -> None:
    plain = json.loads(report.to_json())
    *way, last = place
    inner = plain
    for step in way:
        inner = inner[step]
    inner[last] = value
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_report(path)
    assert said in str(caught.value)
