"""What the peers' processes share: the task, the clock, the memory, and the line that each of them answers with.

Standard library only: it runs in every peer's environment. The clock starts with the decoded picture and the prompt in
memory and reads the time at every new token, so that the first token's time holds preprocessing, vision and prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from processes import RESULT

WARM_UP_TOKENS = 4
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Mode = Literal["vlm", "text"]


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        prompt: as text, with one ``<image>`` where it has a picture.
        ids: its tokens, the placeholder once for each of the picture's patches.
        image: the picture; ``None`` in mode ``text``.
    """

    prompt: str
    ids: list[int]
    image: Path | None


@dataclass(frozen=True)
class Asked:
    """What a peer's process was asked to measure.

    Attributes:
        warm_up: a question of the same length, which has another picture and begins with another token: nothing that
            a runtime keeps from answering it helps with the timed one.
        options: of this peer alone, by name.
    """

    model: Path
    timed: Question
    warm_up: Question
    mode: Mode
    threads: int
    new_tokens: int
    options: dict[str, str]


Answer = Callable[[Question, int, Callable[[int], None]], list[int]]
"""Question, number of tokens, and what to call with the number of tokens that have just come; all tokens' ids."""


def asked(peer: str | None) -> Asked:
    """Read the command line of a peer's process; threads of the usual libraries are set for the imports to come."""
    parser = argparse.ArgumentParser(description=peer, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("task", type=Path, help="directory with task.json and its pictures")
    parser.add_argument("--mode", choices=("vlm", "text"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(given.threads)))
    questions = json.loads((given.task / "task.json").read_text(encoding="utf-8"))["questions"]
    timed, warm_up = (_question(questions[name], given.mode, given.task) for name in ("timed", "warm_up"))
    options = dict(option.split("=", 1) for option in given.option)
    return Asked(given.model, timed, warm_up, given.mode, given.threads, given.new_tokens, options)


def _question(found: dict[str, Any], mode: Mode, task: Path) -> Question:
    if mode == "text":
        return Question(found["text_prompt"], found["text_ids"], None)
    return Question(found["prompt"], found["ids"], task / found["image"])


def measure(task: Asked, load: Callable[[], Answer], packages: tuple[str, ...], **facts: Any) -> None:
    """Load, answer the warm-up question shortly, answer the timed one, and print the result's line.

    Raises:
        ValueError: other than the wanted number of tokens came.
    """
    began = time.perf_counter()
    answer = load()
    load_s = time.perf_counter() - began
    answer(task.warm_up, WARM_UP_TOKENS, lambda _: None)

    came: list[tuple[float, int]] = []
    began = time.perf_counter()
    ids = answer(task.timed, task.new_tokens, lambda count: came.append((time.perf_counter(), count)))
    total = sum(count for _, count in came)
    if total != task.new_tokens or len(ids) != task.new_tokens:
        raise ValueError(f"want {task.new_tokens} tokens, got {len(ids)}, {total} of them timed")
    (first, at_once), (last, _) = came[0], came[-1]
    result = {
        "ttft_ms": round((first - began) * 1e3, 1),
        "decode_tokens_per_s": round((total - at_once) / (last - first), 2),
        "load_s": round(load_s, 2),
        "peak_mb": _memory("VmHWM"),
        "anonymous_mb": _memory("RssAnon"),
        "mapped_mb": _memory("RssFile"),
        "versions": {name: version(name) for name in packages},
        "ids": [int(one) for one in ids],
        **facts,
    }
    print(RESULT + json.dumps(result), flush=True)


def _memory(field: str) -> int:
    """Megabytes (of 1,000,000 bytes): VmHWM is the process's peak, mapped pages of files among it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) * 1024 / 1e6)
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")
