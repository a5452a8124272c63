"""What the benchmarks share: the text as token windows, and where and with what a result was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

PACKAGES = ("llava-deploy", "torch", "transformers", "onnxruntime", "numpy")


def token_windows(path: Path, tokenizer_json: bytes, window: int) -> np.ndarray:
    """A text's tokens, int64 ``[windows, window]``; those that do not fill the last window are left out."""
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return np.array(ids[: len(ids) // window * window], np.int64).reshape(-1, window)


def write_calibration(source: Path, target: Path, tokenizer_json: bytes, tokens: int) -> int:
    """Cut a text into calibration samples of ``tokens`` tokens, a JSON line each; how many there are."""
    text = source.read_text(encoding="utf-8")
    offsets = Tokenizer.from_buffer(tokenizer_json).encode(text, add_special_tokens=False).offsets
    starts = range(0, len(offsets) - tokens + 1, tokens)
    lines = [json.dumps({"text": text[offsets[at][0] : offsets[at + tokens - 1][1]]}) for at in starts]
    target.write_text("\n".join(lines), encoding="utf-8")
    return len(lines)


def circumstances() -> dict[str, Any]:
    """Date, machine and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {models[0] if models else platform.processor()}",
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in PACKAGES}},
    }


def peak_memory() -> int:
    """Largest resident set of this process until now, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: has no VmHWM; this benchmark needs Linux")


Figures = dict[str, Any]
"""Of a process: ``anonymous``, ``mapped`` and ``resident`` (peaks, bytes), ``seconds``, ``cpu_seconds``, ``output``."""


def measured_process(command: list[str], interval: float) -> Figures:
    """Run a command to its end, and look at its memory every ``interval`` seconds."""
    highest = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key in highest:
                highest[key] = max(highest[key], int(value.split()[0]) * 1024)
        time.sleep(interval)
    seconds = time.perf_counter() - began
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "anonymous": highest["RssAnon"],
        "mapped": highest["RssFile"],
        "resident": highest["VmHWM"],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "output": output,
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result where the benchmarks keep theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # numbers on one line
    path.write_text(text + "\n", encoding="utf-8")
