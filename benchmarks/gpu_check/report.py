"""The check's results as JSON and as Markdown, written anew whenever a part has ended."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from names import ON_GPU
from outcome import Outcome

GB = 1e9
NOTHING = "-"
WANTED_SHARE = 0.8
"""Of the copy bandwidth, by decode."""

EXPLAINED = (
    "Vision: a picture's pixels on the host to its features. TTFT: prompt and pixels on the host to the first token "
    "there. Prefill: embeddings on the host to the logits of the last one there. Decode: behind that prompt, one row; "
    "its share of the copy is of the decoder's weights and the visible cache, read once a token. GPU memory: the most "
    "over what was in use before, while the model was loaded and first answered. Transformers' weights are made on the "
    "GPU, not loaded."
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
    counts, shape = totals(outcomes), str(settings.get("shape"))
    lines = [
        f"# GPU check: {device}",
        "",
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['not run']} not run. "
        f"{found.get('machine')}; Python {found.get('python')}."
        + (f" A copy within the GPU's memory: {copied:.0f} GB/s, read and written." if copied else ""),
        "",
        _versions(found),
        "",
        "## Right",
        "",
        *_device_layer(outcomes),
        *_table(
            ("model", "backend", "build", "verify", "Polygraphy", "questions"),
            [_right(outcomes, *key) for key in _keys(outcomes, "demo")],
        ),
        "",
        f"## Fast: {shape}, random weights, one row, a picture and text",
        "",
        *_table(
            (
                *("shape, weights, backend", "vision ms", "TTFT ms", f"prefill {_prefilled(outcomes)} ms"),
                *("decode tok/s", "share of copy bandwidth", "GPU memory GB", "load s"),
            ),
            [_fast(outcomes, *key) for key in _keys(outcomes, shape)],
        ),
        "",
        EXPLAINED,
        "",
        "Decode of several rows at once, behind as many tokens:",
        "",
        *_table(("shape, weights, backend", "rows", "tok/s of all", "ms a step"), _batches(outcomes, shape)),
        "",
        "## Aims",
        "",
        *_aims(outcomes, shape),
        "",
    ]
    failed = [f"- `{one.name}`: {_line(one.reason)}" for one in outcomes if one.status == "failed"]
    lines += ["## Failed", "", *(failed or ["Nothing."]), "", "## Not run", "", *(_not_run(outcomes) or ["Nothing."])]
    return "\n".join(lines) + "\n"


def _versions(found: dict[str, Any]) -> str:
    """Of packages, and of modules that tell their own: where two packages hold one, it is not clear which is taken."""
    installed = [f"{name} {version}" for name, version in found.get("packages", {}).items() if version]
    modules = found.get("modules", {}).items()
    imported = [f"{name} {version}" for name, version in modules if not version.startswith("cannot be imported")]
    return f"Installed: {', '.join(installed)}. Imported: {', '.join(imported)}."


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
    outcome, row = by_name.get(f"{model}/{weights}/{backend}/speed"), f"{model}, {weights}, {backend}"
    if outcome is None or outcome.status != "passed":
        status = NOTHING if outcome is None else outcome.status
        return (row, status, *([NOTHING] * 6))
    r = outcome.result
    share, peak, load = r["share_of_copy_bandwidth"], r["device_peak_bytes"], r.get("load_s")
    return (
        row,
        f"{r['vision_ms']:.1f}",
        f"{r['ttft_ms']:.1f}",
        f"{r['prefill_ms']:.1f}",
        f"{r['decode_tokens_per_s']:.1f}",
        NOTHING if share is None else f"{share:.0%}",
        NOTHING if peak is None else f"{peak / GB:.1f}",
        NOTHING if load is None else f"{load:.1f}",
    )


def _prefilled(outcomes: Sequence[Outcome]) -> str:
    """Tokens of the prompts of which prefill is timed."""
    found = {str(one.result["prefill_tokens"]) for one in outcomes if "prefill_tokens" in one.result}
    return " or ".join(sorted(found))


def _batches(outcomes: Sequence[Outcome], model: str) -> list[tuple[str, ...]]:
    """A line for each number of rows that a backend was asked for."""
    rows: list[tuple[str, ...]] = []
    for one in outcomes:
        if not _is_speed(one, model):
            continue
        name = ", ".join(one.name.split("/")[:3])
        for count, found in one.result.get("decode_at_batch", {}).items():
            if "not_measured" in found:
                rows.append((name, count, f"not measured: {_line(found['not_measured'])}", NOTHING))
            else:
                rows.append((name, count, f"{found['tokens_per_s']:.1f}", f"{found['step_ms']:.2f}"))
    return rows


def _device_layer(outcomes: Sequence[Outcome]) -> list[str]:
    """What the part ``device`` found, where it ran."""
    for one in outcomes:
        if one.name == "device" and "checks" in one.result:
            checks = one.result["checks"]
            right = sum(check["ok"] for check in checks.values())
            rates = [f"{name} {value}" for name, value in checks["marks"].items() if name.endswith("gb_per_s")]
            said = f"; {', '.join(rates).replace('_gb_per_s', '')} GB/s" if rates else ""
            return [f"The runtime's layer over CUDA: {right} of {len(checks)} checks passed{said}.", ""]
    return []


def _aims(outcomes: Sequence[Outcome], model: str) -> list[str]:
    """What the product's backends were to reach, and whether they do; a line each that was measured."""
    speeds = {tuple(one.name.split("/")[1:3]): one.result for one in outcomes if _is_speed(one, model)}
    rivals = {
        backend: result["ttft_ms"] for (_, backend), result in speeds.items() if backend.startswith("transformers")
    }
    lines = []
    for (weights, backend), result in speeds.items():
        if backend not in ON_GPU:
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
