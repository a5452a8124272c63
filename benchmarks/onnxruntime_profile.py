"""Where ONNX Runtime's time goes on one thread: a picture and a prompt, rows together, a second turn.

    python benchmarks/onnxruntime_profile.py FP32 LARGE -o benchmarks/results/onnxruntime_profile.json

FP32 is a bundle whose picture and prompt are looked at, LARGE one of int4 with `build --int8 prefill`, of which steps
of one and of eight rows are, and 31 new tokens with and without 512 others before them; both with their engines. Cases
take turns. Of each the fastest runs count: milliseconds by kind of operator from ONNX Runtime's own profile, and for
products how fast they are. Beside them, in the same run: PyTorch's products of the same shapes in floats, and how many
multiplications and additions of floats the core does when it does nothing else: a few lines of C, compiled on the spot.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch
from bandwidth import COMPILERS, MemoryBandwidth
from measuring import circumstances, save

from llava_deploy.runtime import Llava, onnxruntime_backend

PROMPT, ROWS, CONTEXT, NEW, BEFORE, SLOTS = 233, 8, 80, 31, 512, 1024
FASTEST = 3
"""Runs of a case that count."""

PRODUCTS = frozenset({"Conv", "FusedMatMul", "Gemm", "MatMul", "MatMulIntegerToFloat", "MatMulNBits"})
ATTENTION = frozenset({"GroupQueryAttention", "MultiHeadAttention"})
PEAK = r"""
#include <time.h>
typedef float lanes __attribute__((vector_size(64)));
double measure(long turns) {
    lanes sums[12], x, y;
    for (int lane = 0; lane < 16; lane++) x[lane] = 1.0f + 1e-7f * (float)turns, y[lane] = 1e-9f;
    for (int one = 0; one < 12; one++) sums[one] = x * (float)one;
    struct timespec began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (long turn = 0; turn < turns; turn++)
        for (int one = 0; one < 12; one++) sums[one] = sums[one] * x + y;
    clock_gettime(CLOCK_MONOTONIC, &ended);
    float all = 0;
    for (int one = 0; one < 12; one++) all += sums[one][one];
    double seconds = (double)(ended.tv_sec - began.tv_sec) + 1e-9 * (double)(ended.tv_nsec - began.tv_nsec);
    return 12.0 * 16.0 * 2.0 * (double)turns / (seconds + (all == 0.5f ? 1e-12 : 0));
}
"""


class Watched:
    """A bundle whose sessions write profiles, and the runs of each."""

    def __init__(self, bundle: Path, place: Path) -> None:
        self._sessions: list[onnxruntime.InferenceSession] = []
        self._counts: collections.Counter[int] = collections.Counter()
        self._runs: dict[int, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        options, session = onnxruntime.SessionOptions, onnxruntime.InferenceSession

        def profiling() -> onnxruntime.SessionOptions:
            made = options()
            made.enable_profiling = True
            made.profile_file_prefix = str(place / bundle.name)
            return made

        def opened(*arguments: Any, **named: Any) -> onnxruntime.InferenceSession:
            self._sessions.append(session(*arguments, **named))
            return self._sessions[-1]

        with (
            mock.patch.object(onnxruntime, "SessionOptions", profiling),
            mock.patch.object(onnxruntime, "InferenceSession", opened),
        ):
            self.llava = Llava.load(bundle, backend="onnxruntime", threads=1, max_len=SLOTS)

    def run(self, case: str, session: int, step: Callable[[], object]) -> None:
        """One run of a case, behind one to warm up, by a session: 0 the tower, 1 the decoder, 2 the one in integers."""
        step()
        step()
        self._runs[session][case].append(self._counts[session] + 1)
        self._counts[session] += 2

    def found(self) -> dict[str, dict[str, Any]]:
        """The cases' profiles; ends the sessions' own."""
        result = {}
        for index, session in enumerate(self._sessions):
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            whole = [event for event in events if event["name"] == "model_run"]
            for case, runs in self._runs[index].items():
                mine = sorted((whole[number] for number in runs), key=lambda event: event["dur"])
                median = statistics.median(event["dur"] for event in mine)
                result[case] = {"ms_median": round(median / 1000, 2), **operators(events, mine[:FASTEST])}
        return result

    def tokens(self, rows: int, new: int, before: int) -> Callable[[], object]:
        """A step of so many rows and new tokens behind others."""
        decoder = self.llava.decoder
        rng = np.random.default_rng(0)
        embeds = self.llava.encoder.embed(rng.integers(3, 1000, rows * new)).reshape(rows, new, -1)
        slots, last = np.full(rows, before), np.full(rows, new - 1)

        def step() -> None:
            decoder.begin(rows)
            decoder.step(embeds, slots, last)

        return step


def operators(events: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds a run by kind: products with their shape and speed, attention, and the rest by name."""
    microseconds: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    work: dict[str, float] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("kernel_time"):
            continue
        if not any(run["ts"] <= event["ts"] < run["ts"] + run["dur"] for run in runs):
            continue
        name = kind = event["args"]["op_name"]
        if name in PRODUCTS:
            (x, *_), (y, *_) = (
                [next(iter(each.values())) for each in event["args"][key]]
                for key in ("input_type_shape", "output_type_shape")
            )
            kind = f"{name} {' x '.join(map(str, x))} to {y[-1]}"
            work[kind] = 2 * np.prod(x, dtype=float) * y[-1]
        microseconds[kind] += event["dur"]
        counts[kind] += 1
    number = len(runs)
    rows = {}
    for kind, total in microseconds.most_common():
        rows[kind] = {"ms": round(total / number / 1000, 3), "count": counts[kind] // number}
        if kind in work and not kind.startswith("Conv"):
            rows[kind]["gflops_per_s"] = round(work[kind] * counts[kind] / total / 1000, 1)
    shares = collections.Counter()
    for kind, total in microseconds.items():
        name = kind.split(" ", 1)[0]
        shares["products" if name in PRODUCTS else "attention" if name in ATTENTION else "the rest"] += total
    return {
        "ms": round(statistics.mean(run["dur"] for run in runs) / 1000, 2),
        "shares_ms": {name: round(total / number / 1000, 2) for name, total in shares.items()},
        "operators": rows,
    }


def core_peak() -> float:
    """Thousand millions of multiplications and additions of floats a second, of one core that does nothing else."""
    compiler = os.environ.get("CC") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        raise OSError(f"want a C compiler, found none of {', '.join(COMPILERS)}; name one in the variable CC")
    with tempfile.TemporaryDirectory() as place:
        source, library = Path(place, "peak.c"), Path(place, "peak.so")
        source.write_text(PEAK, encoding="utf-8")
        flags = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
        subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
        measure = ctypes.CDLL(str(library)).measure
    measure.restype, measure.argtypes = ctypes.c_double, [ctypes.c_long]
    return round(max(measure(5_000_000) for _ in range(7)) / 1e9, 1)


def float_products(shapes: list[tuple[int, int, int]]) -> dict[str, float]:
    """PyTorch's speed at ``[rows, in] x [in, out]`` on one thread, the weights not in the caches."""
    torch.set_num_threads(1)
    found = {}
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs)
        weights = [torch.randn(inputs, outputs) for _ in range(max(2, (1 << 26) // (4 * inputs * outputs)))]
        seconds = []
        for turn in range(24):
            began = time.perf_counter()
            torch.mm(x, weights[turn % len(weights)])
            seconds.append(time.perf_counter() - began)
        found[f"{rows} x {inputs} to {outputs}"] = round(2e-9 * rows * inputs * outputs / min(seconds), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("large", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON")
    parser.add_argument("--turns", type=int, default=10)
    given = parser.parse_args()
    result = {**circumstances(), "fp32": given.fp32.name, "large": given.large.name}
    with tempfile.TemporaryDirectory() as directory:
        profiles = floats(Watched(given.fp32, Path(directory)), given.turns)
        profiles |= rows_and_turns(Watched(given.large, Path(directory)), given.turns)
    shapes = [(197, 768, 768), (197, 768, 3072), (197, 3072, 768), (PROMPT, 576, 1536), (PROMPT, 1536, 576)]
    result |= {
        "core_peak_gflops_per_s": core_peak(),
        "read_gb_per_s": {str(threads): MemoryBandwidth().read(threads) for threads in (1, 2)},
        "torch_gflops_per_s": float_products(shapes),
        "cases": profiles,
    }
    save(given.output, result)
    print(table(result))


def floats(watched: Watched, turns: int) -> dict[str, Any]:
    """A picture and a prompt."""
    shape = watched.llava.manifest.vision
    pixels = np.random.default_rng(0).standard_normal((1, 3, shape.image_height, shape.image_width)).astype(np.float32)
    prompt = watched.tokens(1, PROMPT, 0)
    for _ in range(turns):
        watched.run("a picture", 0, lambda: watched.llava.encoder.vision.encode(pixels))
        watched.run(f"a prompt of {PROMPT}", 1, prompt)
    return watched.found()


def rows_and_turns(watched: Watched, turns: int) -> dict[str, Any]:
    """One row, eight of them in either kind of numbers, new tokens with and without others before them."""
    one, several = watched.tokens(1, 1, CONTEXT), watched.tokens(ROWS, 1, CONTEXT)
    alone, later = watched.tokens(1, NEW, 0), watched.tokens(1, NEW, BEFORE)
    for _ in range(turns):
        watched.run("1 row", 1, one)
        watched.llava.decoder.clear()  # which of two decoders runs may be settled when a batch begins
        with mock.patch.object(onnxruntime_backend, "INT8_FROM_TOKENS", SLOTS):
            watched.run(f"{ROWS} rows, int4", 1, several)
        watched.llava.decoder.clear()
        watched.run(f"{ROWS} rows, int8", 2, several)
        watched.run(f"{NEW} tokens", 2, alone)
        watched.run(f"{NEW} tokens behind {BEFORE}", 2, later)
    return watched.found()


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"one core: {result['core_peak_gflops_per_s']} Gflop/s at most"]
    lines += [f"  torch, {name}: {speed}" for name, speed in result["torch_gflops_per_s"].items()]
    for case, found in result["cases"].items():
        lines.append(f"{case}: {found['ms']} ms, {found['shares_ms']}")
        for kind, row in list(found["operators"].items())[:8]:
            speed = f", {row['gflops_per_s']} Gflop/s" if "gflops_per_s" in row else ""
            lines.append(f"  {row['ms']:8.2f} ms {row['count']:4d} x {kind}{speed}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
