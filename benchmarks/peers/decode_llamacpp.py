"""llama.cpp's decode at some contexts: python decode_llamacpp.py MODEL --contexts 64 2000 --steps 32 --threads 2"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from llamacpp_context import Context
from processes import RESULT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    slots = -(-(max(given.contexts) + given.steps + 1) // 256) * 256
    context = Context(given.model, slots, given.threads)
    context.read([1] * 8)  # the first run is slower
    rates, prefill = {}, {}
    for tokens in given.contexts:
        ids: list[int] = np.random.default_rng(tokens).integers(0, context.vocabulary, tokens).tolist()
        context.clear()
        began = time.perf_counter()
        context.read(ids)
        prefill[str(tokens)] = round(time.perf_counter() - began, 3)
        times: list[float] = []
        context.decode(tokens, given.steps + 1, lambda _, times=times: times.append(time.perf_counter()))
        rates[str(tokens)] = round(given.steps / (times[-1] - times[0]), 3)
    print(RESULT + json.dumps({"decode_tokens_per_s": rates, "prefill_s": prefill}), flush=True)


if __name__ == "__main__":
    main()
