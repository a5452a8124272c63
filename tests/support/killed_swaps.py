"""Swaps in processes that are killed: one line out for each, what is there then is looked at before the next."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from finetuned import DECODER, PROJECTOR, finetuned

from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo import scenes
from llava_deploy.exporter.swap.swap import swap


def swaps(bundle: Path, first: str) -> None:
    """Put other weights in, or back the old ones, whichever is not there."""
    shipped = open_checkpoint(scenes.checkpoint_dir())
    is_first = (bundle / "manifest.json").read_text() == first
    swap(finetuned(shipped, (*DECODER, *PROJECTOR)) if is_first else shipped, bundle, "projector")


def main(bundle: Path, times: int) -> None:
    """Fork once for each: what is imported once need not be again."""
    first = (bundle / "manifest.json").read_text()
    draw, lasted = random.Random(4), 0.5
    for turn in range(times + 1):
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            swaps(bundle, first)
            os._exit(0)
        if turn:
            time.sleep(draw.uniform(0, lasted))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if turn == 0:  # how long one takes that is not killed
            lasted = 1.1 * (time.perf_counter() - began)
        killed = os.WIFSIGNALED(status)
        sys.stdout.write("killed\n" if killed else f"exited {os.WEXITSTATUS(status)}\n")
        sys.stdout.flush()
        sys.stdin.readline()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
