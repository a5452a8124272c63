"""What ONNX Runtime's accuracy levels cost in perplexity, and how fast each decodes.

    python benchmarks/int4_accuracy_level.py checkpoint/ work/int4-g32-asymmetric --text text.txt -o result.json

The text goes through the bundle's decoder one token at a time, as in an answer, at every level; PyTorch reads the same
windows in float32 with the weights that the bundle stands for. The levels take turns, some tokens each, and their
speeds are medians over the turns: compare them within a run.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import circumstances, save, token_windows

from llava_deploy.engines.names import AccuracyLevel
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.quantization.stored import with_stored_decoder
from llava_deploy.exporter.reference.torch_model import load_torch
from llava_deploy.runtime import Llava

LEVELS: tuple[AccuracyLevel, ...] = (0, 1, 4)
TURN = 64
"""Tokens that a level reads before the next one's turn."""


class Reader:
    """One level: its session, and what it has measured."""

    def __init__(self, bundle: Path, level: AccuracyLevel, slots: int, threads: int) -> None:
        self.level = level
        self.losses: list[float] = []
        self.choices: list[int] = []
        self.speeds: list[float] = []
        self._llava = Llava.load(bundle, accuracy_level=level, max_len=slots, threads=threads)
        self._llava.decoder.begin(1)
        self._first = np.zeros(1, np.int64)
        self.read(np.zeros(3, np.int64), 0)  # the first runs are slower
        self.losses, self.choices, self.speeds = [], [], []

    def read(self, ids: np.ndarray, start: int) -> None:
        """Read all tokens but the last at the slots from ``start`` on, and score each one's successor."""
        seconds = 0.0
        for at, token in enumerate(ids[:-1]):
            began = time.perf_counter()
            embeds = self._llava.encoder.embed(np.array([token]))[:, None]  # [1, 1, hidden]
            logits = self._llava.decoder.step(embeds, np.array([start + at]), self._first)[0]
            seconds += time.perf_counter() - began
            top = float(logits.max())
            self.losses.append(top + math.log(float(np.exp(logits - top).sum())) - float(logits[ids[at + 1]]))
            self.choices.append(int(logits.argmax()))
        self.speeds.append((len(ids) - 1) / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what the bundle was made from")
    parser.add_argument("bundle", type=Path, help="an int4 bundle")
    parser.add_argument("--text", type=Path, required=True, help="natural text in UTF-8")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context at the most (1024)")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    windows = token_windows(arguments.text, checkpoint.tokenizer_json, arguments.window)[: arguments.windows]
    readers = [Reader(arguments.bundle, level, arguments.window, arguments.threads) for level in LEVELS]
    for window in windows:
        for start in range(0, len(window) - 1, TURN):
            for reader in readers:
                reader.read(window[start : start + TURN + 1], start)
    torch.set_num_threads(arguments.threads)
    wanted = torch_losses(arguments.checkpoint, arguments.bundle, windows)
    result = {
        **circumstances(),
        "bundle": arguments.bundle.name,
        "text": arguments.text.name,
        "window": arguments.window,
        "scored_tokens": len(wanted),
        "threads": arguments.threads,
        "torch": {"perplexity": round(math.exp(statistics.fmean(wanted)), 4)},
        "levels": {str(reader.level): summary(reader, readers[0], wanted) for reader in readers},
    }
    save(arguments.output, result)
    print(table(result))


@torch.inference_mode()
def torch_losses(directory: Path, bundle: Path, windows: np.ndarray) -> list[float]:
    """PyTorch's loss of every token but each window's first, nats."""
    model = load_torch(with_stored_decoder(open_checkpoint(directory), bundle)).decoder
    losses: list[float] = []
    for window in windows:
        ids = torch.from_numpy(window)[None]
        losses += F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    return losses


def summary(reader: Reader, base: Reader, wanted: list[float]) -> dict[str, Any]:
    """Perplexity, the loss above PyTorch's with its standard error, agreement and speed with the first level's."""
    deltas = [found - want for found, want in zip(reader.losses, wanted, strict=True)]
    turns = [speed / other for speed, other in zip(reader.speeds, base.speeds, strict=True)]
    same = [one == other for one, other in zip(reader.choices, base.choices, strict=True)]
    return {
        "perplexity": round(math.exp(statistics.fmean(reader.losses)), 4),
        "above_torch": round(statistics.fmean(deltas), 6),
        "standard_error": round(statistics.stdev(deltas) / math.sqrt(len(deltas)), 6),
        "same_choice_as_level_0": round(statistics.fmean(same), 4),
        "tokens_per_second": round(statistics.median(reader.speeds), 1),
        "times_level_0": round(statistics.median(turns), 3),
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{result['scored_tokens']:,} tokens; PyTorch: perplexity {result['torch']['perplexity']:.3f}"]
    lines += [
        f"level {level}: perplexity {row['perplexity']:.3f}, loss {row['above_torch']:+.5f} "
        f"± {row['standard_error']:.5f} to PyTorch's, {row['same_choice_as_level_0']:.1%} of its choices level 0's, "
        f"{row['tokens_per_second']:.1f} tokens/s, {row['times_level_0']:.2f} x level 0"
        for level, row in result["levels"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
