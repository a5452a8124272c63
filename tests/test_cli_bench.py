"""``llava-deploy bench`` as people and scripts meet it."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llava_deploy.cli import main
from llava_deploy.runtime.bench import bandwidth
from llava_deploy.runtime.bench.report import read_report

Invoke = Callable[..., Result]
ErrorLine = Callable[[Result], str]
SMALL = ("--contexts", "16,32", "--batches", "1,2", "--new-tokens", "4", "--rounds", "1", "--threads", "1")


@pytest.fixture(autouse=True, scope="module")
def _small_buffers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "_HOST_BUFFER", 1 << 24)
        patch.setattr(bandwidth, "_CACHES", 0)
        yield


@pytest.fixture(scope="module")
def before(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Path:
    path = tmp_path_factory.mktemp("bench") / "before.json"
    result = invoke("bench", demo_bundle, *SMALL, "--json", path)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def invoke() -> Invoke:
    """As the one for single tests, for what a module shares, too."""
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


def test_tables_json_and_a_plot(invoke: Invoke, demo_bundle: Path, tmp_path: Path) -> None:
    written, plot = tmp_path / "a.json", tmp_path / "a.png"
    result = invoke("bench", demo_bundle, *SMALL, "--json", written, "--plot", plot)
    assert result.exit_code == 0, result.stderr
    for title in ("Benchmark of", "First token of", "Decode behind a context", "Rows at once", "Peak memory"):
        assert title in result.stdout
    report = read_report(written)
    assert report.options.contexts == (16, 32)
    assert report.options.rounds == 1
    assert report.backend.threads == 1
    assert report.bundle.directory == str(demo_bundle)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_json_on_standard_output_is_all_that_is_there(invoke: Invoke, demo_bundle: Path) -> None:
    result = invoke("bench", demo_bundle, *SMALL, "--json", "-", "-q")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert json.loads(result.stdout)["bundle"]["name"] == "checkpoint"


def test_quick_is_less_of_everything_and_gives_way_to_what_is_said(invoke: Invoke, demo_bundle: Path) -> None:
    options = ("--quick", "--contexts", "16", "--batches", "1", "--threads", "1", "--json", "-", "-q")
    found = json.loads(invoke("bench", demo_bundle, *options).stdout)["options"]
    assert found == {"prompt_tokens": None, "contexts": [16], "batches": [1], "new_tokens": 16, "rounds": 1}


def test_a_short_context(invoke: Invoke, demo_bundle: Path) -> None:
    result = invoke("bench", demo_bundle, "--quick", "--max-len", "24", "--batches", "1", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    for said in ("text only", "context of 64 tokens left out", "context of 512 tokens left out", "measured instead"):
        assert said in result.stdout


def test_compare_shows_both_and_what_is_doubtful(
    invoke: Invoke, demo_bundle: Path, before: Path, tmp_path: Path
) -> None:
    other = json.loads(before.read_text(encoding="utf-8"))
    other["machine"]["cpu"] = "Abacus 1"
    other["versions"]["onnxruntime"] = "0.9"
    changed = tmp_path / "other.json"
    changed.write_text(json.dumps(other), encoding="utf-8")
    result = invoke("bench", demo_bundle, *SMALL, "--compare", changed)
    assert result.exit_code == 0, result.stderr
    assert f"Beside {changed}" in result.stdout.replace("\n", "")
    assert "decode, behind 16" in result.stdout
    assert "doubtful: another processor: Abacus 1, now" in result.stdout
    assert "onnxruntime 0.9, now" in result.stdout
    same = invoke("bench", demo_bundle, *SMALL, "--compare", before)
    assert "another processor" not in same.stdout


def test_nothing_in_common(invoke: Invoke, error_line: ErrorLine, demo_bundle: Path, before: Path) -> None:
    options = (*SMALL, "--contexts", "20", "--new-tokens", "5", "--prompt-tokens", "12", "-q")
    result = invoke("bench", demo_bundle, *options, "--compare", before)
    assert result.exit_code == 2
    assert "nothing can be compared" in error_line(result)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--contexts", "a,b"], "want numbers with commas between them, got 'a,b'"),
        (["--batches", "1,,2"], "want numbers with commas between them"),
        (["--contexts", "0"], "--contexts: want 1 to"),
        (["--new-tokens", "1"], "--new-tokens: want 2 to"),
        (["--rounds", "0"], "--rounds: want 1 to"),
        (["--threads", "0"], "--threads: want 1 to"),
        (["--max-len", "4"], "--max-len: want a context of 16 tokens or more"),
        (["--max-len", "99999"], "--max-len: want 1 to 1024"),
        (["--prompt-tokens", "99999"], "--prompt-tokens: want 1 to 1024"),
        (["--backend", "tensorrt"], "no engine of TensorRT"),
        (["--json", "PLACE"], "--json: want a file to write, found a directory"),
        (["--json", "PLACE/nowhere/a.json"], "--json: want a file to write, found no directory"),
        (["--plot", "PLACE/nowhere/a.png"], "--plot: want a file to write, found no directory"),
        (["--plot", "a.pdf"], "--plot: want a name that ends with .png or .svg"),
        (["--json", "PLACE/a.png", "--plot", "PLACE/a.png"], "name the same file"),
        (["--compare", "BEFORE", "--json", "-"], "--json: want a file beside --compare"),
        (["--compare", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--compare", "PLACE"], "cannot be read (Is a directory)"),
        (["--compare", "PLACE/text"], "not JSON"),
        (["--compare", "PLACE/part.json"], "only a part of it"),
        (["--compare", "PLACE/old.json"], "of schema 1, found 0"),
    ],
)
def test_errors_are_one_line(
    options: list[str],
    said: str,
    invoke: Invoke,
    error_line: ErrorLine,
    demo_bundle: Path,
    before: Path,
    tmp_path: Path,
) -> None:
    whole = before.read_text(encoding="utf-8")
    files = {"text": "no result", "part.json": whole[:300], "old.json": whole.replace('"schema": 1', '"schema": 0')}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    places = {"BEFORE": str(before), "PLACE": str(tmp_path)}
    given = [places.get(option, option.replace("PLACE", str(tmp_path))) for option in options]
    result = invoke("bench", demo_bundle, *given, "-q")
    assert result.exit_code in (1, 2)
    assert said in error_line(result)
    assert result.stdout == ""


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    invoke: Invoke, error_line: ErrorLine, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("bench", demo_bundle, "--plot", "a.png")
    assert result.exit_code == 2
    assert "pip install 'llava-deploy[bench]'" in error_line(result)


def test_no_bundle(invoke: Invoke, error_line: ErrorLine, tmp_path: Path) -> None:
    assert "llava-deploy export" in error_line(invoke("bench", tmp_path))


def test_an_earlier_result_outlives_a_full_disk(
    invoke: Invoke,
    error_line: ErrorLine,
    demo_bundle: Path,
    before: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = shutil.copy(before, tmp_path / "speed.json")
    whole = Path.write_text

    def half(self: Path, text: str, *args: str, **options: str) -> int:
        whole(self, text[: len(text) // 2], *args, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    result = invoke("bench", demo_bundle, *SMALL, "--json", path)
    assert result.exit_code == 1
    assert "speed.json: the result cannot be written (No space left on device)" in error_line(result)
    assert path.read_bytes() == before.read_bytes()
    assert [*tmp_path.iterdir()] == [path]
