"""A benchmark's result as tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_deploy.engines.manifest import QuantizationRecipe
from llava_deploy.runtime.bench.compare import compare
from llava_deploy.runtime.bench.options import STANDARD
from llava_deploy.runtime.bench.report import (
    BackendCard,
    Bandwidth,
    BundleCard,
    Decode,
    FirstToken,
    Machine,
    Memory,
    Report,
    Samples,
)
from llava_deploy.runtime.terminal import show
from llava_deploy.runtime.terminal_bench import comparison_table, report_tables


def decode(batch: int, context: int, *rates: float) -> Decode:
    return Decode(batch, context, 64, Samples.of(rates), Samples.of([9e-5]), 80_000_000, 250.0 * batch, 0.4)


REPORT = Report(
    schema=1,
    date="2026-11-23T03:00:00+00:00",
    machine=Machine("Linux", "Abacus 9000", 4, 2, 16 * 10**9, 32 << 20, None),
    versions={"python": "3.12"},
    bundle=BundleCard("a bundle", "smol", "int4", 240_000_000, "clip", "llama",
                      QuantizationRecipe("rtn", 32, False, "int8", 29, 4), "abc", 312_000_000),
    backend=BackendCard("onnxruntime", "ONNX Runtime 1 on the CPU", None, 2048, 1.25),
    options=STANDARD,
    bandwidth=Bandwidth("host read", 2, 1 << 29, Samples.of([20e9, 18e9, 24e9])),
    first_token=FirstToken(233, 1, *(Samples.of([each]) for each in (0.002, 0.1, 0.001, 0.2, 0.004, 0.307))),
    decode=(decode(1, 64, 100.0, 90.0, 110.0), decode(1, 512, 95.0)),
    batches=(decode(1, 64, 100.0, 90.0, 110.0), decode(4, 64, 320.0)),
    memory=(Memory("loading", 200_000_000, 50_000_000, None), Memory("one prompt", 300_000_000, 60_000_000, None)),
    remarks=("something was left out",),
)  # fmt: skip


def shown(capsys: pytest.CaptureFixture[str], report: Report) -> str:
    show(report_tables(report))
    return capsys.readouterr().out


def rows(text: str, title: str) -> list[list[str]]:
    """Cells of the table of that title, without its head."""
    lines = text.partition(title)[2].split("─\n", 1)[1].splitlines()
    return [line.split("  ") for line in lines[: lines.index("")]]


def test_every_figure_has_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, REPORT)
    assert "240,000,000 parameters in int4, rtn, groups of 32, asymmetric, lm_head int8, 312.0 MB" in text
    assert "20.0 (18.0 - 24.0) GB/s, read by 2 threads" in text
    assert "loaded in 1.2 s, 2048 slots" in text
    assert "Abacus 9000, 2 cores, 4 processors for this process, 16.0 GB of memory" in text
    (first,) = rows(text, "First token of a prompt of 233 tokens with one picture, ms")
    assert "".join(f"{cell} " for cell in first if cell).split() == "2.0 100.0 1.0 200.0 4.0 307.0 1165".split()
    one, other = ([cell.strip() for cell in row if cell] for row in rows(text, "Decode behind a context, one row"))
    assert one == ["64", "100.0 (90.0 - 110.0)", "10.00", "80.0 MB", "250.0", "40%", "90"]
    assert other[:2] == ["512", "95.0"]
    _, four = ([cell.strip() for cell in row if cell] for row in rows(text, "Rows at once, each behind 64 tokens"))
    assert four == ["4", "320.0", "80.0", "80.0 MB", "1000.0", "40%", "90"]
    assert [row[0].strip() for row in rows(text, "Peak memory of the process")] == ["loading", "one prompt"]
    assert "note: something was left out" in text


def test_a_gpu_and_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    memory = tuple(replace(peak, device=5 * 10**9) for peak in REPORT.memory)
    copied = replace(REPORT.bandwidth, kind="device copy")
    text = shown(
        capsys, replace(REPORT, memory=memory, bandwidth=copied, machine=replace(REPORT.machine, gpu="NVIDIA L4"))
    )
    assert "NVIDIA L4, Abacus 9000" in text
    assert "copied on the GPU" in text
    assert text.count("5.0 GB") == 2


def test_text_only_one_row_and_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    bare = replace(
        REPORT,
        first_token=replace(REPORT.first_token, pictures=0),
        batches=REPORT.batches[:1],
        memory=(),
        remarks=(),
    )
    text = shown(capsys, bare)
    assert "First token of a prompt of 233 tokens of text" in text
    for title in ("Rows at once", "Peak memory", "note:"):
        assert title not in text


def test_two_results(capsys: pytest.CaptureFixture[str]) -> None:
    now = replace(REPORT, decode=(decode(1, 64, 200.0, 190.0), *REPORT.decode[1:]))
    before = replace(REPORT, machine=replace(REPORT.machine, cpu="Abacus 1"))
    show(comparison_table(compare(now, before), "before.json"))
    text = capsys.readouterr().out
    assert "Beside before.json" in text
    (line,) = (line for line in text.splitlines() if line.strip().startswith("decode, behind 64"))
    assert "100.0 (90.0 - 110.0) tokens/s" in line
    assert "195.0 (190.0 - 200.0) tokens/s" in line
    assert line.split()[-2:] == ["1.95", "better"]
    assert "doubtful: another processor: Abacus 1, now Abacus 9000" in text
