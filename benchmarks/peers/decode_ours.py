"""A bundle's decode at some contexts, in batches, and the first token of a second turn, through the public interface.

python decode_ours.py BUNDLE --contexts 64 2000 --steps 32 --threads 2 [--batch 8] [--turn 512]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from our_weights import MOST_REUSED, decoder_bytes, without_end
from processes import RESULT

from llava_deploy.runtime import Llava

WORDS = "left right above below red green blue circle square near far one two three".split()
SHORT = 64
"""Tokens of the prompts of a batch."""

NEW_IN_TURN = 32
REPEATED = 5


def text_of(llava: Llava, tokens: int, first: int) -> str:
    """Words of about ``tokens`` tokens, beginning with the word numbered ``first``."""

    def words(count: int) -> str:
        return " ".join(WORDS[(first + index) % len(WORDS)] for index in range(count))

    sample = 100
    per_word = len(llava.encoder.tokenizer.encode(words(sample)).ids) / sample
    return words(max(1, round(tokens / per_word)))


def decode_at(llava: Llava, contexts: list[int], steps: int) -> dict[str, Any]:
    rates, prefill = {}, {}
    for number, context in enumerate(contexts):
        timings = llava.generate([text_of(llava, context, number)], max_new_tokens=steps + 1)[0].timings
        if timings.reused_tokens > MOST_REUSED or timings.new_tokens != steps + 1:
            raise ValueError(f"an answer that was not computed from its beginning to its end: {timings}")
        rates[str(context)] = round(timings.decode_tokens_per_second, 3)
        prefill[str(context)] = round(timings.prefill, 3)
    return {"decode_tokens_per_s": rates, "prefill_s": prefill}


def batches(llava: Llava, batch: int, steps: int) -> dict[str, Any]:
    """Tokens a second of one row and of ``batch`` rows together, in turns."""
    rates: dict[int, list[float]] = {1: [], batch: []}
    for _ in range(REPEATED):
        for rows, reached in rates.items():
            prompts = [text_of(llava, SHORT, number) for number in range(rows)]
            timings = llava.generate(prompts, max_new_tokens=steps + 1)[0].timings
            reached.append(rows * timings.decode_tokens_per_second)
    medians = {str(rows): round(statistics.median(found), 3) for rows, found in rates.items()}
    return {"batch_tokens_per_s": medians, "batch_gain": round(medians[str(batch)] / medians["1"], 3)}


def second_turn(llava: Llava, tokens: int) -> dict[str, Any]:
    """First token of a turn behind ``tokens`` others, beside that of a prompt of its new tokens alone."""
    begun = text_of(llava, tokens, 0)
    later, alone, counts = [], [], []
    for _ in range(REPEATED):
        llava.generate([begun], max_new_tokens=1)
        turn = llava.generate([f"{begun} {text_of(llava, NEW_IN_TURN, 3)}"], max_new_tokens=1)[0].timings
        new = turn.prompt_tokens - turn.reused_tokens
        fresh = llava.generate([text_of(llava, new, 5)], max_new_tokens=1)[0].timings
        if turn.reused_tokens <= MOST_REUSED or fresh.reused_tokens > MOST_REUSED:
            raise ValueError(f"want a turn that reuses and a prompt that does not: {turn}, {fresh}")
        later.append(turn.ttft)
        alone.append(fresh.ttft * new / fresh.prompt_tokens)
        counts.append(new)
    return {
        "turn_behind_tokens": tokens,
        "turn_new_tokens": counts[0],
        "turn_ttft_ms": round(statistics.median(later) * 1e3, 1),
        "turn_alone_ms": round(statistics.median(alone) * 1e3, 1),
        "turn_over_alone": round(statistics.median(one / other for one, other in zip(later, alone, strict=True)), 3),
    }


def load(bundle: Path, slots: int, threads: int) -> Llava:
    """The bundle, which stops for nothing."""
    return without_end(Llava.load(bundle, backend="onnxruntime", max_len=slots, threads=threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, help="also measure batches of so many prompts")
    parser.add_argument("--turn", type=int, help="also measure a turn behind so many tokens")
    given = parser.parse_args()
    # Counts of tokens are rounded to words: some slots more.
    slots = -(-(max(given.contexts) + given.steps + 64) // 256) * 256
    llava = load(given.bundle, slots, given.threads)
    llava.generate([text_of(llava, 8, 7)], max_new_tokens=2)  # the first run is slower
    found = decode_at(llava, given.contexts, given.steps)
    if given.turn is not None:
        found |= second_turn(llava, given.turn)
    if given.batch is not None:
        del llava
        llava = load(given.bundle, 256, given.threads)
        llava.generate([text_of(llava, 8, 7)], max_new_tokens=2)
        found |= batches(llava, given.batch, given.steps)
    weights = decoder_bytes(given.bundle)
    print(RESULT + json.dumps({**found, "weight_bytes": weights, "backend": llava.backend}), flush=True)


if __name__ == "__main__":
    main()
