"""Comparisons with PyTorch as tables: a stage a line, and what ran them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llava_deploy.runtime.selftest.report import GoldenStage, SelftestReport
from llava_deploy.runtime.stages import StageResult
from llava_deploy.runtime.terminal import facts, seconds


def stage_table(stages: Iterable[StageResult]) -> Table:
    """The comparison with PyTorch, a stage a line."""
    table = _table()
    for stage in stages:
        table.add_row(stage.name, *_figures(stage))
    return table


def selftest_tables(report: SelftestReport) -> Group:
    """Everything that a self-test found; of each stage the golden that came nearest to its tolerance."""
    stages = _table()
    for name, each in _by_name(report.stages).items():
        worst = next((one for one in each if not one.result.ok), max(each, key=_nearness))
        of = "" if worst.golden is None or len(each) == 1 else f"{worst.golden}, of {len(each)}: "
        *figures, detail, mark = _figures(worst.result)
        stages.add_row(name, *figures, Text(f"{of}{detail}"), mark)
    left = [Text(f"not run: {each.what}: {each.reason}", "yellow") for each in report.not_run]
    return Group(_head(report), stages, *left, _verdict(report))


def _verdict(report: SelftestReport) -> Text:
    first = report.first_failure  # its detail is in the table
    said = report.sentence if first is None else f"{first} is the first stage out of tolerance"
    return Text(f"{report.verdict}: {said}", "bold green" if report.ok else "bold red")


def _head(report: SelftestReport) -> Table:
    rows = []
    bundle, backend = report.bundle, report.backend
    if bundle is not None:
        parameters = f"{bundle.parameters:,} parameters in {bundle.precision}"
        rows.append(("model", f"{bundle.name}, {parameters}, digest {bundle.digest[:12]}"))
    if backend is not None:
        rows.append(("backend", f"{backend.reason}; {backend.max_len} slots"))
    rows.append(("versions", _listed(report.versions)))
    if bundle is not None and bundle.recorded_with:
        rows.append(("recorded with", _listed(bundle.recorded_with)))
    machine = report.machine
    rows.append(("machine", ", ".join([*([] if machine.gpu is None else [machine.gpu]), machine.cpu, machine.system])))
    rows.append(("tested", f"{report.date}, in {seconds(report.seconds)}"))
    return facts("Self-test" if bundle is None else f"Self-test of {bundle.directory}", rows)


def _by_name(stages: Iterable[GoldenStage]) -> dict[str, list[GoldenStage]]:
    named: dict[str, list[GoldenStage]] = {}
    for stage in stages:
        named.setdefault(stage.result.name, []).append(stage)
    return named


def _nearness(stage: GoldenStage) -> float:
    error, tolerance = stage.result.error, stage.result.tolerance
    return error / tolerance if tolerance else error


def _figures(stage: StageResult) -> tuple[str, str, Text, Text]:
    mark = Text("ok", "green") if stage.ok else Text("out of tolerance", "bold red")
    return f"{stage.error:.2g}", f"{stage.tolerance:.2g}", Text(stage.detail), mark


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _table() -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    for name in ("error", "tolerance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("detail", style="dim")
    table.add_column("", no_wrap=True)
    return table
