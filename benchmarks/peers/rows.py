"""From the rounds to one row a peer: medians, shares of the ideal, equal tokens; as JSON and as a table."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entries import ENTRIES, Entry

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results of each entry's processes, a round each, by the entry's name."""

HEADS = (
    "", "kind", "TTFT ms", "decode tok/s", "of the ideal", "peak MB", "anonymous + mapped", "on disk MB", "load s",
    "tokens",
)  # fmt: skip
DECODER = {"layers": 30, "hidden": 576, "intermediate": 1536, "kv": 192, "vocabulary": 49216}
"""SmolLM2-135M's, with the rows of the vocabulary that the placeholder has added."""


def linear_weights() -> tuple[int, int]:
    """How many weights a decode step reads of the layers' matrices and of the output layer."""
    hidden = DECODER["hidden"]
    layer = 2 * hidden * (hidden + DECODER["kv"]) + 3 * hidden * DECODER["intermediate"]
    return DECODER["layers"] * layer, DECODER["vocabulary"] * hidden


def step_bytes(entry: Entry, result: Mapping[str, Any]) -> int:
    """Bytes of weights that one token's step has to read."""
    if entry.bits is None:
        return int(result["decoder_bytes"])
    return round(sum(count * bits / 8 for count, bits in zip(linear_weights(), entry.bits, strict=True)))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": round(statistics.median(values), 2), "min": min(values), "max": max(values)}


def row(entry: Entry, results: Rounds, gb_per_s: float) -> dict[str, Any]:
    """What is known of an entry that has answered at least once."""
    found = results[entry.name]
    ttft, decode = (summary([one[key] for one in found]) for key in ("ttft_ms", "decode_tokens_per_s"))
    step = step_bytes(entry, found[0])
    ideal = gb_per_s * 1e9 / step
    return {
        "name": entry.name,
        "label": entry.label,
        "mode": entry.mode,
        "family": entry.family,
        "rounds": len(found),
        "ttft_ms": ttft,
        "decode_tokens_per_s": decode,
        "step_bytes": step,
        "ideal_tokens_per_s": round(ideal, 1),
        "share_of_ideal": round(decode["median"] / ideal, 3),
        **{
            key: round(statistics.median([one[key] for one in found]))
            for key in ("peak_mb", "anonymous_mb", "mapped_mb")
        },
        "disk_mb": found[0]["disk_mb"],
        "load_s": round(statistics.median([one["load_s"] for one in found]), 2),
        "equal_tokens": equal_tokens(found, results.get(entry.reference)),
        "versions": found[0]["versions"],
    }


def equal_tokens(found: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None) -> int | None:
    """How many tokens come before the first that is not the reference's, in the worst round."""
    if not reference:
        return None
    wanted = reference[0]["ids"]
    return min(
        next((at for at, (one, other) in enumerate(zip(got["ids"], wanted, strict=True)) if one != other), len(wanted))
        for got in found
    )


def rivalry(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each of ours over the best peer: int4 over that of all, a float form over that of its family.

    Of the peers with the picture; for decode also of all.
    """
    beside = {}
    for ours in (one for one in rows if one["name"].startswith("ours-")):
        peers = [
            one for one in rows if not one["name"].startswith("ours-") and ours["family"] in ("int4", one["family"])
        ]
        seeing = [one for one in peers if one["mode"] == "vlm"]
        if not seeing:
            continue
        fastest = max(one["decode_tokens_per_s"]["median"] for one in peers)
        seeing_fastest = max(one["decode_tokens_per_s"]["median"] for one in seeing)
        soonest = min(one["ttft_ms"]["median"] for one in seeing)
        beside[ours["name"]] = {
            "decode_over_fastest_vlm_peer": round(ours["decode_tokens_per_s"]["median"] / seeing_fastest, 3),
            "decode_over_fastest_peer": round(ours["decode_tokens_per_s"]["median"] / fastest, 3),
            "ttft_over_fastest_vlm_peer": round(ours["ttft_ms"]["median"] / soonest, 3),
            "peak_over_least_vlm_peer": round(ours["peak_mb"] / min(one["peak_mb"] for one in seeing), 3),
        }
    return beside


def report(circumstances: Mapping[str, Any], bandwidth: Sequence[float], results: Rounds, failed: Mapping[str, str],
           new_tokens: int) -> dict[str, Any]:  # fmt: skip
    """The whole comparison.

    Args:
        circumstances: date, machine, task and settings.
        bandwidth: GB/s read by all threads, once a round.
        results: what the processes have said.
        failed: why an entry has no results, or no more of them.
        new_tokens: of each answer.
    """
    read = summary(bandwidth)
    rows = [row(entry, results, read["median"]) for entry in ENTRIES if results.get(entry.name)]
    return {
        **circumstances,
        "new_tokens": new_tokens,
        "read_gb_per_s": read,
        "entries": rows,
        "ours_over_peers": rivalry(rows),
        "failed": dict(failed),
    }


def table(found: Mapping[str, Any]) -> str:
    """A report in Markdown."""
    read = found["read_gb_per_s"]
    lines = [_line(HEADS), _line(["---"] * len(HEADS))]
    for one in found["entries"]:
        equal = "" if one["equal_tokens"] is None else f"{one['equal_tokens']}/{found['new_tokens']}"
        lines.append(
            _line(
                (
                    one["label"], one["mode"], _spread(one["ttft_ms"], 0), _spread(one["decode_tokens_per_s"], 1),
                    f"{one['share_of_ideal']:.0%}", f"{one['peak_mb']}", f"{one['anonymous_mb']} + {one['mapped_mb']}",
                    f"{one['disk_mb']:.0f}", f"{one['load_s']:.2f}", equal,
                )
            )
        )  # fmt: skip
    lines += ["", f"Read bandwidth {read['median']:.1f} GB/s ({read['min']:.1f}–{read['max']:.1f})."]
    lines += [f"{name}: {_ratios(ratios)}." for name, ratios in found["ours_over_peers"].items()]
    lines += [f"{name} failed: {why}" for name, why in found["failed"].items()]
    return "\n".join(lines) + "\n"


def save(output: Path, found: Mapping[str, Any]) -> None:
    """Write the report, and its table beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\{[^{}\[\]]*\}", lambda flat: " ".join(flat[0].split()), json.dumps(found, indent=1))
    output.write_text(text + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table(found), encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(of: Mapping[str, float], digits: int) -> str:
    return f"{of['median']:.{digits}f} ({of['min']:.{digits}f}–{of['max']:.{digits}f})"


def _ratios(of: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in of.items())
