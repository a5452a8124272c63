"""A part over the shipped tiny LLaVA: questions with right answers. Nothing here imports PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backends import load
from names import BackendUnderTest
from outcome import CheckFailedError

from llava_deploy.exporter.demo.questions import drawn_questions
from llava_deploy.runtime.evaluation import EvalOptions, Shown, evaluate

PER_KIND = 8
AT_ONCE = 4
"""Questions in one batch, of different lengths; engines for the demo are built for as many."""

WANTED_RIGHT = 0.8
"""The share of right answers below which something is wrong: in PyTorch the tiny model is right 19 times in 20."""


def ask(bundle: str, backend: BackendUnderTest) -> dict[str, Any]:
    """A part: questions about drawn pictures never seen in training, one by one and several at once.

    Raises:
        CheckFailedError: fewer are right than the tiny model answers in PyTorch.
    """
    llava = load(Path(bundle), backend, None)
    questions = drawn_questions(PER_KIND, seed=0)
    result: dict[str, Any] = {"backend": llava.backend}
    for batch in (1, AT_ONCE):
        report = evaluate(llava, questions, EvalOptions(Shown.PICTURE, batch))
        found = {"asked": report.total.asked, "right": report.total.right, "wrong": report.to_dict()["wrong"]}
        result[f"batch of {batch}"] = found
        if report.total.accuracy < WANTED_RIGHT:
            raise CheckFailedError(
                f"only {report.total.right} of {report.total.asked} answers are right, {batch} at once", result
            )
    return result
