"""The JSON of a report: what was written is read, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.errors import InputError
from llava_deploy.runtime.report.record import Record, read_record


@pytest.mark.parametrize("which", ["record", "failed"])
def test_what_was_written_is_read(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    record: Record = request.getfixturevalue(which)
    path = tmp_path / "report.json"
    path.write_text(record.to_json(), encoding="utf-8")
    assert read_record(path) == record
    assert read_record(path).to_json() == record.to_json()


def set_at(*where: Any, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in where[:-1]:
            data = data[key]
        data[where[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_at("schema", value=2), "of schema 1, found 2"),
        (set_at("schema", value=True), "of schema 1, found True"),
        (set_at("bundles", value=[]), "want bundles of different labels"),
        (set_at("bundles", 1, "card", "label", value="fp32"), "want bundles of different labels"),
        (set_at("bundles", 0, "verdict", "decision", value="perhaps"), "verdict.decision"),
        (set_at("bundles", 0, "accuracy", "lost", value=1.5), "accuracy.lost"),
        (set_at("bundles", 0, "speed", "options", "rounds", value=0), "rounds"),
        (set_at("bundles", 0, "extra", value=0), "unknown ['extra']"),
        (set_at("seconds", value="long"), "seconds"),
    ],
)
def test_another_form_is_refused_by_name(
    change: Callable[[Any], None], said: str, record: Record, tmp_path: Path
) -> None:
    data = json.loads(record.to_json())
    change(data)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_record(path)
    assert said in str(caught.value)
    assert "llava-deploy report" in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "found none"), ("[" * 100_000, "not JSON")])
def test_what_is_no_report(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_record(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_record(tmp_path / "nowhere.json")
