"""A walk through a bundle in another process, with the board's power meter read meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from llava_deploy.engines.errors import LlavaDeployError, OptionError
from llava_deploy.engines.plain import from_plain
from llava_deploy.runtime.report.power import PowerMeter, PowerReading, mean_watts, open_power
from llava_deploy.runtime.report.power_files import PowerFiles
from llava_deploy.runtime.report.record import Energy, Phase, Walk
from llava_deploy.runtime.report.walk import Walked, Way

_PROGRAM = "from llava_deploy.runtime.report.walk import main; main()"
_SPOKEN = {
    "idle": "before it was loaded",
    "load": "while it was loaded",
    "picture": "at its first question",
}


@dataclass(frozen=True)
class Journey:
    """What a walk came to.

    Attributes:
        walk: ``None`` where it did not come to its end.
        failure: why not.
        backend: what ran it.
        energy_refusals: why there is no energy, or a better meter was not taken.
    """

    walk: Walk | None
    failure: str | None
    backend: str | None
    energy: Energy | None
    energy_refusals: tuple[str, ...]


@dataclass(frozen=True)
class Measuring:
    """How long to measure power, where something tells it.

    Attributes:
        idle: seconds before anything is loaded.
        decode: seconds of making tokens, at least.
    """

    idle: float
    decode: float


def take_walk(way: Way, measuring: Measuring, files: PowerFiles, *, on_gpu: bool) -> Journey:
    """Walk through a bundle in a process of its own, with a power meter where there is one.

    Args:
        way: what to do; its ``idle`` and ``least`` are set here.
        measuring: for how long, where there is a meter.
        files: where the kernel keeps those that tell power.
        on_gpu: the bundle has an engine for a GPU that may be taken.

    Raises:
        OptionError: an option that the backend does not have.
        LlavaDeployError: the process fails in a way that is none of this package's own errors.
    """
    meter, refusals = open_power(files, on_gpu=on_gpu)
    readings: list[PowerReading] = []
    try:
        if meter is not None:
            way = replace(way, idle=measuring.idle, least=measuring.decode)
        walked = _run(way)
    finally:
        if meter is not None:
            readings = meter.stop()
    if isinstance(walked, str):
        return Journey(None, walked, None, None, refusals)
    energy = None if meter is None else _energy(meter, readings, walked)
    if meter is not None and energy is None:
        refusals = (*refusals, f"{meter.name}: too few readings")
    return Journey(_walk(walked), None, walked.backend, energy, refusals)


def _run(way: Way) -> Walked | str:
    """What was seen, or why it could not be gone."""
    with _process() as process:
        output, errors = process.communicate(json.dumps(asdict(way)))
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    last = lines[-1] if lines else {}
    if "walked" in last:
        walked: Walked = from_plain(Walked, last["walked"], "walk")
        return walked
    if "option" in last:
        raise OptionError(last["option"], last["reason"])
    if "error" in last:
        return str(last["error"])
    when = _SPOKEN.get(last.get("phase", ""), "before it was loaded")
    if process.returncode == -signal.SIGKILL:
        return f"the process was killed {when}: most likely there is too little memory for it"
    said = (errors.strip().splitlines() or ["nothing was said"])[-1]
    if process.returncode < 0:
        return f"the process ended with signal {-process.returncode} {when}: {said}"
    raise LlavaDeployError(f"{way.directory}: a process to look at its memory failed {when}: {said}")


@contextmanager
def _process() -> Iterator[subprocess.Popen[str]]:
    """A Python of the same kind; it does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _walk(walked: Walked) -> Walk:
    """The same with times from the beginning of loading."""
    start = walked.began["load"]
    names = [name for name in ("load", "picture", "prefill", "decode") if name in walked.began]
    times = [walked.began[name] - start for name in (*names, "end")]
    phases = [Phase(name, began, ended) for name, began, ended in zip(names, times, times[1:], strict=False)]
    return Walk(
        prompt_tokens=walked.prompt_tokens,
        pictures=walked.pictures,
        new_tokens=walked.new_tokens,
        decode_tokens=walked.decode_tokens,
        available=walked.available,
        device_available=walked.device_available,
        phases=tuple(phases),
        samples=tuple(replace(sample, at=sample.at - start) for sample in walked.samples),
    )


def _energy(meter: PowerMeter, readings: list[PowerReading], walked: Walked) -> Energy | None:
    began = walked.began
    idle = mean_watts(readings, began["idle"], began["load"])
    decode = mean_watts(readings, began["decode"], began["end"])
    if idle is None or decode is None or not walked.decode_tokens:
        return None
    a_token = (began["end"] - began["decode"]) / walked.decode_tokens
    return Energy(
        source=meter.name,
        idle_watts=idle[0],
        decode_watts=decode[0],
        readings=decode[1],
        joules_per_token=decode[0] * a_token,
        joules_per_token_over_idle=max(0.0, decode[0] - idle[0]) * a_token,
    )
