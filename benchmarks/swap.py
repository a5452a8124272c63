"""How long a swap of a projector, and of a decoder, takes beside an export of the whole model, with and without engine.

The checkpoint has TinyLlama-1.1B's shape and CLIP ViT-L's at 336 pixels, its weights drawn, and is written to the disk
first. Turns are interleaved, and the minimum of each is taken: export, swap of the projector, swap of the decoder. With
``--engine`` the bundle has its ONNX Runtime engine, which the swap builds again as far as it has to, and the export is
followed by ``build``. Nothing is read from a cold disk.

    python benchmarks/swap.py work -o benchmarks/results/swap.json
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import circumstances, save
from written_checkpoint import VISION_L, llava, write_checkpoint

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.names import Precision
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.swap.swap import swap

DECODER = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 32064,
}  # fmt: skip


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def measure(source: Path, place: Path, precision: Precision, *, engine: bool, rounds: int) -> dict[str, Any]:
    """Minima of each step, in seconds, and the bundle's bytes."""
    bundle, taken = place / f"bundle-{precision}", dict[str, list[float]]()

    def fresh() -> None:
        checkpoint = open_checkpoint(source)
        if precision == "int4":
            checkpoint = round_to_nearest(checkpoint, QuantizeOptions(128, False, "fp16"))
        export(checkpoint, bundle, precision, replace=True)
        if engine:
            build_onnxruntime(bundle)

    steps: dict[str, Callable[[], object]] = {
        "export": fresh,
        "swap projector": lambda: swap(open_checkpoint(source), bundle, "projector"),
        "swap decoder": lambda: swap(open_checkpoint(source), bundle, "decoder"),
    }
    for _ in range(rounds):
        for name, step in steps.items():
            taken.setdefault(name, []).append(seconds(step))
    files = [path for path in bundle.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if ENGINES not in path.relative_to(bundle).parts)
    shutil.rmtree(bundle)
    return {"seconds": {name: min(each) for name, each in taken.items()}, "all": taken, "bundle_bytes": size}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for the checkpoint and the bundles; 12 GB with --engine")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.work / "checkpoint"
    if not source.exists():
        write_checkpoint(source, llava(dict(VISION_L, image_size=336, patch_size=14), DECODER))
    found: dict[str, Any] = {}
    precisions: tuple[Precision, ...] = ("fp16", "int4")
    for precision in precisions:
        found[precision] = measure(source, options.work, precision, engine=options.engine, rounds=options.rounds)
        row = ", ".join(f"{name} {value:.1f} s" for name, value in found[precision]["seconds"].items())
        print(f"{precision}, {found[precision]['bundle_bytes'] / 1e9:.2f} GB: {row}")
    result = {**circumstances(), "engine": options.engine, "precisions": found}
    save(options.output, result)


if __name__ == "__main__":
    main()
