"""Packs and unpacks in processes that are killed at random moments.

    python killed_archives.py WORK pack|unpack SEED

Prints one JSON object; the processes are forked, since a start of Python would take longer than what is killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiny_archive import tree, write_bundle

from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import pack
from llava_deploy.runtime.archive.unpack import unpack

MOMENTS = 20
SIZE = 12 << 20
OLD, NEW = PackOptions(goldens=False), PackOptions()


def forked(work: Callable[[], object], kill_after: float | None) -> bool:
    """Run ``work`` in a process of its own; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (the process ends here, whatever it is)
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("a process failed by itself")
    return True


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    forked(work, None)
    return time.perf_counter() - began


def state_of(output: Path) -> object:
    """What is there by that name: an archive's bytes, a bundle's files, or nothing."""
    if output.is_dir():
        return tree(output)
    return output.read_bytes() if output.exists() else None


def main(work: Path, what: str, seed: int) -> None:
    """Kill at :data:`MOMENTS` moments, half of them where an older one is there, and look at what is left."""
    numbers = random.Random(seed)
    sources, outputs = work / "sources", work / "outputs"
    outputs.mkdir()
    bundle = write_bundle(sources / "bundle", {"decoder.onnx.data": numbers.randbytes(SIZE)})
    for name, options in (("old", OLD), ("new", NEW)):
        pack(bundle, sources / f"{name}.lvd", options)
        unpack(sources / f"{name}.lvd", sources / name)
    output = outputs / "it"
    actions: dict[str, Callable[[str], object]] = {
        "pack": lambda name: pack(bundle, output, {"old": OLD, "new": NEW}[name], replace=True),
        "unpack": lambda name: unpack(sources / f"{name}.lvd", output, replace=True),
    }
    suffix = {"pack": ".lvd", "unpack": ""}[what]
    want = {name: state_of(sources / f"{name}{suffix}") for name in ("old", "new")}
    action = actions[what]
    whole = min(timed(lambda: action("new")) for _ in range(3))
    counts = {"killed": 0, "debris": 0, "nothing": 0, "old": 0, "new": 0, "half": 0, "left": 0}
    for moment in range(MOMENTS):
        for path in outputs.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if moment % 2:
            forked(lambda: action("old"), None)
        counts["killed"] += not forked(lambda: action("new"), numbers.random() * whole * 1.05)
        counts["debris"] += any(path != output for path in outputs.iterdir())
        found = state_of(output)
        states = {"nothing": None, **want}
        counts[next((name for name, state in states.items() if state == found), "half")] += 1
        forked(lambda: action("new"), None)
        counts["half"] += state_of(output) != want["new"]
        counts["left"] += [*outputs.iterdir()] != [output]
    sys.stdout.write(json.dumps({**counts, "seconds": whole}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
