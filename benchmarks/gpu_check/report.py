"""The check's results as JSON and as Markdown, written anew whenever a part has ended."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outcome import Outcome

GB = 1e9
NOTHING = "-"
WANTED_SHARE = 0.8
"""Of the copy bandwidth, by decode."""

EXPLAINED = (
    "Vision: a picture's pixels on the host to its features. TTFT: prompt and pixels on the host to the first token "
    "there. GB/s: the decoder's weights and the visible cache, once a token; its share is of the copy above. "
    "GPU peak: over what was in use before, while the model was loaded and first answered."
)


def write(directory: Path, found: dict[str, Any], settings: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write ``gpu_check.json`` and ``gpu_check.md``."""
    counts = totals(outcomes)
    whole = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "totals": counts,
        "environment": found,
        "parts": [outcome.to_dict() for outcome in outcomes],
    }
    _replace(directory / "gpu_check.json", json.dumps(whole, indent=1, default=str) + "\n")
    _replace(directory / "gpu_check.md", markdown(found, settings, outcomes))


def totals(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many passed, failed and were not run."""
    return {status: sum(one.status == status for one in outcomes) for status in ("passed", "failed", "not run")}


def markdown(found: dict[str, Any], settings: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """For people."""
    gpu = found.get("gpu")
    device = "no GPU" if gpu is None else f"{gpu['name']} ({gpu['capability']}, {gpu['memory_bytes'] / GB:.0f} GB)"
    copied = found.get("copy_gb_per_s")
    counts = totals(outcomes)
    lines = [
        f"# GPU check: {device}",
        "",
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['not run']} not run. "
        f"{found.get('machine')}; Python {found.get('python')}."
        + (f" A copy within the GPU's memory: {copied:.0f} GB/s, read and written." if copied else ""),
        "",
        ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items() if version),
        "",
        "## Right",
        "",
        *_table(
            ("model", "backend", "build", "verify", "Polygraphy", "questions"),
            [_right(outcomes, *key) for key in _keys(outcomes, "demo")],
        ),
        "",
        f"## Fast: {settings.get('shape')}, random weights, one row, a picture and text",
        "",
        *_table(
            (
                *("weights", "backend", "load s", "vision ms", "TTFT ms", "tokens/s", "GB/s", "of copy"),
                *("GPU peak GB", "host peak GB"),
            ),
            [_fast(outcomes, *key) for key in _keys(outcomes, str(settings.get("shape")))],
        ),
        "",
        EXPLAINED,
        "",
        "## Aims",
        "",
        *_aims(outcomes, str(settings.get("shape"))),
        "",
    ]
    failed = [f"- `{one.name}`: {_line(one.reason)}" for one in outcomes if one.status == "failed"]
    lines += ["## Failed", "", *(failed or ["Nothing."]), "", "## Not run", "", *(_not_run(outcomes) or ["Nothing."])]
    return "\n".join(lines) + "\n"


def _not_run(outcomes: Sequence[Outcome]) -> list[str]:
    """A line a reason."""
    names: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == "not run":
            names.setdefault(_line(outcome.reason), []).append(f"`{outcome.name}`")
    return [f"- {reason}: {', '.join(some)}" for reason, some in names.items()]


def _keys(outcomes: Sequence[Outcome], model: str) -> list[tuple[str, str, str]]:
    """Model, weights and backend of each row, in the order of the parts."""
    names = [outcome.name.split("/") for outcome in outcomes]
    found = [(parts[0], parts[1], parts[2]) for parts in names if parts[0] == model and len(parts) == 4]
    return list(dict.fromkeys(found))


def _right(outcomes: Sequence[Outcome], model: str, weights: str, backend: str) -> tuple[str, ...]:
    by_name = {outcome.name: outcome for outcome in outcomes}

    def cell(what: str) -> str:
        outcome = by_name.get(f"{model}/{weights}/{backend}/{what}")
        if outcome is None:
            return NOTHING
        if outcome.status != "passed":
            return f"**{outcome.status}**" if outcome.status == "failed" else outcome.status
        return _details(what, outcome)

    return (weights, backend, cell("build"), cell("verify"), cell("polygraphy"), cell("questions"))


def _details(what: str, outcome: Outcome) -> str:
    result = outcome.result
    if what == "build":
        return f"{result['build_s']} s, {result['engine_bytes'] / 1e6:.1f} MB"
    if what == "verify":
        errors = [stage["error"] / stage["tolerance"] for stage in result["stages"] if stage["tolerance"]]
        return f"passed, worst at {max(errors):.0%} of tolerance"
    if what == "polygraphy":
        errors = [output["error"] / output["tolerance"] for output in result["outputs"].values()]
        return f"passed, worst at {max(errors):.0%} of tolerance"
    batches = [value for name, value in result.items() if name.startswith("batch of")]
    return ", ".join(f"{batch['right']} of {batch['asked']}" for batch in batches) + " right"


def _fast(outcomes: Sequence[Outcome], model: str, weights: str, backend: str) -> tuple[str, ...]:
    by_name = {outcome.name: outcome for outcome in outcomes}
    outcome = by_name.get(f"{model}/{weights}/{backend}/speed")
    if outcome is None or outcome.status != "passed":
        status = NOTHING if outcome is None else outcome.status
        return (weights, backend, status, *([NOTHING] * 7))
    r = outcome.result
    share, peak, host = r["share_of_copy_bandwidth"], r["device_peak_bytes"], r["host_peak_bytes"]
    return (
        weights,
        backend,
        f"{r['load_s']:.1f}",
        f"{r['vision_ms']:.1f}",
        f"{r['ttft_ms']:.1f}",
        f"{r['decode_tokens_per_s']:.1f}",
        f"{r['decode_gb_per_s']:.0f}",
        NOTHING if share is None else f"{share:.0%}",
        NOTHING if peak is None else f"{peak / GB:.1f}",
        NOTHING if host is None else f"{host / GB:.1f}",
    )


def _aims(outcomes: Sequence[Outcome], model: str) -> list[str]:
    """What the product's backends were to reach, and whether they do; a line each that was measured."""
    speeds = {tuple(one.name.split("/")[1:3]): one.result for one in outcomes if _is_speed(one, model)}
    rivals = {
        backend: result["ttft_ms"] for (_, backend), result in speeds.items() if backend.startswith("transformers")
    }
    lines = []
    for (weights, backend), result in speeds.items():
        if not backend.startswith("tensorrt"):
            continue
        share = result["share_of_copy_bandwidth"]
        if share is not None:
            lines.append(
                f"- {backend}, {weights}: decode at {share:.0%} of the copy, {_reached(share >= WANTED_SHARE)}"
            )
        for rival, ttft in rivals.items():
            first = f"first token after {result['ttft_ms']:.0f} ms, {rival} {ttft:.0f} ms"
            lines.append(f"- {backend}, {weights}: {first}, {_reached(result['ttft_ms'] < ttft)}")
    aims = f"Decode at {WANTED_SHARE:.0%} of the copy bandwidth, and the first token before transformers'."
    return [aims, "", *(lines or ["Not known: no engine was measured on a GPU."])]


def _is_speed(outcome: Outcome, model: str) -> bool:
    return outcome.status == "passed" and outcome.name.startswith(f"{model}/") and outcome.name.endswith("/speed")


def _reached(is_reached: bool) -> str:
    return "reached" if is_reached else "**not reached**"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["Nothing was run."]
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(f"{path.suffix}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
