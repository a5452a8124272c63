"""What packing a bundle costs beside copying it: sizes, and bytes a second of pack and unpack beside cp, in turns.

    python benchmarks/archive.py WORK -o benchmarks/results/archive.json

The shipped tiny model in each precision, and its fp16 bundle with a decoder of drawn weights in the place of its own,
which only an archive takes for one. What is written is on the disk when the clock stops. Takes three times --megabytes
of disk below WORK.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import circumstances, save

from llava_deploy.engines.manifest import DECODER_GRAPH, MANIFEST_NAME, describe_file, read_manifest
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import checkpoint_dir
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.prepare import prepare
from llava_deploy.exporter.quantization.request import QuantizeRequest
from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import Packed, pack
from llava_deploy.runtime.archive.unpack import unpack

PLAIN = PackOptions(goldens=False)
PRECISIONS = ("fp32", "fp16", "int4")
PIECE = 32 << 20  # bytes that are drawn at once


def exported(work: Path, precision: str) -> Path:
    """The shipped model in a precision."""
    bundle = work / precision
    if not bundle.exists():
        checkpoint = open_checkpoint(checkpoint_dir())
        if precision == "int4":
            request = QuantizeRequest(None, symmetric=False, lm_head=None, calibration=None, device=None)
            checkpoint = prepare(checkpoint, "int4", request, work / "int4.awq", lambda _done, _total: None)
        export(checkpoint, bundle, precision)
    return bundle


def drawn(work: Path, megabytes: int) -> Path:
    """The fp16 bundle with another file of weights, drawn from a normal distribution."""
    bundle = work / "drawn"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(exported(work, "fp16"), bundle)
    numbers = np.random.default_rng(0)
    with (bundle / f"{DECODER_GRAPH}.data").open("wb") as file:
        for _ in range(0, megabytes << 20, PIECE):
            file.write((numbers.standard_normal(PIECE // 2, np.float32) * 0.02).astype(np.float16).tobytes())
    manifest = read_manifest(bundle)
    files = tuple(describe_file(bundle, entry.path) for entry in manifest.files)
    (bundle / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8")
    return bundle


def size_of(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def sizes(packed: Packed) -> dict[str, Any]:
    return {"archive": packed.size, "weights": packed.weights, "ratio": round(packed.size / packed.weights, 4)}


def copy(bundle: Path, to: Path) -> None:
    """``cp -r``, and what it wrote is on the disk."""
    shutil.copytree(bundle, to)
    for path in to.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def speeds(bundle: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which each takes its turn."""
    archive, again, copied = work / "drawn.lvd", work / "again", work / "copied"
    found: dict[str, list[float]] = {"pack": [], "unpack": [], "copy": []}
    for _ in range(rounds):
        found["pack"].append(seconds(lambda: pack(bundle, archive, PLAIN, replace=True)))
        found["unpack"].append(seconds(lambda: unpack(archive, again)))
        shutil.rmtree(again)
        found["copy"].append(seconds(lambda: copy(bundle, copied)))
        shutil.rmtree(copied)
    archive.unlink()
    total, middle = size_of(bundle), {name: statistics.median(times) for name, times in found.items()}
    return {
        "bytes": total,
        "MB/s": {name: round(total / 1e6 / value, 1) for name, value in middle.items()},
        "times of a copy": {name: round(middle[name] / middle["copy"], 2) for name in ("pack", "unpack")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--megabytes", type=int, default=608, help="of drawn weights")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"benchmark": "archive", **circumstances(), "sizes": {}}
    bundles = {precision: exported(given.work, precision) for precision in PRECISIONS}
    bundles["drawn fp16"] = drawn(given.work, given.megabytes)
    for name, bundle in bundles.items():
        packed = pack(bundle, given.work / "size.lvd", PLAIN, replace=True)
        result["sizes"][name] = sizes(packed)
        print(name, result["sizes"][name], flush=True)
    (given.work / "size.lvd").unlink()
    result["speed"] = speeds(bundles["drawn fp16"], given.work, given.rounds)
    print(result["speed"])
    if given.output is not None:
        save(given.output, result)


if __name__ == "__main__":
    sys.exit(main())
