"""How fast a checkpoint of LLaVA-1.5-7B's shape is exported, beside `cat` of its files to the same disk.

    python benchmarks/export_7b.py DIRECTORY [--layers 8 32] [--rounds 3] [--start] -o benchmarks/results/export_7b.json

Writes a synthetic checkpoint into DIRECTORY (14.1 GB with 32 layers, and as much again for what is made of it), and
takes turns: `cat`, export in fp16, export in int4, each a process of its own. All alike begin with no page of the
checkpoint in the page cache and end when every byte is on the disk (fsync). Then `inspect` and `plan`, and with --start
the int4 bundle's first token with ONNX Runtime, as it is and with an engine. All files are removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import Figures, circumstances, measured_process, save
from written_checkpoint import llava_7b, write_checkpoint

INTERVAL = 0.02  # seconds between two looks at a process: often enough for seconds of work, and no work of its own
CAT = 'for file in "$1"/*.safetensors; do cat "$file" > "$2/${file##*/}" || exit 1; done; sync "$2"/*'
CLI = "from llava_deploy.cli import main; main()"
START = """
import json, sys, time
began = time.perf_counter()
from llava_deploy.runtime import Llava
imported = time.perf_counter()
llava = Llava.load(sys.argv[1], max_len=1024, backend="onnxruntime")
loaded = time.perf_counter()
llava.generate(["What is this?"], max_new_tokens=1)
done = time.perf_counter()
print(json.dumps({"import_s": imported - began, "load_s": loaded - imported, "first_token_s": done - loaded}))
"""


def cli(*arguments: object) -> list[str]:
    """A command of llava-deploy."""
    return [sys.executable, "-c", CLI, *map(str, arguments)]


def drop_from_page_cache(directory: Path) -> None:
    """Write a directory's files to the disk, and forget them in memory."""
    for path in directory.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def run(command: list[str]) -> Figures:
    """A command's figures."""
    return measured_process(command, INTERVAL)


def contenders(checkpoint: Path, target: Path) -> dict[str, list[str]]:
    """What takes turns, by name."""
    export = {p: cli("export", checkpoint, "-o", target / p, "--precision", p, "--quiet") for p in ("fp16", "int4")}
    return {"cat": ["sh", "-c", CAT, "sh", str(checkpoint), str(target)], **export}


def turns(checkpoint: Path, target: Path, rounds: int) -> dict[str, list[Figures]]:
    """All contenders' figures, round after round; who begins changes."""
    commands = contenders(checkpoint, target)
    figures: dict[str, list[Figures]] = {name: [] for name in commands}
    for number in range(rounds):
        names = list(commands)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            drop_from_page_cache(checkpoint)
            figures[name].append({key: value for key, value in run(commands[name]).items() if key != "output"})
            print(name, json.dumps(figures[name][-1]), flush=True)
    shutil.rmtree(target)
    return figures


def summary(source_bytes: int, figures: dict[str, list[Figures]]) -> dict[str, Any]:
    """Medians over the rounds, ratios to `cat` of the same round, and the largest peaks."""
    lines: dict[str, Any] = {}
    for name, found in figures.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(found, figures["cat"], strict=True)]
        seconds = statistics.median(f["seconds"] for f in found)
        lines[name] = {
            "seconds": seconds,
            "cpu_seconds": statistics.median(f["cpu_seconds"] for f in found),
            "mb_per_s": round(source_bytes / seconds / 1e6),
            "ratio_to_cat": round(statistics.median(ratios), 2),
            "anonymous": max(f["anonymous"] for f in found),
            "mapped": max(f["mapped"] for f in found),
        }
    return lines


def starts(checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """First tokens of the int4 bundle, three processes in turn: as exported, and with an engine."""
    bundle = work / "bundle"
    run(cli("export", checkpoint, "-o", bundle, "--precision", "int4", "--quiet"))
    found = []
    for engine in (False, True):
        if engine:
            run(cli("build", bundle, "--backend", "onnxruntime", "--quiet"))
        for turn in range(3):
            figures = run([sys.executable, "-c", START, str(bundle)])
            found.append({"engine": engine, "turn": turn, **json.loads(figures.pop("output")), **figures})
            print(json.dumps(found[-1]), flush=True)
    shutil.rmtree(bundle)
    return found


def measured(layers: int, work: Path, rounds: int, with_start: bool) -> dict[str, Any]:
    """Everything of one model; its files are removed."""
    checkpoint = work / "checkpoint"
    try:
        source_bytes = write_checkpoint(checkpoint, llava_7b(layers))
        figures = turns(checkpoint, work / "target", rounds)
        result: dict[str, Any] = {"layers": layers, "source_bytes": source_bytes}
        result |= {"summary": summary(source_bytes, figures), "rounds": figures}
        for name in ("inspect", "plan"):
            result[f"{name}_s"] = [run(cli(name, checkpoint, "--json"))["seconds"] for _ in range(rounds)]
        if with_start:
            result["starts"] = starts(checkpoint, work)
        return result
    finally:
        for name in ("checkpoint", "target", "bundle"):
            shutil.rmtree(work / name, ignore_errors=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32], help="of the decoder; 32 are 7B's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start", action="store_true", help="the int4 bundle's first token, too")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    kernel = subprocess.run(["uname", "-r"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    result: dict[str, Any] = {
        **circumstances(),
        "kernel": kernel,
        "page_cache": "no page of the checkpoint at the start of a turn",
        "ends": "when all files are on the disk (fsync), cat as well",
        "models": [],
    }
    for layers in options.layers:
        result["models"].append(measured(layers, options.directory, options.rounds, options.start))
        if options.output is not None:
            save(options.output, result)
    print(json.dumps([{"layers": m["layers"], **m["summary"]} for m in result["models"]], indent=1))


if __name__ == "__main__":
    main()
