"""Peak memory of export, build and run, anonymous and mapped apart: what the planner's estimates are held against.

    python benchmarks/planner_peaks.py DIRECTORY --models demo 150m -o benchmarks/results/planner_peaks.json

Writes synthetic checkpoints into DIRECTORY, and runs every stage as a process of its own, whose ``RssAnon`` and
``RssFile`` are read a thousand times a second. What FILE holds already of other models and stages stays in it, so that
the large ones can be measured one by one. 7B wants 14 GB of disk for the checkpoint and as much again for fp16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Figures, circumstances, measured_process, save
from written_checkpoint import VISION_L, llava, llava_7b, write_checkpoint

from llava_deploy.engines.tensorrt_module import import_tensorrt
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import checkpoint_dir

INTERVAL = 0.001  # seconds between two looks at a process
PRECISIONS = {
    "fp32": [],
    "fp16": [],
    "int4": ["--precision", "int4"],
    "int4-symmetric": ["--precision", "int4", "--symmetric"],
    "int4-head": ["--precision", "int4", "--lm-head", "int8"],
    "int4-awq": ["--precision", "int4-awq", "--calibration", "demo"],
}
STAGES = ("export", "build onnxruntime", "run onnxruntime", "build onnxruntime-cuda", "build tensorrt-rtx")

CLI = "from llava_deploy.cli import main; main()"
RUN = """
import sys
import numpy as np
from PIL import Image
from llava_deploy.runtime import Llava
batch, length, pictures = map(int, sys.argv[2:])
llava = Llava.load(sys.argv[1], max_len=length, backend="onnxruntime")
vision, chat = llava.manifest.vision, llava.manifest.chat
word = len(llava.encoder.tokenizer.encode(" what" * 64, add_special_tokens=False).ids) / 64
prompt = chat.placeholder * pictures + " what" * int((length - 12 - pictures * vision.patches) / word)
rng = np.random.default_rng(0)
size = (vision.image_height, vision.image_width, 3)
images = [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for _ in range(pictures)]
answers = llava.generate([prompt] * batch, [images] * batch, max_new_tokens=4)
print(answers[0].timings.prompt_tokens)
"""
RTX = """
import sys
from pathlib import Path
from llava_deploy.engines.tensorrt.builder import build_tensorrt
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions
targets = tuple(sys.argv[2].split("-"))
options = TensorRtBuildOptions("tensorrt-rtx", capabilities=targets, parts=1, skip_memory_check=True)
build_tensorrt(Path(sys.argv[1]), options, replace=True)
"""


@dataclass(frozen=True)
class Run:
    """What is bound in a run: rows, slots of the cache, pictures a row."""

    batch: int
    length: int
    pictures: int


CLIP_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
MODELS: dict[str, Any] = {
    "demo": None,
    "150m": lambda: llava(
        dict(CLIP_B, image_size=224, patch_size=16),
        {
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
            "num_key_value_heads": 4, "max_position_embeddings": 4096, "vocab_size": 32000,
        },
    ),
    "400m": lambda: llava(
        dict(CLIP_B, image_size=224, patch_size=16),
        {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16,
            "num_key_value_heads": 16, "max_position_embeddings": 2048, "vocab_size": 32000,
        },
    ),
    "1b": lambda: llava(
        dict(VISION_L, image_size=336, patch_size=14),
        {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
            "num_key_value_heads": 4, "max_position_embeddings": 4096, "vocab_size": 32000,
        },
    ),
    "7b-4-layers": lambda: llava_7b(4),
    "7b": lambda: llava_7b(32),
}  # fmt: skip
RUNS = {
    "demo": (Run(1, 1024, 1), Run(8, 512, 2)),
    "150m": (Run(1, 4096, 1), Run(4, 1024, 4), Run(2, 2048, 1)),
    "400m": (Run(1, 1024, 2),),
    "1b": (Run(1, 1024, 1), Run(2, 2048, 3)),
    "7b-4-layers": (Run(1, 1024, 1),),
    "7b": (Run(1, 640, 1),),
}


def peaks(command: list[str]) -> Figures:
    """A command's largest anonymous and mapped memory, and how long it took."""
    figures = measured_process(command, INTERVAL)
    return {name: figures[name] for name in ("anonymous", "mapped", "resident", "seconds")}


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def measured(
    model: str, checkpoint: Path, precision: str, stages: list[str], work: Path
) -> Iterator[tuple[dict[str, Any], Figures]]:
    """Every stage of one precision, in the order in which they need each other."""
    bundle = work / f"{model}-{precision}"
    options = PRECISIONS[precision] or ["--precision", precision]
    export = python(CLI, "export", checkpoint, "-o", bundle, *options, "--quiet")
    if "export" in stages or not bundle.exists():
        shutil.rmtree(bundle, ignore_errors=True)
        yield {"stage": "export"}, peaks(export)
    if "build onnxruntime" in stages:
        build = python(CLI, "build", bundle, "--backend", "onnxruntime", "--force", "--quiet")
        yield {"stage": "build onnxruntime"}, peaks(build)
    if "run onnxruntime" in stages:
        engine = any((bundle / "engines").glob("onnxruntime-*"))
        for run in RUNS[model]:
            found = peaks(python(RUN, bundle, run.batch, run.length, run.pictures))
            yield {"stage": "run onnxruntime", "engine": engine, **dataclasses.asdict(run)}, found
    if "build onnxruntime-cuda" in stages and precision != "fp32":
        build = python(CLI, "build", bundle, "--backend", "onnxruntime-cuda", "--force", "--quiet")
        yield {"stage": "build onnxruntime-cuda"}, peaks(build)
    if "build tensorrt-rtx" in stages:
        for targets in ("sm89", "sm80-sm120") if model == "demo" else ("sm89",):
            yield {"stage": "build tensorrt-rtx", "targets": targets}, peaks(python(RTX, bundle, targets))


def keep(path: Path, result: dict[str, Any], entry: dict[str, Any]) -> None:
    """Put an entry in the place of the one of the same circumstances."""
    figures = ("anonymous", "mapped", "resident", "seconds", "date")
    key = {name: value for name, value in entry.items() if name not in figures}
    result["peaks"] = [old for old in result["peaks"] if {n: v for n, v in old.items() if n not in figures} != key]
    result["peaks"].append(entry)
    save(path, result)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "150m"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "fp16", "int4"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and bundles in DIRECTORY")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"models": {}, "peaks": []}
    if options.output.exists():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    result = {
        **circumstances(),
        "tensorrt_rtx": import_tensorrt("tensorrt-rtx").version,
        "models": result["models"],
        "peaks": result["peaks"],
    }
    for model in options.models:
        checkpoint = checkpoint_dir() if MODELS[model] is None else options.directory / model
        if not checkpoint.exists():
            write_checkpoint(checkpoint, MODELS[model]())
        result["models"][model] = dataclasses.asdict(open_checkpoint(checkpoint).config)
        for precision in options.precisions:
            for what, found in measured(model, checkpoint, precision, options.stages, options.directory):
                entry = {"model": model, "precision": precision, **what, **found, "date": result["date"]}
                print(json.dumps(entry), flush=True)
                keep(options.output, result, entry)
            if not options.keep:
                shutil.rmtree(options.directory / f"{model}-{precision}")
        if not options.keep and MODELS[model] is not None:
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
