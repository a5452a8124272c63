"""How ONNX Runtime's threads should wait for one another: a decode step, and an answer's beginning.

    python benchmarks/onnxruntime_threads.py BUNDLE -o benchmarks/results/onnxruntime_threads.json

Between two operators a thread may spin, which costs its core and wakes at once, or sleep; and a session's threads may
spin on when its run is over. Settings take turns: some steps each, then a picture, a prompt of 233 tokens and 8 steps,
which are of two or three sessions. The CPU time of a step is of all threads, and idle is what the process takes in a
second without work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
from measuring import circumstances, save

from llava_deploy.runtime import Llava

SLOT = 240
WARM_UP = 3
PROMPT, FIRST = 233, 8
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "spinning on": {"session.force_spinning_stop": "0"},
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "spinning for 1 ms": {"session.force_spinning_stop": "0", "session.intra_op.spin_duration_us": "1000"},
}
"""Beside what the runtime sets, or instead of it."""


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
    begun: dict[str, list[list[float]]] = {name: [] for name in models}
    for _ in range(arguments.turns):
        for name, llava in models.items():
            steps(llava, WARM_UP)
            before = time.process_time()
            milliseconds[name] += steps(llava, arguments.steps)
            cpu[name].append(1000 * (time.process_time() - before) / arguments.steps)
            begun[name].append(beginning(llava))
    result = {
        **circumstances(),
        "bundle": arguments.bundle.name,
        "threads": arguments.threads,
        "settings": {
            name: {
                "step_ms": round(statistics.median(milliseconds[name]), 3),
                "step_ms_min": round(min(milliseconds[name]), 3),
                "cpu_ms_a_step": round(statistics.median(cpu[name]), 3),
                "picture_prompt_steps_ms": [
                    round(statistics.median(part), 2) for part in zip(*begun[name], strict=True)
                ],
                "picture_prompt_steps_ms_min": [round(min(part), 2) for part in zip(*begun[name], strict=True)],
                "idle_cpu_ms_a_second": idle(llava),
            }
            for name, llava in models.items()
        },
    }
    save(arguments.output, result)
    print(table(result))


def load(bundle: Path, entries: dict[str, str], threads: int) -> Llava:
    """The bundle, its sessions with these entries."""
    session = onnxruntime.InferenceSession

    def opened(model: str, settings: onnxruntime.SessionOptions, providers: list[str]) -> onnxruntime.InferenceSession:
        for key, value in entries.items():
            settings.add_session_config_entry(key, value)
        return session(model, settings, providers=providers)

    with mock.patch.object(onnxruntime, "InferenceSession", opened):
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


def beginning(llava: Llava) -> list[float]:
    """Milliseconds of a picture, of a prompt, and of each of the first tokens behind it."""
    shape = llava.manifest.vision
    pixels = np.zeros((1, 3, shape.image_height, shape.image_width), np.float32)
    embeds, start = llava.encoder.embed([5] * PROMPT)[None], np.zeros(1, np.int64)
    times = [time.perf_counter()]
    llava.encoder.vision.encode(pixels)
    times.append(time.perf_counter())
    llava.decoder.step(embeds, start, np.array([PROMPT - 1]))
    times.append(time.perf_counter())
    token = sum(steps(llava, FIRST)) / FIRST
    return [*(1000 * (later - earlier) for earlier, later in pairwise(times)), token]


def of_parts(turns: Sequence[Sequence[float]], value: Callable[[Sequence[float]], float]) -> list[float]:
    """One value for each part over all turns."""
    return [round(value(part), 2) for part in zip(*turns, strict=True)]


def idle(llava: Llava) -> float:
    """Milliseconds of CPU in a second of rest after some steps."""
    steps(llava, WARM_UP)
    time.sleep(0.2)
    began = time.process_time()
    time.sleep(1)
    return round(1000 * (time.process_time() - began), 2)


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{'':18} {'step, ms':>9} {'min':>7} {'CPU, ms':>8} {'idle, ms/s':>11}  picture, prompt, first steps, ms (min)"
    ]
    for name, row in result["settings"].items():
        parts = zip(row["picture_prompt_steps_ms"], row["picture_prompt_steps_ms_min"], strict=True)
        lines.append(
            f"{name:18} {row['step_ms']:9.2f} {row['step_ms_min']:7.2f} {row['cpu_ms_a_step']:8.2f} "
            f"{row['idle_cpu_ms_a_second']:11.2f}  {', '.join(f'{each:.1f} ({least:.1f})' for each, least in parts)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
