"""Everything that a GPU can say about llava-deploy, in one command of ten minutes that needs no network.

    python benchmarks/gpu_check/check.py OUT [--quick]

Builds and runs every backend that is installed, holds it against PyTorch on the GPU stage by stage, has it answer the
tiny model's questions, and measures a LLaVA of 7B's shape with random weights, beside transformers. Writes
OUT/gpu_check.json and OUT/gpu_check.md, and rewrites them after every part: what was stopped keeps what it knew. A part
that cannot run is 'not run', with the reason. Exit code: 1 where one failed, 130 where Ctrl-C ended it, else 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from isolation import run_isolated
from names import ShapeName
from outcome import Outcome, not_run
from parts import Part, Settings, all_parts
from report import totals, write

ENVIRONMENT = Part("environment", "environment:look", {}, 120)
LEAST_S = 15.0
"""A part that has less than this left is not begun."""

USUAL_MINUTES = 10.0
"""That the limits of the parts are made for; with more, a part may take longer in proportion."""

STOPPED = 130  # the exit code of what Ctrl-C ended
HELPERS = Path(__file__).resolve().parents[1]


class Check:
    """The run of all parts."""

    def __init__(self, output: Path, shape: ShapeName, minutes: float, only: Sequence[str]) -> None:
        self._output, self._only = output, only
        self._settings = Settings(shape, output / "work")
        self._asked: dict[str, Any] = {"shape": shape, "minutes": minutes, "only": only}
        self._end = time.monotonic() + 60 * minutes
        self._patience = max(1.0, minutes / USUAL_MINUTES)
        self._found: dict[str, Any] = {}
        self.outcomes: list[Outcome] = []

    def run(self) -> None:
        """Run the parts in turn, and write down each; the bundles go in the end, whatever ends it.

        After Ctrl-C the parts that are left are not run, and written down as that.
        """
        looked = self._run(ENVIRONMENT)
        self._note(looked)
        if looked.status != "passed":
            return
        self._found = looked.result
        parts = all_parts(self._found, self._settings)
        wanted = self._wanted(parts)
        try:
            for part in parts:
                if part.name in wanted:
                    self._note(self._run(part))
                if part.removes is not None:
                    shutil.rmtree(part.removes, ignore_errors=True)
        except KeyboardInterrupt:
            noted = {outcome.name for outcome in self.outcomes}
            for part in parts:
                if part.name in wanted and part.name not in noted:
                    self._note(not_run(part.name, "stopped with Ctrl-C"))
            raise
        finally:
            shutil.rmtree(self._settings.work, ignore_errors=True)

    def _wanted(self, parts: list[Part]) -> set[str]:
        """Names of the parts to run."""
        names = {part.name for part in parts if not self._only or any(text in part.name for text in self._only)}
        for part in reversed(parts):  # what a part needs comes before it
            if part.name in names:
                names.update(part.needs)
        return names

    def _run(self, part: Part) -> Outcome:
        if part.missing is not None:
            return not_run(part.name, part.missing)
        passed = {outcome.name for outcome in self.outcomes if outcome.status == "passed"}
        if lacking := [name for name in part.needs if name not in passed]:
            return not_run(part.name, f"needs {lacking[0]}, which has not passed")
        left = self._end - time.monotonic()
        if left < LEAST_S:
            return not_run(part.name, f"the {self._asked['minutes']:g} minutes were over; give more with --minutes")
        path = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))
        environment = {**part.environment, "PYTHONPATH": path}
        limit_s = min(part.limit_s * self._patience, left)
        return run_isolated(part.name, part.function, part.arguments, limit_s, self._output / "parts", environment)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        write(self._output, self._found, self._asked, self.outcomes)
        reason = f": {outcome.reason[:300]}" if outcome.reason else ""
        print(f"{outcome.status:8} {outcome.seconds:6.1f} s  {outcome.name}{reason}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help="directory for the results, with room for the models")
    parser.add_argument("--quick", action="store_true", help="measure a model of 1b instead of 7b")
    parser.add_argument("--shape", choices=get_args(ShapeName), help="measure this one; tiny rehearses without a GPU")
    parser.add_argument("--minutes", type=float, default=USUAL_MINUTES, help="after which it ends (10)")
    parser.add_argument(
        "--only", metavar="TEXT", action="append", default=[], help="only parts with this in their names, and what "
        "they need; may be given several times"
    )  # fmt: skip
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    shape: ShapeName = options.shape or ("1b" if options.quick else "7b")
    check = Check(options.output, shape, options.minutes, options.only)
    stopped = False
    try:
        check.run()
    except KeyboardInterrupt:
        stopped = True
    counts = totals(check.outcomes)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    print(options.output / "gpu_check.md")
    return STOPPED if stopped else int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
