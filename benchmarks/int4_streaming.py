"""How fast a checkpoint of LLaVA-1.5-7B's shape is rounded to int4, beside a copy of its bytes, and in how much memory.

    python benchmarks/int4_streaming.py DIRECTORY [--layers 32] [-o RESULT.json]

Writes a synthetic checkpoint into DIRECTORY (14 GB with 32 layers), and in turn copies its shards and exports it, each
in a process of its own; removes all of it in the end. Page caches are as the system leaves them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import circumstances, save
from safetensors.numpy import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_deploy.exporter.demo.scenes import checkpoint_dir

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
SHARD = 2_000_000_000  # bytes
VISION_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
"""CLIP ViT-L."""

COPY = """
import shutil, sys, time
from pathlib import Path
start = time.perf_counter()
for shard in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    shutil.copyfile(shard, Path(sys.argv[2]) / shard.name)
print(time.perf_counter() - start)
"""
EXPORT = """
import sys, time
from pathlib import Path
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
start = time.perf_counter()
checkpoint = open_checkpoint(Path(sys.argv[1]))
export(round_to_nearest(checkpoint, QuantizeOptions(128, False, "fp16")), Path(sys.argv[2]) / "bundle", "int4")
seconds = time.perf_counter() - start
status = Path("/proc/self/status").read_text().splitlines()
print(seconds, *(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")))
"""


def llava(vision: dict[str, int], decoder: dict[str, int]) -> LlavaConfig:
    """A LLaVA of the llava-hf layout, of any size."""
    shipped = json.loads((checkpoint_dir() / "config.json").read_text(encoding="utf-8"))
    token = shipped["image_token_index"]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**decoder), image_token_index=token
    )


def llava_7b(layers: int) -> LlavaConfig:
    """LLaVA-1.5-7B's, with so many decoder layers."""
    vision = dict(VISION_L, image_size=336, patch_size=14)
    decoder = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "vocab_size": 32064,
    }  # fmt: skip
    return llava(vision, decoder)


def write_checkpoint(directory: Path, config: LlavaConfig) -> int:
    """Write the checkpoint, float16 weights from a normal distribution; the bytes of its weights."""
    directory.mkdir()
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlavaForConditionalGeneration(config).state_dict().items()}
    config.save_pretrained(directory)
    for name in COMPANIONS:
        shutil.copyfile(checkpoint_dir() / name, directory / name)
    recipe = json.loads((directory / COMPANIONS[2]).read_text(encoding="utf-8"))
    side = config.vision_config.image_size
    recipe |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (directory / COMPANIONS[2]).write_text(json.dumps(recipe), encoding="utf-8")

    pool = (np.random.default_rng(0).standard_normal(1 << 25) * 0.02).astype(np.float16)
    shard: dict[str, np.ndarray] = {}
    index: dict[str, str] = {}
    total, held, number = 0, 0, 0
    for position, (name, shape) in enumerate(shapes.items()):
        size = int(np.prod(shape))
        shard[name] = np.resize(np.roll(pool[: min(size, len(pool))], position), size).reshape(shape)
        held += 2 * size
        if held >= SHARD or name == list(shapes)[-1]:
            file = f"model-{number:05}.safetensors"
            save_file(shard, directory / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            total, held, number, shard = total + held, 0, number + 1, {}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def run(code: str, checkpoint: Path, target: Path) -> list[float]:
    """Run ``code`` in a process of its own, over an empty ``target``; the numbers that it prints."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    command = [sys.executable, "-c", code, str(checkpoint), str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(target)
    return [float(number) for number in done.stdout.split()]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="int4 export of a synthetic 7B checkpoint, beside a copy of it.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="of the decoder; 32 are 7B's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    checkpoint, target = options.directory / "checkpoint", options.directory / "target"
    options.directory.mkdir(parents=True, exist_ok=True)
    try:
        size = write_checkpoint(checkpoint, llava_7b(options.layers))
        rounds = [(run(COPY, checkpoint, target)[0], run(EXPORT, checkpoint, target)) for _ in range(options.rounds)]
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
    copy, export = (statistics.median(times) for times in ([c for c, _ in rounds], [e[0] for _, e in rounds]))
    result: dict[str, Any] = {
        **circumstances(),
        "layers": options.layers,
        "source_bytes": size,
        "rounds": [{"copy_s": c, "export_s": e[0], "export_peak_rss": int(e[1])} for c, e in rounds],
        "copy_mb_per_s": size / copy / 1e6,
        "export_mb_per_s": size / export / 1e6,
        "export_peak_rss": int(max(e[1] for _, e in rounds)),
    }
    print(json.dumps(result, indent=1))
    if options.output is not None:
        save(options.output, result)


if __name__ == "__main__":
    main()
