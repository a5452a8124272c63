"""The planner's memory of onnxruntime-cuda beside what the check measured, and what its constant would have to be.

    PYTHONPATH=benchmarks python benchmarks/gpu_check/planned_memory.py OUT/gpu_check.json [...]

Prints a line for each speed part: bytes of the device that were measured, those that the planner counts, and what is
left, which is what ``PROVIDER`` in ``engines/planner/onnxruntime_cuda_memory.py`` stands for; then the host's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts import MEASURED
from shapes import GROUP_SIZE, config_of

from llava_deploy.engines.names import Precision
from llava_deploy.engines.planner.model import Sizes
from llava_deploy.engines.planner.onnxruntime_cuda_memory import CONTEXT, PROVIDER, cuda_run_memory
from llava_deploy.exporter.plan_source import planned_config
from llava_deploy.exporter.quantization.request import QuantizeOptions

GB = 1e9


@dataclass(frozen=True)
class Compared:
    """One part; bytes.

    Attributes:
        part: its name.
        measured: the device's peak, over an empty context.
        counted: by the planner, without context and constant.
        host_measured: the host's peak, mapped files included.
        host_planned: the same by the planner.
    """

    part: str
    measured: int
    counted: int
    host_measured: int | None
    host_planned: int

    @property
    def left(self) -> int:
        """What the constant would have to be."""
        return self.measured - self.counted

    @property
    def error(self) -> float:
        """Of the planner with the constant that it has, as a share of what was measured."""
        return (self.counted + PROVIDER) / self.measured - 1


def compared(check: dict[str, Any]) -> Iterator[Compared]:
    """The parts of a ``gpu_check.json`` that measured the backend on a GPU."""
    for part in check["parts"]:
        names = part["name"].split("/")
        if names[2:] != ["onnxruntime-cuda", "speed"] or part["status"] != "passed":
            continue
        result = part["result"]
        if result["device_peak_bytes"] is not None:
            yield _compared(part["name"], names[0], names[1], result)


def _compared(name: str, shape: Any, weights: str, result: dict[str, Any]) -> Compared:
    precision: Precision = "fp16" if weights == "fp16" else "int4"
    options = QuantizeOptions(GROUP_SIZE, weights == "int4-symmetric", "fp16")
    model = planned_config(config_of(shape), name, precision, options, {})
    # A cache of the full length, and the one prompt that was read.
    memory = cuda_run_memory(model, Sizes(1, MEASURED[shape].max_len, result["prompt_tokens"], 1))
    return Compared(
        name,
        result["device_peak_bytes"],
        memory.device - CONTEXT - PROVIDER,
        result["host_peak_bytes"],
        memory.anonymous + memory.mapped,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE")
    for path in parser.parse_args().results:
        for one in compared(json.loads(path.read_text(encoding="utf-8"))):
            host = "" if one.host_measured is None else f"; host {one.host_measured / GB:.2f} GB"
            print(
                f"{one.part}: device {one.measured / GB:.2f} GB, counted {one.counted / GB:.2f}, left "
                f"{one.left / GB:.2f} (now {PROVIDER / GB:.2f}, {one.error:+.0%}){host}, planned "
                f"{one.host_planned / GB:.2f}"
            )


if __name__ == "__main__":
    main()
