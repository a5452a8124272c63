"""What building the engines of a 7B model takes of memory, anonymous and mapped, and in which phase.

    python benchmarks/tensorrt_build_memory.py DIRECTORY [--precision int4] [--parts N] [-o RESULT.json]

Writes a bundle of LLaVA-1.5-7B's shape with drawn weights into DIRECTORY (5 GB in int4, 15 GB in fp16, and as much
again for the engines), builds it with TensorRT for RTX in a process of its own, and removes all of it in the end. The
decoder is built in parts, as many as a build has by default where --parts says nothing; ratios are to the weights of
the whole decoder. No GPU is needed. The building process offers itself to the system first, should memory run out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import circumstances, save

INTERVAL = 0.05  # seconds
KINDS = ("RssAnon", "RssFile", "VmRSS")

EXPORT = """
import sys
from pathlib import Path
from drawn_checkpoint import drawn_checkpoint, llava_7b
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
bundle, precision, layers, symmetric = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "symmetric"
checkpoint = drawn_checkpoint(llava_7b(layers))
if precision == "int4":
    checkpoint = round_to_nearest(checkpoint, QuantizeOptions(128, symmetric, "fp16"))
export(checkpoint, bundle, precision)
"""
BUILD = """
import json, sys, time
from pathlib import Path
from llava_deploy.engines.tensorrt.builder import build_tensorrt
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions
Path("/proc/self/oom_score_adj").write_text("1000")
parts = int(sys.argv[4]) if sys.argv[4:] else None
options = TensorRtBuildOptions(
    "tensorrt-rtx", max_batch=int(sys.argv[2]), max_len=2048, capabilities=(sys.argv[3],), parts=parts,
    skip_memory_check=True,
)
build_tensorrt(
    Path(sys.argv[1]), options, on_progress=lambda p: print(json.dumps([time.time(), p.what, p.phase]), flush=True)
)
"""


def export(bundle: Path, precision: str, layers: int, form: str) -> None:
    """Write the bundle, in a process of its own."""
    command = [sys.executable, "-c", EXPORT, str(bundle), precision, str(layers), form]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)


def memory_of(process: int) -> dict[str, int]:
    """What a process has in memory now, in bytes; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in fields if name in KINDS}


def build(bundle: Path, batch: int, capability: str, parts: int | None) -> dict[str, Any]:
    """Build all engines and watch the process: peaks by graph and part, and the phases that they were in."""
    wanted = [] if parts is None else [str(parts)]
    command = [sys.executable, "-c", BUILD, str(bundle), str(batch), capability, *wanted]
    log, begin, samples = bundle.parent / "phases", time.time(), []
    with log.open("w", encoding="utf-8") as phases, subprocess.Popen(command, stdout=phases) as process:
        while process.poll() is None:
            samples.append((time.time(), memory_of(process.pid)))
            time.sleep(INTERVAL)
    seconds = time.time() - begin
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    peaks: dict[str, dict[str, Any]] = {}
    for at, sizes in samples:
        before = [event for event in events if event[0] <= at]
        graph, phase = before[-1][1:] if before else ("", "")
        of_graph = peaks.setdefault(graph, {kind: {"bytes": 0, "phase": ""} for kind in KINDS})
        for kind, size in sizes.items():
            if size > of_graph[kind]["bytes"]:
                of_graph[kind] = {"bytes": size, "phase": phase, "second": round(at - begin, 1)}
    return {"rc": process.returncode, "seconds": round(seconds, 1), "peaks": peaks}


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export, build, and hold the peaks against the weights."""
    bundle = directory / "bundle"
    export(bundle, options.precision, options.layers, options.form)
    weights = {graph: (bundle / f"{graph}.onnx.data").stat().st_size for graph in ("vision", "decoder")}
    result = build(bundle, options.batch, options.capability, options.parts)
    if result["rc"]:
        raise SystemExit(
            f"the build has failed with {result['rc']}; its peaks: {json.dumps(result['peaks'], indent=1)}"
        )
    plans = {path.stem: path.stat().st_size for path in sorted(bundle.glob("engines/*/*.plan"))}
    ratios = {}
    for graph, size in weights.items():
        for kind in KINDS[:2]:
            peaks = [part[kind]["bytes"] for name, part in result["peaks"].items() if name.startswith(graph)]
            ratios[f"{graph} {kind}"] = round(max(peaks) / size, 3)
    recipe = json.loads(next(bundle.glob("engines/*/engine.json")).read_text(encoding="utf-8"))["key"]["tensorrt"]
    return {"weights": weights, "parts": recipe["parts"], "plans": plans, **result, "ratio_to_weights": ratios}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Memory that building a 7B model's TensorRT engines takes.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--precision", choices=("int4", "fp16"), default="int4")
    parser.add_argument("--form", choices=("asymmetric", "symmetric"), default="asymmetric", help="of int4 weights")
    parser.add_argument("--layers", type=int, default=32, help="of the decoder; 32 are 7B's")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--capability", default="sm89")
    parser.add_argument("--parts", type=int, help="of the decoder; by default the build's own choice")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    work = options.directory / "tensorrt_build_memory"
    work.mkdir(parents=True)
    try:
        result = measure(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    asked = {name: getattr(options, name) for name in ("precision", "form", "layers", "batch", "capability")}
    version = importlib.metadata.version("tensorrt-rtx-cu12")
    result = {**circumstances(), "tensorrt_rtx": version, **asked, **result}
    print(json.dumps(result, indent=1))
    if options.output is not None:
        save(options.output, result)


if __name__ == "__main__":
    main()
