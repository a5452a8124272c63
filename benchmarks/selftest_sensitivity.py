"""Which single faults the self-test sees: every weight tensor of the shipped model scaled by 1 %, one at a time.

    python benchmarks/selftest_sensitivity.py --json results/selftest_sensitivity.json

For each precision, and with ``--engine`` for engines of ONNX Runtime as well: the tensor is changed in the bundle's
graph (of an int4 weight, its scales), the manifest is put right, so that the files pass, and the self-test runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.manifest import (
    DECODER_GRAPH,
    EMBEDDING_TABLE,
    MANIFEST_NAME,
    VISION_GRAPH,
    describe_file,
    read_manifest,
)
from llava_deploy.engines.names import Precision
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import checkpoint_dir
from llava_deploy.exporter.export import export
from llava_deploy.exporter.goldens.record import record
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.selftest.selftest import selftest

EXPECTED = {VISION_GRAPH: "image features", DECODER_GRAPH: "logits", EMBEDDING_TABLE: "splice"}


def make_bundle(bundle: Path, precision: Precision) -> None:
    """The shipped checkpoint with its goldens."""
    opened = open_checkpoint(checkpoint_dir())
    rounded = round_to_nearest(opened, QuantizeOptions(128, symmetric=False, lm_head="fp16"))
    export(rounded if precision == "int4" else opened, bundle, precision)
    record(opened, bundle)


def tensors(bundle: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """File, name and values, mapped to be written to, of every float tensor that is kept outside a graph."""
    for graph in (VISION_GRAPH, DECODER_GRAPH):
        for tensor in onnx.load(bundle / graph, load_external_data=False).graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            if where and dtype in (np.float16, np.float32) and tensor.dims:
                shape, offset = tuple(tensor.dims), int(where["offset"])
                yield graph, tensor.name, np.memmap(bundle / where["location"], dtype, "r+", offset, shape)
    yield EMBEDDING_TABLE, EMBEDDING_TABLE, np.load(bundle / EMBEDDING_TABLE, mmap_mode="r+")


@contextmanager
def scaled(values: np.ndarray, factor: float) -> Iterator[None]:
    """Values multiplied for as long as the block runs."""
    before = np.array(values)
    values[...] = (before.astype(np.float64) * factor).astype(before.dtype)
    yield
    values[...] = before


def sign(bundle: Path) -> None:
    """Have the manifest list the files as they are."""
    manifest = read_manifest(bundle)
    files = tuple(describe_file(bundle, entry.path) for entry in manifest.files)
    (bundle / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8")


def sweep(bundle: Path, factor: float, *, engine: bool) -> list[dict[str, Any]]:
    """What the self-test says of each tensor."""
    found = []
    for file, name, values in tensors(bundle):
        with scaled(values, factor):
            sign(bundle)
            if engine:
                build_onnxruntime(bundle)
            report = selftest(bundle, Wanted("onnxruntime", threads=1))
        first = report.first_failure
        stage = None if first is None else first.result.kind
        of_stage = [one.result for one in report.stages if one.result.kind == EXPECTED[file]]
        nearest = max(result.error / result.tolerance for result in of_stage)
        found.append({"tensor": name, "wanted": EXPECTED[file], "found": stage, "over_its_limit": nearest})
    sign(bundle)
    return found


def main() -> None:
    """Measure, print a line for each bundle, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", action="append", choices=["fp32", "fp16", "int4"])
    parser.add_argument("--factor", type=float, default=1.01)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = options.precision if options.precision else ["fp32", "fp16", "int4"]
    result: dict[str, Any] = {"factor": options.factor}
    with tempfile.TemporaryDirectory() as place:
        for precision in [each for each in get_args(Precision) if each in wanted]:
            bundle = Path(place) / precision
            make_bundle(bundle, precision)
            for engine in (False, True) if options.engine else (False,):
                found = sweep(bundle, options.factor, engine=engine)
                shutil.rmtree(bundle / ENGINES, ignore_errors=True)
                key = f"{precision}, {'engine' if engine else 'graphs'}"
                result[key] = found
                right = sum(one["found"] == one["wanted"] for one in found)
                elsewhere = sum(one["found"] not in (None, one["wanted"]) for one in found)
                missed = [f"{one['tensor']} ({one['over_its_limit']:.2f})" for one in found if one["found"] is None]
                print(f"{key}: {right} of {len(found)} at their stage, {elsewhere} elsewhere, missed {len(missed)}:")
                print("   ", ", ".join(missed), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
