"""Several bundles in one table: its numbers, its words, and what cannot be compared."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console

from llava_deploy.engines.errors import BundleError, InputError
from llava_deploy.engines.manifest import MANIFEST_NAME, TOKENIZER, QuantizationRecipe, read_manifest
from llava_deploy.exporter.demo.questions import chances, drawn_questions
from llava_deploy.runtime.agreement import Agreement
from llava_deploy.runtime.comparison import BundleReport, Comparison
from llava_deploy.runtime.evaluation import EvalOptions, EvalReport, Outcome
from llava_deploy.runtime.terminal import show
from llava_deploy.runtime.terminal_eval import comparison_table, width_of

Changed = Callable[[Path, Path, str, Callable[[Path], object]], Path]
Invoke = Callable[..., Result]
ErrorLine = Callable[[Result], str]
QUESTIONS = drawn_questions(2, 0)


def test_json_of_one_and_of_several(invoke: Invoke, demo_bundle: Path, demo_bundle_fp16: Path) -> None:
    options = ("--per-kind", 1, "--batch", 5, "--json")
    one = json.loads(invoke("eval", demo_bundle, *options).stdout)
    several = json.loads(invoke("eval", demo_bundle, demo_bundle_fp16, demo_bundle, *options).stdout)
    assert (one["against_first"], one["others"]) == (None, [])
    assert one.keys() == several.keys()
    assert {**one, "seconds": 0, "others": 0} == {**several, "seconds": 0, "others": 0}
    half, again = several["others"]
    assert half.keys() | {"others", "chance", "shown"} == several.keys()
    assert [one["bundle"], half["bundle"], again["bundle"]] == [
        str(demo_bundle),
        str(demo_bundle_fp16),
        str(demo_bundle),
    ]
    assert [one["precision"], half["precision"], half["quantization"]] == ["fp32", "fp16", None]
    assert half["weight_bytes"] < one["weight_bytes"]
    assert half["asked"] == again["asked"] == 5
    assert 0 < half["against_first"]["mean_kl"] < 1e-3
    tokens = half["against_first"]["tokens"]
    assert again["against_first"] == {"tokens": tokens, "agreeing": tokens, "mean_kl": 0.0, "share": 1.0}


def test_a_table_of_several(invoke: Invoke, demo_bundle: Path, demo_bundle_fp16: Path) -> None:
    result = invoke("eval", demo_bundle, demo_bundle_fp16, "--per-kind", 1)
    lines = [line.split() for line in result.stdout.splitlines() if line]
    assert lines[1][:4] == ["bundle", "precision", *list(chances())[:2]]
    assert [line[:2] for line in lines[3:5]] == [[str(demo_bundle), "fp32"], [str(demo_bundle_fp16), "fp16"]]
    assert lines[-1][0] == "chance"
    assert "100.00%" in lines[4]
    assert "5 questions of 2 bundles" in result.stderr


def test_blank_pictures_are_blank_for_all(invoke: Invoke, demo_bundle: Path) -> None:
    value = json.loads(invoke("eval", demo_bundle, demo_bundle, "--per-kind", 1, "--blank", "--json").stdout)
    assert value["shown"] == "blank"
    assert value["others"][0]["against_first"]["share"] == 1
    assert value["others"][0]["wrong"] == value["wrong"]


def test_words_for_a_quantised_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = (Outcome(1, "all", "q", "a", "a"), Outcome(2, "all", "q", "a", "b"))
    first = BundleReport(Path("first"), "fp32", None, 4000, EvalReport(outcomes, 1.0), None)
    recipe = QuantizationRecipe("awq", 128, symmetric=False, lm_head="fp16", weights=7, accuracy_level=4)
    near = Agreement(tokens=1000, agreeing=995, mean_kl=0.0123456)
    second = replace(first, bundle=Path("second"), precision="int4-awq", quantization=recipe, against_first=near)
    third = replace(second, quantization=replace(recipe, group_size=None, symmetric=True))
    show(comparison_table([first, second, third], {}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [*lines[0].split(), *lines[1].split()] == "same mean KL, bundle precision all tokens nats weights".split()
    lines = lines[1:]
    assert lines[2].split() == ["first", "fp32", "50.0%", "4.0", "kB"]
    assert "int4-awq, awq, groups of 128, asymmetric, lm_head fp16" in lines[3]
    assert lines[3].split()[-4:] == ["99.50%", "0.0123", "4.0", "kB"]
    assert "int4-awq, awq, one group a row, symmetric, lm_head fp16" in lines[4]
    assert second.to_dict()["quantization"]["group_size"] == 128
    assert len(lines) == 5


def test_nothing_of_a_table_is_left_out_where_the_terminal_is_narrow() -> None:
    outcomes = tuple(Outcome(number, kind, "q", "a", "a") for number, kind in enumerate(chances()))
    first = BundleReport(Path("bundles/[first]"), "fp32", None, 4000, EvalReport(outcomes, 1.0), None)
    second = replace(first, against_first=Agreement(tokens=1000, agreeing=995, mean_kl=8.16e-05))
    table = comparison_table([first, second], chances())
    narrow, wide = (Console(width=width, file=io.StringIO()) for width in (60, 200))
    assert width_of(table, wide) is None
    table.width = width_of(table, narrow)
    narrow.print(table, crop=False)
    assert isinstance(narrow.file, io.StringIO)
    shown = narrow.file.getvalue()
    assert "…" not in shown
    assert {"100.0%", "99.50%", "8.16e-05", "kB", "position"} <= set(shown.split())
    assert "[first]" in shown.replace("\n", "")


def test_errors_of_the_command(invoke: Invoke, error_line: ErrorLine, demo_bundle: Path) -> None:
    result = invoke("eval", demo_bundle, "nowhere", "--per-kind", 1)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere: want a bundle directory" in error_line(result)
    assert "Missing argument 'BUNDLE" in error_line(invoke("eval"))


def test_other_models_are_refused_before_anything_runs(demo_bundle: Path, changed: Changed, tmp_path: Path) -> None:
    def swap(path: Path) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = data["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        path.write_text(json.dumps(data), encoding="utf-8")

    other = changed(demo_bundle, tmp_path / "other", TOKENIZER, swap)
    with pytest.raises(InputError, match=r"other: want the token ids of .*compare bundles of one model"):
        Comparison([demo_bundle, other], QUESTIONS, EvalOptions())
    manifest = read_manifest(demo_bundle)
    wide = tmp_path / "wide"
    wide.mkdir()
    decoder = replace(manifest.decoder, vocab_size=99)
    (wide / MANIFEST_NAME).write_text(replace(manifest, decoder=decoder).to_json(), encoding="utf-8")
    with pytest.raises(InputError, match=r"wide: want a vocabulary of [\d,]+, .*, found 99; compare"):
        Comparison([demo_bundle, wide], QUESTIONS, EvalOptions())
    with pytest.raises(BundleError, match="nowhere: want a bundle directory"):
        Comparison([demo_bundle, tmp_path / "nowhere"], QUESTIONS, EvalOptions())


def test_one_vocabulary_in_other_bytes_is_the_same(demo_bundle: Path, changed: Changed, tmp_path: Path) -> None:
    def respace(path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"\n")

    respaced = changed(demo_bundle, tmp_path / "respaced", TOKENIZER, respace)
    Comparison([demo_bundle, respaced], QUESTIONS, EvalOptions()).close()
