"""What ``llava-deploy demo`` does: the whole way from a checkpoint to answers, and a look at how right they are.

One of the few files that see every room: the exporter, the builder and the runtime meet here.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llava_deploy.engines.goldens import read_goldens
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import Example, Split, checkpoint_dir, examples
from llava_deploy.exporter.export import export
from llava_deploy.exporter.goldens.record import record_goldens
from llava_deploy.exporter.verify import VerifyReport, verify
from llava_deploy.runtime import Llava, Timings
from llava_deploy.runtime.evaluation import normalise
from llava_deploy.runtime.stages import StageResult
from llava_deploy.runtime.terminal import (
    Stopwatch,
    facts,
    progress,
    seconds,
    shows_pictures,
    size,
    thumbnail,
)
from llava_deploy.runtime.terminal_run import Request, Template, prompt_of
from llava_deploy.runtime.terminal_selftest import stage_table

PICTURES = 10
"""Pictures drawn, the kinds of question in turn."""

WANTED_RIGHT = 0.8
"""The share of right answers below which something is wrong: a model that is right 19 times in 20 gets 8 of 10 in 99
draws of 100."""


@dataclass(frozen=True)
class Drawn:
    """A picture in a file, with its question."""

    path: Path
    example: Example


def draw(directory: Path, seed: int, count: int = PICTURES) -> list[Drawn]:
    """Draw pictures never seen in training into ``directory``; the same seed draws the same ones."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for number, example in enumerate(islice(examples(Split.HELD_OUT, seed), count), 1):
        path = directory / f"{number:02}-{example.kind}.png"
        example.picture.save(path)
        drawn.append(Drawn(path, example))
    return drawn


def showcase(directory: Path, seed: int, console: Console) -> list[str]:
    """Export, build, ask, compare, and say how long it took.

    Args:
        directory: for the bundle and the pictures; what an earlier call left there is replaced.
        seed: of the drawn pictures.
        console: where it is all said.

    Returns:
        What was wrong, each in a sentence; empty where all went well.
    """
    took: list[tuple[str, str]] = []
    bundle = directory / "bundle"

    _heading(console, 1, "Export", "the shipped LLaVA becomes a bundle of two ONNX graphs and what goes with them")
    watch = Stopwatch()
    checkpoint = open_checkpoint(checkpoint_dir())
    with progress("exporting", quiet=False) as step:
        manifest = export(
            checkpoint,
            bundle,
            "fp32",
            replace=True,
            on_progress=lambda p: step(p.done, p.total),
            record=lambda at, written: record_goldens(checkpoint, at, written),
        )
    took.append(("export, with goldens", str(watch)))
    files = size(sum(entry.size for entry in manifest.files))
    console.print(f"   {bundle}, {files}, {manifest.model.parameters:,} parameters in {manifest.model.precision}")
    names = ", ".join(golden.name for golden in read_goldens(bundle, manifest).goldens)
    console.print(f"   with PyTorch's answers to {names}, for a self-test where it runs")

    _heading(console, 2, "Build", "the bundle becomes an engine for ONNX Runtime on the CPU")
    watch = Stopwatch()
    with progress("building", quiet=False):
        engine = build_onnxruntime(bundle)
    took.append(("build", str(watch)))
    console.print(f"   {engine}")

    _heading(console, 3, "Ask", "questions about pictures drawn just now, none of them seen in training")
    watch = Stopwatch()
    llava = Llava.load(bundle)
    took.append(("load", str(watch)))
    drawn = draw(directory / "pictures", seed)
    timings: list[Timings] = []
    marks = [_ask(llava, one, console, timings) for one in drawn]
    console.print(f"   {sum(marks)} of {len(marks)} right", style="bold")

    _heading(console, 4, "Compare", "with PyTorch on the first of these pictures, stage by stage")
    with progress("comparing with PyTorch", quiet=False):
        prompt = _prompt(llava, drawn[0])
        report = verify(checkpoint, bundle, prompt=prompt, picture=drawn[0].path)
    console.print(stage_table(_worst_of_kinds(report)))

    _heading(console, 5, "Timings", "")
    console.print(facts("", [*took, *_answer_times(timings)]))
    console.print("\nNow you:", style="bold")
    console.print(f"   llava-deploy chat {bundle} --image {drawn[0].path}")
    console.print(f"   llava-deploy eval {bundle}")

    problems = []
    if sum(marks) < WANTED_RIGHT * len(marks):
        problems.append(f"only {sum(marks)} of {len(marks)} answers are right")
    if report.first_failure is not None:
        problems.append(f"{report.first_failure} is the first stage that differs from PyTorch")
    return problems


def _heading(console: Console, number: int, name: str, rest: str) -> None:
    console.print(Text.assemble(f"\n{number}  ", (name, "bold cyan"), f"  {rest}"))


def _prompt(llava: Llava, drawn: Drawn) -> str:
    return prompt_of(Request(drawn.example.question, [drawn.path], Template.MODEL), llava.manifest.chat)


def _ask(llava: Llava, drawn: Drawn, console: Console, timings: list[Timings]) -> bool:
    """Ask, stream the answer beside the picture where the terminal can show it, and say whether it is right."""
    picture = thumbnail(drawn.example.picture) if shows_pictures(console) else []
    margins = [Text.assemble("   ", line, "   ") for line in picture] + [Text("   ")] * (4 if not picture else 0)
    console.print()
    for margin, text in zip(margins[:2], (Text(str(drawn.path), "dim"), Text(drawn.example.question)), strict=True):
        console.print(margin + text, soft_wrap=True)
    console.print(margins[2], end="")
    said: list[str] = []
    for piece in llava.stream(_prompt(llava, drawn), [drawn.path], max_new_tokens=32):
        said.append(piece.text if said else piece.text.lstrip())
        console.print(Text(said[-1], "bold"), end="", soft_wrap=True)
        if piece.timings is not None:
            timings.append(piece.timings)
    right = normalise("".join(said)) == normalise(drawn.example.answer)
    console.print()
    verdict = Text("right", "green") if right else Text(f"wrong: {drawn.example.answer}", "bold red")
    console.print(margins[3] + verdict)
    for margin in margins[4:]:
        console.print(margin)
    return right


def _worst_of_kinds(report: VerifyReport) -> list[StageResult]:
    """Of each kind of stage the first that failed, else the one with the largest error."""
    worst = []
    for kind in dict.fromkeys(stage.kind for stage in report.stages):
        stages = [stage for stage in report.stages if stage.kind == kind]
        # A NaN loses every comparison, and fails.
        stage = next((stage for stage in stages if not stage.ok), max(stages, key=lambda stage: stage.error))
        worst.append(stage if len(stages) == 1 else replace(stage, name=f"{kind}, worst of {len(stages)}"))
    return worst


def _answer_times(timings: list[Timings]) -> list[tuple[str, str]]:
    rates = [timing.decode_tokens_per_second for timing in timings if timing.new_tokens > 1]
    first = seconds(statistics.median(timing.ttft for timing in timings))
    return [
        ("picture to pixels", seconds(statistics.median(timing.preprocess for timing in timings))),
        ("vision tower", seconds(statistics.median(timing.vision for timing in timings))),
        ("first token", f"{first} after the question of {timings[0].prompt_tokens} tokens, picture included"),
        *([("decode", f"{statistics.median(rates):.0f} tokens/s")] if rates else []),
    ]
