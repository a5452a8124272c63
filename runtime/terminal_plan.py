"""A plan of memory and speed for people; it takes the plan as plain values, since plans are made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llava_deploy.runtime.terminal import facts, size

_PARTS = ("weights", "KV cache", "activations", "workspace", "image features", "process")
_COLUMNS = ("weights", "KV cache", "activations", "workspace", "features", "process")


def plan_tables(plan: Mapping[str, Any]) -> Group:
    """What ``Plan.to_dict`` of the planner gives, as tables.

    One of the stages, of which each has a line for every kind of memory that it takes: the GPU's, the host's, files
    that are mapped; and one of what would fit at most.
    """
    board, sizes = plan["board"], plan["sizes"]
    head = facts(
        f"Plan for {plan['model']} in {plan['precision']} on {board['title']}",
        [
            ("memory", _memory_of(board)),
            ("sizes", f"{sizes['max_batch']} x {sizes['max_len']} tokens, {_pictures(sizes['max_images'])} at once"),
            ("decoder", _parts(plan["parts"])),
            ("on the disk", _disk(plan)),
            ("not planned", _int8(plan)),
            ("source", board["source"]),
            ("figures", "fitted to measured peaks; a GPU's to onnxruntime-cuda on an H100, with TensorRT to none"),
        ],
    )
    return Group(head, _memory_table(plan), _limits_table(plan))


def _pictures(count: int) -> str:
    return "one picture" if count == 1 else f"{count} pictures"


def _parts(parts: Sequence[int]) -> str:
    if len(parts) == 1:
        return "one plan of TensorRT"
    return f"{len(parts)} plans of TensorRT, of {', '.join(map(str, parts))} layers"


def _disk(plan: Mapping[str, Any]) -> str:
    """The bundle, and what an engine takes beside it: backends whose engines are as large are named together."""
    engines: dict[str, list[str]] = {}
    for stage in plan["stages"]:
        if stage["disk"] is not None:
            taken = size(stage["disk"]) if stage["disk"] else "hard links"
            engines.setdefault(taken, []).append(stage["backend"])
    beside = ", ".join(f"{taken} ({', '.join(backends)})" for taken, backends in engines.items())
    return f"{size(plan['bundle_bytes'])} for the bundle; for an engine {beside}"


def _int8(plan: Mapping[str, Any]) -> str:
    return f"a second decoder, by build --int8 prefill: {size(plan['int8_prefill_bytes'])} more for onnxruntime"


def _memory_of(board: Mapping[str, Any]) -> str:
    if board["is_unified"]:
        kinds = [("for host and GPU", board["memory"])]
    else:
        kinds = [("of the GPU", board["memory"]), ("of the host", board["host"])]
    known = [f"{size(count)} {what}" for what, count in kinds if count is not None]
    bandwidth = board["bandwidth"]
    return ", ".join([*known, *([] if bandwidth is None else [f"{bandwidth / 1e9:.0f} GB/s"])])


def _memory_table(plan: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="Peak memory", title_justify="left", title_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("where", no_wrap=True)
    for column in (*_COLUMNS, "together"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fits")
    places = {"device": "GPU", "host": "host", "mapped": "mapped files"}
    for stage in plan["stages"]:
        name = _name(stage)
        if stage["memory"] is None:
            table.add_row(name, "", *[""] * len(_COLUMNS), "", Text(stage["note"], "dim"))
            continue
        verdict = _verdict(stage)
        for place, words in places.items():
            parts = [part for part in stage["memory"]["parts"] if part["place"] == place and part["nbytes"]]
            if parts:
                sums = [sum(part["nbytes"] for part in parts if part["name"] == name_of) for name_of in _PARTS]
                cells = ["" if count == 0 else size(count) for count in sums]
                table.add_row(name, words, *cells, size(sum(part["nbytes"] for part in parts)), verdict)
                name, verdict = "", Text("")
    return table


def _verdict(stage: Mapping[str, Any]) -> Text:
    words = {True: ("yes", "green"), False: ("no", "bold red"), None: ("", "")}[stage["fits"]]
    note = "" if stage["fits"] is False else stage["note"]
    return Text(" ").join(Text(text, style) for text, style in (words, (note, "dim")) if text)


def _limits_table(plan: Mapping[str, Any]) -> Table:
    sizes = plan["sizes"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="At most", title_justify="left", title_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column(f"rows of {sizes['max_len']} tokens", justify="right")
    table.add_column(f"tokens in {sizes['max_batch']} row{'s' if sizes['max_batch'] > 1 else ''}", justify="right")
    table.add_column("tokens/s by bandwidth: empty cache", justify="right")
    table.add_column("full cache", justify="right")
    for stage in plan["stages"]:
        if stage["largest_batch"] is not None:
            speed = stage["speed"]
            speeds = ("", "") if speed is None else (f"{speed['empty']:.0f}", f"{speed['full']:.0f}")
            table.add_row(_name(stage), *(str(stage[key]) for key in ("largest_batch", "largest_len")), *speeds)
    return table


def _name(stage: Mapping[str, Any]) -> str:
    return stage["stage"] if stage["backend"] is None else f"{stage['stage']} {stage['backend']}"
