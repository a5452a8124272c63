"""Two results beside each other: ratios, verdicts, and everything that makes them doubtful."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.manifest import QuantizationRecipe
from llava_deploy.runtime.bench.compare import compare
from llava_deploy.runtime.bench.report import Decode, Report, Samples

INT4 = QuantizationRecipe("rtn", 128, False, "fp16", 29, 4)


def faster(decode: Decode, factor: float) -> Decode:
    return replace(decode, tokens_per_second=Samples.of([factor * rate for rate in decode.tokens_per_second.each]))


def test_a_result_beside_itself(report: Report) -> None:
    beside = compare(report, report)
    assert beside.doubts == ()
    assert {quantity.ratio for quantity in beside.quantities} == {1.0}
    assert {quantity.verdict for quantity in beside.quantities} == {"within the spread"}
    names = [quantity.name for quantity in beside.quantities]
    tokens = report.first_token.prompt_tokens
    assert names == [
        f"time to first token, {tokens} tokens",
        f"of it vision, {tokens} tokens",
        f"of it prefill, {tokens} tokens",
        "decode, behind 16",
        "decode, behind 64",
        "decode, 2 rows behind 16",
    ]


def test_faster_and_slower_beyond_the_spread(report: Report) -> None:
    first = report.first_token
    slow = replace(first, total=Samples.of([100 * each for each in first.total.each]))
    now = replace(report, first_token=slow, decode=tuple(faster(decode, 100) for decode in report.decode))
    total, _, _, short, *_ = compare(now, report).quantities
    assert (total.verdict, total.ratio) == ("worse", pytest.approx(100))
    assert (short.verdict, short.ratio) == ("better", pytest.approx(100))
    total, _, _, short, *_ = compare(report, now).quantities
    assert (total.verdict, short.verdict) == ("better", "worse")


def test_only_what_both_have_is_compared(report: Report) -> None:
    other = replace(report, first_token=replace(report.first_token, prompt_tokens=9), decode=report.decode[1:])
    assert [quantity.name for quantity in compare(report, other).quantities] == [
        "decode, behind 64", "decode, 2 rows behind 16"
    ]  # fmt: skip
    with pytest.raises(InputError, match="nothing can be compared"):
        compare(report, replace(other, decode=(), batches=()))


def test_of_text_only_there_is_no_vision_to_compare(report: Report) -> None:
    none = Samples.of([0.0, 0.0, 0.0])
    text = replace(report, first_token=replace(report.first_token, pictures=0, vision=none))
    assert not any("vision" in quantity.name for quantity in compare(text, text).quantities)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("bundle", {"digest": "other"}, "another bundle of the same shape"),
        ("bundle", {"precision": "int4", "quantization": INT4}, "another precision: int4, now fp32"),
        ("bundle", {"parameters": 7}, "another model: checkpoint (7 parameters), now checkpoint (3,160,320)"),
        ("machine", {"cpu": "abacus"}, "another processor: abacus, now"),
        ("machine", {"gpu": "H100"}, "another GPU: H100, now none given"),
        ("machine", {"physical_cores": 96}, "another number of cores: 96, now"),
        ("machine", {"memory": 10**9}, "another amount of memory: 1.0 GB, now"),
        ("backend", {"name": "tensorrt"}, "another backend: tensorrt, now onnxruntime"),
        ("backend", {"reason": "canonical graphs"}, "the backend ran otherwise: canonical graphs; now ONNX Runtime"),
        ("backend", {"threads": None}, "threads: none given, now 1"),
        ("backend", {"max_len": 99}, "slots of the cache: 99, now 1024"),
        ("options", {"new_tokens": 99}, "tokens of an answer: 99, now 6"),
    ],
)
def test_what_is_doubtful_is_said(report: Report, part: str, changes: dict[str, Any], said: str) -> None:
    before = replace(report, **{part: replace(getattr(report, part), **changes)})
    doubts = compare(report, before).doubts
    assert len(doubts) == 1
    assert said in doubts[0]


def test_versions_and_bandwidths_that_differ(report: Report) -> None:
    versions = {**report.versions, "onnxruntime": "0.1", "abacus": "3"}
    rates = Samples.of([2 * each for each in report.bandwidth.bytes_per_second.each])
    before = replace(report, versions=versions, bandwidth=replace(report.bandwidth, bytes_per_second=rates))
    versions_said, busy = compare(report, before).doubts
    assert "abacus 3, now none" in versions_said
    assert f"onnxruntime 0.1, now {report.versions['onnxruntime']}" in versions_said
    assert "GB/s" in busy


def test_two_forms_of_int4_are_two_precisions(report: Report) -> None:
    one, other = (
        replace(report, bundle=replace(report.bundle, precision="int4", quantization=replace(INT4, group_size=size)))
        for size in (32, 128)
    )
    assert compare(one, other).doubts == ("another precision: int4, now int4 in another form",)
