"""Perplexity of a decoder in fp32, int4 (round to nearest) and int4-awq, from the weights that the bundles hold.

    python benchmarks/int4_perplexity.py checkpoint/ --text text.txt --calibration other.txt --work work/ -o result.json

Every variant is quantised and exported as `llava-deploy export` does it, read back from its bundle, and run by PyTorch
in float32 over the same windows of text, which do not overlap; the first token of each is not scored. All variants
read a window before the next one comes, so the figures of a run that was stopped are all of the same text. AWQ runs in
a process of its own, so that its memory can be told. Bundles stay in the work directory, and the next run takes them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import circumstances, peak_memory, save, token_windows, write_calibration
from torch import nn

from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.awq.calibration import read_calibration
from llava_deploy.exporter.quantization.awq.quantize import AwqOptions, awq, read_report
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.quantization.stored import with_stored_decoder
from llava_deploy.exporter.reference.torch_model import load_torch

SAMPLE_TOKENS = 512
FORMS = ("asymmetric", "symmetric")
REFERENCE = "fp32"


@dataclass(frozen=True)
class Variant:
    """One way to store the decoder."""

    method: str
    group_size: int
    form: str

    @property
    def name(self) -> str:
        return f"{self.method} g{self.group_size} {self.form}"

    @property
    def directory(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def options(self) -> QuantizeOptions:
        return QuantizeOptions(self.group_size, self.form == "symmetric", "fp16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a float LLaVA checkpoint; smollm2_llava.py makes one")
    parser.add_argument("--text", type=Path, required=True, help="natural text in UTF-8")
    parser.add_argument("--calibration", type=Path, required=True, help="other text in UTF-8, for AWQ's search")
    parser.add_argument("--work", type=Path, required=True, help="directory for bundles and AWQ's state")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON")
    parser.add_argument("--group-size", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--form", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--window", type=int, default=1024, help="tokens the model sees at once (1024)")
    parser.add_argument("--windows", type=int, help="how many of them (as many as the text has)")
    parser.add_argument("--processes", type=int, default=1, help="that read windows, each with all models (1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    windows = token_windows(arguments.text, checkpoint.tokenizer_json, arguments.window)[: arguments.windows]
    samples = arguments.work / "calibration.jsonl"
    arguments.work.mkdir(parents=True, exist_ok=True)
    count = write_calibration(arguments.calibration, samples, checkpoint.tokenizer_json, SAMPLE_TOKENS)
    print(f"text: {windows.size:,} tokens; calibration: {count} samples of {SAMPLE_TOKENS} tokens", flush=True)

    variants = [Variant(m, g, f) for f in arguments.form for g in arguments.group_size for m in ("int4", "int4-awq")]
    made = {v.name: make_bundle(v, arguments.checkpoint, arguments.work, arguments.threads) for v in variants}
    result = {
        **circumstances(),
        "text": arguments.text.name,
        "window": arguments.window,
        "calibration": f"{arguments.calibration.name}, {count} samples of {SAMPLE_TOKENS} tokens",
        "awq": {name: without_rows(cost) for name, cost in made.items() if cost is not None},
    }
    result["processes"], result["threads"] = arguments.processes, arguments.threads
    of = (arguments.checkpoint, arguments.work, variants, arguments.threads)
    with multiprocessing.get_context("spawn").Pool(arguments.processes, load_models, of) as pool:
        collect(pool.imap(read_window, windows), arguments.output, result, len(windows))


def make_bundle(variant: Variant, checkpoint: Path, work: Path, threads: int) -> dict[str, Any] | None:
    """Export a variant, unless it is there already; AWQ's costs and errors."""
    bundle, costs = work / variant.directory, work / f"{variant.directory}.json"
    if not bundle.exists():
        print(f"{variant.name}: quantising", flush=True)
        if variant.method == "int4":
            export(round_to_nearest(open_checkpoint(checkpoint), variant.options), bundle, "int4")
            return None
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(run_awq, (variant, checkpoint, work, threads, costs))
    return json.loads(costs.read_text(encoding="utf-8")) if variant.method == "int4-awq" else None


def run_awq(variant: Variant, directory: Path, work: Path, threads: int, costs: Path) -> None:
    """AWQ and export, in this process; times, peak memory and the linear layers' errors go to ``costs``."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(directory)
    samples = read_calibration(work / "calibration.jsonl", checkpoint)
    before, began, done = peak_memory(), time.perf_counter(), []
    quantized = awq(
        checkpoint,
        AwqOptions(variant.options, "cpu", SAMPLE_TOKENS),
        samples,
        work / f"{variant.directory}-state",
        lambda _done, _total: done.append(time.perf_counter()),
    )
    seconds, peak = time.perf_counter() - began, peak_memory()
    layers = [later - earlier for earlier, later in pairwise(done)]
    found = {
        "threads": threads,
        "layers": len(layers),  # fewer than the model's where a run was picked up
        "seconds": round(seconds, 1),
        "seconds_per_layer": round(statistics.median(layers), 2) if layers else None,
        "peak_bytes_before": before,
        "peak_bytes": peak,
        "linears": [asdict(row) for row in read_report(work / f"{variant.directory}-state", checkpoint).linears],
    }
    save(costs, found)
    export(quantized, work / variant.directory, "int4-awq")


def without_rows(costs: dict[str, Any]) -> dict[str, Any]:
    """AWQ's costs with its report on the linear layers in short."""
    return {**costs, "linears": linear_summary(costs["linears"])}


_models: dict[str, nn.Module] = {}
"""Of a worker: fp32's first."""


def load_models(directory: Path, work: Path, variants: list[Variant], threads: int) -> None:
    """Load PyTorch's decoders in float32 into a worker."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(directory)
    _models[REFERENCE] = load_torch(checkpoint).decoder
    for variant in variants:
        _models[variant.name] = load_torch(with_stored_decoder(checkpoint, work / variant.directory)).decoder


@torch.inference_mode()
def read_window(window: np.ndarray) -> dict[str, tuple[float, float]]:
    """Each model's mean loss over a window, and its mean KL divergence from fp32, in nats a token."""
    ids = torch.from_numpy(window)[None]
    found: dict[str, tuple[float, float]] = {}
    reference: torch.Tensor | None = None
    for name, model in _models.items():
        logs = F.log_softmax(model(ids, use_cache=False).logits[0, :-1], dim=-1)  # [window - 1, vocab]
        reference = logs if reference is None else reference
        divergence = F.kl_div(logs, reference, log_target=True, reduction="batchmean")
        found[name] = (float(F.nll_loss(logs, ids[0, 1:])), float(divergence))
    return found


def collect(
    readings: Iterable[dict[str, tuple[float, float]]], output: Path, result: dict[str, Any], windows: int
) -> None:
    """Put the windows together; the result is written after each, of the windows until then."""
    losses: dict[str, list[float]] = defaultdict(list)
    divergences: dict[str, list[float]] = defaultdict(list)
    for number, reading in enumerate(readings, 1):
        for name, (loss, divergence) in reading.items():
            losses[name].append(round(loss, 6))
            divergences[name].append(round(divergence, 6))
        result |= {"windows": number, "scored_tokens": number * (result["window"] - 1)}
        result |= {"losses": losses, "divergences": divergences}
        result["perplexity"] = {name: summary(name, losses, divergences) for name in reading}
        save(output, result)
        if number in (1, windows) or number % 10 == 0:
            print(f"after {result['scored_tokens']:,} tokens\n{table(result)}", flush=True)


def summary(name: str, losses: dict[str, list[float]], divergences: dict[str, list[float]]) -> dict[str, Any]:
    """Perplexity; the loss above that of fp32 and above that of round to nearest, each with its standard error."""
    found: dict[str, Any] = {"perplexity": round(math.exp(statistics.fmean(losses[name])), 4)}
    if name != REFERENCE:
        found["kl"] = round(statistics.fmean(divergences[name]), 6)
        found["above_fp32"] = difference(losses[name], losses[REFERENCE])
    if "-awq" in name:
        found["above_int4"] = difference(losses[name], losses[name.replace("-awq", "")])
        found["kl_above_int4"] = difference(divergences[name], divergences[name.replace("-awq", "")])
    return found


def difference(found: list[float], base: list[float]) -> dict[str, float]:
    """Mean and standard error of the difference, window by window, in nats a token."""
    deltas = [one - other for one, other in zip(found, base, strict=True)]
    error = statistics.stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else math.nan
    return {"mean": round(statistics.fmean(deltas), 6), "standard_error": round(error, 6)}


def linear_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """AWQ's output error over round to nearest's, by kind of linear layer, on the calibration text."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        kinds[row["name"].split(".")[-2]].append(row["awq_error"] / row["rtn_error"])
    return {
        kind: {
            "linears": len(ratios),
            "less": sum(ratio < 1 for ratio in ratios),
            "median": round(statistics.median(ratios), 4),
            "worst": round(max(ratios), 4),
            "scaled": sum(row["ratio"] > 0 for row in rows if row["name"].split(".")[-2] == kind),
        }
        for kind, ratios in kinds.items()
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'variant':28}{'perplexity':>11}{'KL':>10}{'loss above int4':>24}"]
    for name, row in result["perplexity"].items():
        above = row.get("above_int4")
        ahead = "" if above is None else f"{above['mean']:+.5f} ± {above['standard_error']:.5f}"
        lines.append(f"{name:28}{row['perplexity']:>11.3f}{row.get('kl', 0.0):>10.5f}{ahead:>24}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
