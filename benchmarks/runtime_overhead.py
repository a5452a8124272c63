"""What the runtime's own Python costs: a token, the splice, a second turn, a cold start.

    python benchmarks/runtime_overhead.py BUNDLE --demo DEMO_BUNDLE -o benchmarks/results/runtime_overhead.json

BUNDLE has a decoder of some size, whose steps leave nothing of Python in the processor's caches; DEMO_BUNDLE is the
shipped model's (`llava-deploy demo -o demo` leaves one in `demo/bundle`). With --drawn a token is measured behind a
decoder of TinyLlama-1.1B's shape, too, whose weights are drawn. A token's overhead is the time from one step
to the next without the backend's run, in microseconds: choosing, detokenising, the stream's way to the caller and back,
embedding, the feed. Cases take turns, some tokens each.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from decode_bandwidth import write_bundle
from measuring import circumstances, save
from peers.our_weights import without_end
from PIL import Image

from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.runtime import GREEDY, Llava, SamplingOptions
from llava_deploy.runtime.backend import DecoderSession, Placement
from llava_deploy.runtime.pictures import take_picture
from llava_deploy.runtime.preprocess import preprocess_batch

PROMPT = "USER: Tell a story about a dog and a ship. ASSISTANT:"
QUESTIONS = ("What is in this picture? Tell me in some detail, please.", "And what else can you say about it?")
TOP_P = SamplingOptions(temperature=0.8, top_p=0.95, seed=0)
CASES: dict[str, tuple[int, SamplingOptions]] = {
    "batch 1, greedy": (1, GREEDY),
    "batch 1, top-p": (1, TOP_P),
    "batch 1, top-k": (1, SamplingOptions(temperature=0.8, top_k=50, seed=0)),
    "batch 1, temperature alone": (1, SamplingOptions(temperature=0.8, seed=0)),
    "batch 1, repetition penalty": (1, SamplingOptions(repetition_penalty=1.1)),
    "batch 8, greedy": (8, GREEDY),
    "batch 8, top-p": (8, TOP_P),
}
SIZES = ((640, 480), (4000, 3000))
SETTLED = 2.2
"""Seconds after which a file that was written counts as one that stays."""


class WatchedDecoder:
    """A decoder's session, and when each step ended; of a token's time, next to nothing is the watch's own."""

    def __init__(self, session: DecoderSession) -> None:
        self._session = session
        self.max_len = session.max_len
        self.max_seq = session.max_seq
        self.begin = session.begin
        self.clear = session.clear
        self.ended: list[float] = []
        self.run: list[float] = []
        """Seconds in the backend until then."""

    @property
    def run_seconds(self) -> float:
        """See :class:`DecoderSession`."""
        return self._session.run_seconds

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Run the decoder over new tokens; see :class:`DecoderSession`."""
        logits = self._session.step(inputs_embeds, write_indices, last_index, pictures)
        self.ended.append(time.perf_counter())
        self.run.append(self._session.run_seconds)
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="with an engine for ONNX Runtime")
    parser.add_argument("--demo", type=Path, required=True, help="the shipped model's, with an engine, too")
    parser.add_argument("--drawn", type=Path, help="a directory for a bundle of 1.1B's shape, 2.2 GB; removed again")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=64, help="of a case's turn (64)")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    llava = without_end(Llava.load(arguments.bundle, backend="onnxruntime", threads=arguments.threads))
    with tempfile.TemporaryDirectory() as directory:
        pictures = [write_picture(Path(directory), size) for size in SIZES]
        starts = {"demo": arguments.demo, "bundle": arguments.bundle}
        result = {
            **circumstances(),
            "bundle": arguments.bundle.name,
            "vocabulary": llava.manifest.decoder.vocab_size,
            "threads": arguments.threads,
            "cold_start_seconds": {name: cold_start(path, pictures[0]) for name, path in starts.items()},
            "overhead_us": overhead(llava, arguments.tokens, arguments.turns),
            **({} if arguments.drawn is None else {"overhead_us_1.1b": overhead_1b(arguments)}),
            "splice": splice_share(llava, arguments.turns),
            "second_turn": second_turns(llava, pictures, arguments.turns),
            "preprocess_ms": preprocessing(llava.manifest.image, arguments.turns),
            "idle_cpu_ms_a_second": idle(),
        }
    save(arguments.output, result)
    print(table(result))


def overhead(llava: Llava, tokens: int, turns: int, cases: Sequence[str] = tuple(CASES)) -> dict[str, dict[str, float]]:
    """Microseconds between the runs of a decode, for each case, and the run itself beside them."""
    decoder = llava.decoder
    found: dict[str, list[float]] = {name: [] for name in cases}
    runs: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name in cases:
            batch, sampling = CASES[name]
            llava.decoder = watched = WatchedDecoder(decoder)
            if batch == 1:
                for _ in llava.stream(PROMPT, max_new_tokens=tokens, sampling=sampling):
                    pass
            else:
                prompts = [f"{PROMPT} {number}" for number in range(batch)]
                llava.generate(prompts, max_new_tokens=tokens, sampling=sampling)
            if turn:  # the first is to warm up
                steps = list(pairwise(zip(watched.ended, watched.run, strict=True)))[-(tokens - 2) :]
                runs[name] += [1e6 * (run - run_before) for (_, run_before), (_, run) in steps]
                whole = [1e6 * (end - before) for (before, _), (end, _) in steps]
                found[name] += [a - b for a, b in zip(whole, runs[name][-len(whole) :], strict=True)]
    llava.decoder = decoder
    return {name: {**spread(values), "run_median": middle(runs[name])} for name, values in found.items()}


def overhead_1b(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of greedy choice behind a decoder of 1.1B's shape. Most tokens it chooses have no text: that takes as long."""
    bundle = arguments.drawn / "overhead-1.1b"
    try:
        write_bundle("1.1b", bundle)
        llava = without_end(Llava.load(bundle, backend="onnxruntime", threads=arguments.threads))
        return overhead(llava, arguments.tokens, arguments.turns, ("batch 1, greedy", "batch 8, greedy"))
    finally:
        shutil.rmtree(bundle, ignore_errors=True)


def splice_share(llava: Llava, turns: int) -> dict[str, float]:
    """Tokenising, looking up and splicing of a question about a picture that was not seen before."""
    timings = []
    for turn in range(turns + 1):
        picture = Image.fromarray(np.random.default_rng(turn).integers(0, 256, (224, 224, 3), np.uint8))
        timings.append(last_timings(llava, [ask(picture, QUESTIONS[0])], 1))
    milliseconds = [1000 * one.splice for one in timings[1:]]
    shares = [one.splice / one.ttft for one in timings[1:]]
    return {
        "milliseconds": middle(milliseconds),
        "share_of_ttft": middle(shares, 5),
        "ttft_ms": middle([1000 * one.ttft for one in timings[1:]]),
        "tokens": timings[-1].prompt_tokens,
    }


def second_turns(llava: Llava, pictures: Sequence[Path], turns: int) -> dict[str, dict[str, float]]:
    """TTFT of a conversation's second question over the decoder's time for the tokens that are new in it."""
    kinds: dict[str, Callable[[Path], Any]] = {"file": str, "taken": take_picture, "Pillow image": opened}
    time.sleep(SETTLED)
    result = {}
    for path in pictures:
        for kind, source_of in kinds.items():
            source, ratios, ttfts, new = source_of(path), [], [], 0
            for _ in range(turns):
                messages = [ask(source, QUESTIONS[0])]
                said = "".join(piece.text for piece in llava.chat(messages, max_new_tokens=8))
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": QUESTIONS[1]}]
                timings = last_timings(llava, messages, 1)
                ratios.append(timings.ttft / timings.prefill)
                ttfts.append(1000 * timings.ttft)
                new = timings.prompt_tokens - timings.reused_tokens
            result[f"{kind}, {path.stem}"] = {
                "ttft_over_new_tokens_alone": middle(ratios, 3),
                "ttft_ms": middle(ttfts),
                "new_tokens": new,
            }
    return result


def cold_start(bundle: Path, picture: Path) -> dict[str, float]:
    """Seconds from the start of `llava-deploy run` to its answer's first text; the files are in the page cache."""
    command = [sys.executable, "-c", "from llava_deploy.cli import main; main()", "run", str(bundle)]
    command += ["--image", str(picture), "--prompt", "What is this?", "--max-new-tokens", "8"]
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            first = process.stdout.read(1) if process.stdout is not None else b""
            seconds.append(time.perf_counter() - began)
            _, errors = process.communicate()
        if process.returncode or not first:
            raise SystemExit(f"{' '.join(command)} failed: {errors.decode()}")
    return spread(seconds[1:], 3)


def preprocessing(recipe: ImageRecipe, turns: int) -> dict[str, float]:
    """Milliseconds to resize, cut and normalise a picture that is in memory."""
    result = {}
    for side in (224, 336):
        sized = dataclasses.replace(recipe, resize=("shortest_edge", side), crop=(side, side))
        out = np.empty((1, 3, side, side), np.float32)
        for size in SIZES:
            picture, seconds = Image.new("RGB", size, (10, 200, 90)), []
            for _ in range(turns + 1):
                began = time.perf_counter()
                preprocess_batch([picture], sized, out)
                seconds.append(time.perf_counter() - began)
            result[f"{size[0]} x {size[1]} to {side}"] = middle([1000 * one for one in seconds[1:]])
    return result


def idle() -> float:
    """Milliseconds of CPU that the process takes in a second without work, its backend's threads waiting."""
    time.sleep(0.5)
    began = time.process_time()
    time.sleep(2)
    return round(500 * (time.process_time() - began), 2)


def write_picture(directory: Path, size: tuple[int, int]) -> Path:
    """A picture of soft colours, a PNG if it is small and a JPEG otherwise."""
    small = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    path = directory / f"{size[0]} x {size[1]}{'.png' if max(size) < 1000 else '.jpg'}"
    Image.fromarray(small).resize(size).save(path)
    return path


def opened(path: Path) -> Image.Image:
    """The picture, decoded, without its file."""
    with Image.open(path) as image:
        return image.convert("RGB")


def ask(picture: Any, text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}


def last_timings(llava: Llava, messages: list[dict[str, Any]], tokens: int) -> Any:
    """Timings of an answer."""
    return list(llava.chat(messages, max_new_tokens=tokens))[-1].timings


def middle(values: Sequence[float], digits: int = 2) -> float:
    """The median."""
    return round(statistics.median(values), digits)


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    """Median, mean, minimum and the value that one in ten is above."""
    ordered = sorted(values)
    found = {"mean": statistics.fmean(ordered), "min": ordered[0], "p90": ordered[int(0.9 * len(ordered))]}
    return {"median": middle(ordered, digits), **{name: round(value, digits) for name, value in found.items()}}


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'overhead, µs':28} {'median':>8} {'mean':>8} {'min':>8} {'p90':>8} {'run':>9}"]
    rows = [*result["overhead_us"].items()]
    rows += [(f"1.1B, {name}", row) for name, row in result.get("overhead_us_1.1b", {}).items()]
    for name, row in rows:
        numbers = " ".join(f"{row[key]:8.0f}" for key in ("median", "mean", "min", "p90"))
        lines.append(f"{name:28} {numbers} {row['run_median']:9.0f}")
    splice = result["splice"]
    lines.append(f"splice: {splice['milliseconds']:.2f} ms, {splice['share_of_ttft']:.2%} of the time to first token")
    lines += [
        f"second turn, {name}: {row['ttft_over_new_tokens_alone']:.2f} x its {row['new_tokens']} new tokens alone"
        for name, row in result["second_turn"].items()
    ]
    lines += [f"cold start, {name}: {row['median']:.2f} s" for name, row in result["cold_start_seconds"].items()]
    lines += [f"preprocessing, {name}: {value:.1f} ms" for name, value in result["preprocess_ms"].items()]
    lines.append(f"idle: {result['idle_cpu_ms_a_second']} ms of CPU a second")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
