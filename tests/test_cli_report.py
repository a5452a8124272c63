"""``llava-deploy report`` as people and scripts meet it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llava_deploy.cli import main
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.questions import drawn_questions
from llava_deploy.exporter.goldens.record import record as record_goldens
from llava_deploy.runtime.bench import bandwidth
from llava_deploy.runtime.report import walking
from llava_deploy.runtime.report.record import Record, read_record

Invoke = Callable[..., Result]
ErrorLine = Callable[[Result], str]
SMALL = ("--quick", "--per-kind", "1", "--backend", "onnxruntime", "--threads", "1")


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "_HOST_BUFFER", 1 << 24)
        patch.setattr(bandwidth, "_CACHES", 0)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def invoke() -> Invoke:
    """As the one for single tests, for what a module shares, too."""
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def measured(
    demo_checkpoint: Path,
    demo_bundle: Path,
    demo_bundle_fp16: Path,
    tmp_path_factory: pytest.TempPathFactory,
    invoke: Invoke,
) -> Path:
    """The folder of ``a.html`` and ``a.json``: of two bundles, the first with goldens."""
    place = tmp_path_factory.mktemp("report")
    bundle = shutil.copytree(demo_bundle, place / "recorded", copy_function=os.link)
    record_goldens(open_checkpoint(demo_checkpoint), bundle)
    files = ("-o", place / "a.html", "--json", place / "a.json")
    result = invoke("report", bundle, demo_bundle_fp16, *SMALL, *files, "--title", "Shapes")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{place / 'a.html'}\n"
    assert "Ship fp32. Not shown: fp16. Measured in " in result.stderr
    return place


@pytest.fixture(scope="module")
def report(measured: Path) -> Record:
    return read_record(measured / "a.json")


def test_everything_was_measured(report: Record) -> None:
    first, second = report.bundles
    assert (report.title, report.quick) == ("Shapes", True)
    assert [one.card.label for one in report.bundles] == ["fp32", "fp16"]
    for one in report.bundles:
        assert one.failure is None
        assert one.speed is not None
        assert one.speed.backend.threads == 1
        assert one.walk is not None
        assert one.accuracy is not None
        assert one.accuracy.total.asked == report.asked.count == len(one.accuracy.kinds)
        assert one.energy is not None or one.energy_refusals
    assert first.accuracy is not None
    assert first.accuracy.agreement is None
    assert second.accuracy is not None
    assert second.accuracy.agreement is not None
    assert second.accuracy.agreement.share > 0.9
    assert [engine.name.partition("-")[0] for engine in first.card.engines] == ["onnxruntime"]
    assert second.card.engines == ()


def test_the_verdicts_and_their_reasons(report: Record) -> None:
    first, second = report.bundles
    assert first.verdict.decision == "ship"
    assert first.tested.state == "passed"
    assert {"files", "pixels of one-picture"} <= {stage.name for stage in first.tested.stages}
    states = {check.name: check.state for check in second.verdict.checks}
    assert states == {"runs here": "passed", "self-test": "not shown", "accuracy": "not shown", "memory": "passed"}
    assert "llava-deploy record CHECKPOINT" in second.tested.sentence


def test_the_page_is_made_of_the_json_alone(invoke: Invoke, measured: Path, tmp_path: Path) -> None:
    again = tmp_path / "b.html"
    result = invoke("report", "--from", measured / "a.json", "-o", again)
    assert (result.exit_code, result.stdout) == (0, f"{again}\n")
    assert again.read_bytes() == (measured / "a.html").read_bytes()
    assert "<h1>Ship fp32. Not shown: fp16.</h1>" in again.read_text(encoding="utf-8")


def test_without_matplotlib_there_is_json(
    invoke: Invoke, error_line: ErrorLine, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions of one's own, too."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'llava-deploy[bench]'" in error_line(invoke("report", demo_bundle, "-o", tmp_path / "a.html"))
    (question,) = drawn_questions(1, seed=3)[:1]
    question.picture.save(tmp_path / "a.png")  # type: ignore[union-attr]
    line = {"image": "a.png", "question": question.text, "answer": question.answer}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line), encoding="utf-8")
    small = ("--quick", "--backend", "onnxruntime", "--threads", "1")
    out = tmp_path / "a.json"
    result = invoke("report", demo_bundle, *small, "--data", tmp_path / "mine.jsonl", "--json", out)
    assert result.exit_code == 0, result.stderr
    found = read_record(out)
    assert (found.asked.source, found.asked.count, found.asked.chance) == ("mine.jsonl", 1, {})
    assert found.title == found.bundles[0].card.model.name


def test_a_bundle_that_does_not_run_is_said_and_the_others_are_measured(
    invoke: Invoke,
    error_line: ErrorLine,
    demo_bundle: Path,
    demo_bundle_fp16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = walking._run

    def killed(way: walking.Way) -> object:
        return "the process was killed" if way.directory == str(demo_bundle_fp16) else run(way)

    monkeypatch.setattr(walking, "_run", killed)
    result = invoke("report", demo_bundle, demo_bundle_fp16, *SMALL, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    assert "Do not ship fp16." in result.stderr
    first, second = read_record(tmp_path / "a.json").bundles
    assert first.speed is not None
    assert (second.failure, second.speed, second.accuracy, second.walk) == ("the process was killed", None, None, None)
    assert error_line(invoke("report", demo_bundle_fp16, *SMALL, "-q", "--json", tmp_path / "b.json")).endswith(
        f"{demo_bundle_fp16}: the process was killed"
    )
    again = invoke("report", "--from", tmp_path / "a.json", "-o", tmp_path / "a.html")
    assert again.exit_code == 0, again.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["BUNDLE"], "--output: want a file to write, got none"),
        (["-o", "PLACE/a.html"], "Missing argument 'BUNDLE', or --from FILE."),
        (["BUNDLE", "-o", "PLACE"], "--output: want a file to write, found a directory"),
        (["BUNDLE", "-o", "PLACE/nowhere/a.html"], "--output: want a file to write, found no directory"),
        (["BUNDLE", "--json", "PLACE/nowhere/a.json"], "--json: want a file to write, found no directory"),
        (["BUNDLE", "-o", "PLACE/a", "--json", "PLACE/a"], "--json: want another file than that of the page"),
        (["BUNDLE", "BUNDLE", "-o", "PLACE/a.html"], "name each once"),
        (["PLACE", "-o", "PLACE/a.html"], "llava-deploy export"),
        (["BUNDLE", "-o", "PLACE/a.html", "--data", "PLACE/nowhere"], "cannot be read"),
        (["BUNDLE", "-o", "PLACE/a.html", "--data", "x", "--per-kind", "2"], "--per-kind: of no effect with --data"),
        (["BUNDLE", "-o", "PLACE/a.html", "--per-kind", "0"], "per-kind: want 1 question or more"),
        (["BUNDLE", "-o", "PLACE/a.html", "--backend", "tensorrt"], "no engine of TensorRT"),
        (["BUNDLE", "-o", "PLACE/a.html", "--threads", "0"], "--threads: want 1 to"),
        (["--from", "PLACE/nowhere.json", "-o", "PLACE/a.html"], "nowhere.json: cannot be read"),
        (["--from", "PLACE/text", "-o", "PLACE/a.html"], "not JSON"),
        (["--from", "PLACE/text"], "--output: want a file to write, got none"),
        (["--from", "PLACE/text", "BUNDLE", "-o", "PLACE/a.html"], "--from: want no bundle beside it"),
        (["--from", "PLACE/text", "--quick", "-o", "PLACE/a.html"], "--quick: of no effect with --from"),
    ],
)
def test_errors_are_one_line(
    options: list[str], said: str, invoke: Invoke, error_line: ErrorLine, demo_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no result", encoding="utf-8")
    places = {"BUNDLE": str(demo_bundle)}
    given = [places.get(option, option.replace("PLACE", str(tmp_path))) for option in options]
    result = invoke("report", *given, "-q")
    assert result.exit_code in (1, 2)
    if said.startswith("Missing"):
        assert said in result.stderr
    else:
        assert said in error_line(result)
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_place_that_cannot_be_written_to_is_known_before_anything_is_measured(
    invoke: Invoke, error_line: ErrorLine, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (tmp_path, os.W_OK))  # root may all
    result = invoke("report", demo_bundle, "--quick", "-o", tmp_path / "a.html")
    assert result.exit_code == 2
    assert (
        error_line(result) == f"error: --output: want a file to write, and {tmp_path} lets none be made; name another"
    )


def test_an_earlier_report_outlives_a_full_disk(
    invoke: Invoke, error_line: ErrorLine, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.html"
    path.write_text("before", encoding="utf-8")
    whole = Path.write_text

    def half(self: Path, text: str, *args: str, **options: str) -> int:
        whole(self, text[: len(text) // 2], *args, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    result = invoke("report", "--from", measured / "a.json", "-o", path)
    assert result.exit_code == 1
    assert "a.html: the report cannot be written (No space left on device)" in error_line(result)
    assert path.read_text(encoding="utf-8") == "before"
    assert [*tmp_path.iterdir()] == [path]
