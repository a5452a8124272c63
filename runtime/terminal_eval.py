"""Bundles asked one after the other, with a bar for each, and what they scored as a table or as JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_deploy.engines.manifest import QuantizationRecipe
from llava_deploy.runtime import terminal
from llava_deploy.runtime.command_group import quiet, say
from llava_deploy.runtime.comparison import BundleReport, Comparison
from llava_deploy.runtime.evaluation import EvalOptions, EvalReport, Question, Score
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.terminal_run import Output

_WIDEST = 1000


@dataclass(frozen=True)
class Exam:
    """What bundles are asked; ``chance`` is what guessing gets right, for the kinds for which that is known."""

    questions: Sequence[Question]
    options: EvalOptions
    chance: Mapping[str, float]


def examine(bundles: Sequence[Path], exam: Exam, load: Callable[[Path], Llava], output: Output) -> None:
    """Ask every bundle and show what they scored; the first is what the others are compared with.

    Raises:
        BundleError: one is no bundle.
        InputError: one has another vocabulary than the first.
    """

    def ask(bundle: Path) -> BundleReport:  # when it returns, nothing holds the model any more
        llava = load(bundle)
        with terminal.progress(f"asking {bundle}", quiet=quiet()) as step:
            return comparison.ask(llava, lambda outcome: step(outcome.number, len(exam.questions)))

    with contextlib.closing(Comparison(bundles, exam.questions, exam.options)) as comparison:
        first, *others = [ask(bundle) for bundle in bundles]
    if output is Output.JSON:
        common = {"chance": exam.chance, "shown": exam.options.shown.value}
        terminal.show({**first.to_dict(), **common, "others": [one.to_dict() for one in others]})
    elif others:
        table = comparison_table([first, *others], exam.chance)
        table.width = width_of(table, terminal.out())
        terminal.show(table)
    else:
        terminal.show(accuracy_table(first.report, exam.chance))
    took = terminal.seconds(sum(one.report.seconds for one in (first, *others)))
    of = f" of {len(bundles)} bundles" if others else ""
    say(f"{len(exam.questions)} questions{of} in {took}; --json lists the wrong answers")


def accuracy_table(report: EvalReport, chance: Mapping[str, float]) -> Table:
    """Accuracy by kind; ``chance`` is what guessing gives, for the kinds for which that is known."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind")
    for name in ("asked", "right", "accuracy", *(["chance"] if chance else [])):
        table.add_column(name, justify="right")

    def row(name: str, score: Score, guess: float | None, style: str) -> None:
        cells = [str(score.asked), str(score.right), f"{score.accuracy:.1%}"]
        guessed = [] if not chance else ["" if guess is None else f"{guess:.1%}"]
        table.add_row(name, *cells, *guessed, style=style)

    for name, score in report.kinds.items():
        row(name, score, chance.get(name), "")
    if len(report.kinds) > 1:
        table.add_section()
        known = [chance[name] * score.asked for name, score in report.kinds.items() if name in chance]
        row("all", report.total, sum(known) / report.total.asked if known else None, "bold")
    return table


def comparison_table(reports: Sequence[BundleReport], chance: Mapping[str, float]) -> Table:
    """A row a bundle; all are compared with the first. ``chance`` as in :func:`accuracy_table`."""
    kinds = list(reports[0].report.kinds)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("bundle", "precision"):
        table.add_column(name, overflow="fold")
    for name in (*(kinds if len(kinds) > 1 else []), "all", "same\ntokens", "mean KL,\nnats", "weights"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in reports:
        scores = [*(one.report.kinds.values() if len(kinds) > 1 else []), one.report.total]
        near = one.against_first
        table.add_row(
            Text(str(one.bundle)),
            ", ".join([one.precision, *quantization_words(one.quantization)]),
            *(f"{score.accuracy:.1%}" for score in scores),
            *(("", "") if near is None else (f"{near.share:.2%}", f"{near.mean_kl:.3g}")),
            terminal.size(one.weight_bytes),
        )
    if chance and len(kinds) > 1:
        table.add_section()
        guesses = [f"{chance[name]:.1%}" if name in chance else "" for name in kinds]
        table.add_row("chance", "", *guesses, style="dim")
    return table


def width_of(table: Table, console: Console) -> int | None:
    """What a table needs where the console is too narrow for it, ``None`` where it is not.

    The terminal breaks lines that are too long; Rich would leave parts of the numbers out.
    """
    least = console.measure(table, options=console.options.update(width=_WIDEST)).minimum
    return least if least > console.width else None


def quantization_words(recipe: QuantizationRecipe | None) -> list[str]:
    """How weights are quantised: by which method, the group size, with or without zero points, the output layer."""
    if recipe is None:
        return []
    groups = "one group a row" if recipe.group_size is None else f"groups of {recipe.group_size}"
    return [recipe.method, groups, "symmetric" if recipe.symmetric else "asymmetric", f"lm_head {recipe.lm_head}"]
