"""How ONNX Runtime's threads should wait for one another: a decode step with and without spinning.

    python benchmarks/onnxruntime_threads.py BUNDLE -o benchmarks/results/onnxruntime_threads.json

Between two operators a thread may spin, which costs its core and wakes at once, or sleep. Settings take turns, some
steps each; the CPU time of a step is of all threads, and idle is what the process takes in a second without work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
from measuring import circumstances, save

from llava_deploy.runtime import Llava

SLOT = 200
WARM_UP = 3
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "spinning for 1 ms": {"session.intra_op.spin_duration_us": "1000"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="with an engine for ONNX Runtime")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="of a setting's turn (20)")
    arguments = parser.parse_args()
    models = {name: load(arguments.bundle, entries, arguments.threads) for name, entries in SETTINGS.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in models}
    cpu: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.turns):
        for name, llava in models.items():
            steps(llava, WARM_UP)
            before = time.process_time()
            milliseconds[name] += steps(llava, arguments.steps)
            cpu[name].append(1000 * (time.process_time() - before) / arguments.steps)
    result = {
        **circumstances(),
        "bundle": arguments.bundle.name,
        "threads": arguments.threads,
        "settings": {
            name: {
                "step_ms": round(statistics.median(milliseconds[name]), 3),
                "step_ms_min": round(min(milliseconds[name]), 3),
                "cpu_ms_a_step": round(statistics.median(cpu[name]), 3),
                "idle_cpu_ms_a_second": idle(llava),
            }
            for name, llava in models.items()
        },
    }
    save(arguments.output, result)
    print(table(result))


def load(bundle: Path, entries: dict[str, str], threads: int) -> Llava:
    """The bundle, its sessions with these entries."""
    make = onnxruntime.SessionOptions

    def with_entries() -> onnxruntime.SessionOptions:
        options = make()
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        return options

    with mock.patch.object(onnxruntime, "SessionOptions", with_entries):
        llava = Llava.load(bundle, backend="onnxruntime", threads=threads, max_len=2 * SLOT)
    llava.decoder.begin(1)
    return llava


def steps(llava: Llava, count: int) -> list[float]:
    """Milliseconds of single tokens behind a context of 200."""
    embeds, slot, first = llava.encoder.embed([5])[:, None], np.array([SLOT]), np.zeros(1, np.int64)
    found = []
    for _ in range(count):
        began = time.perf_counter()
        llava.decoder.step(embeds, slot, first)
        found.append(1000 * (time.perf_counter() - began))
    return found


def idle(llava: Llava) -> float:
    """Milliseconds of CPU in a second of rest after some steps."""
    steps(llava, WARM_UP)
    time.sleep(0.2)
    began = time.process_time()
    time.sleep(1)
    return round(1000 * (time.process_time() - began), 2)


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'':18} {'step, ms':>9} {'min':>7} {'CPU, ms':>8} {'idle, ms/s':>11}"]
    lines += [
        f"{name:18} {row['step_ms']:9.2f} {row['step_ms_min']:7.2f} {row['cpu_ms_a_step']:8.2f} "
        f"{row['idle_cpu_ms_a_second']:11.2f}"
        for name, row in result["settings"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
