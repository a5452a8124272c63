"""A benchmark of the shipped model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_deploy.engines.engine_manifest import source_digest
from llava_deploy.engines.errors import BackendError, OptionError
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.bench.options import BenchOptions
from llava_deploy.runtime.bench.report import Report
from llava_deploy.runtime.bench.sessions import load
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder

Run = Callable[..., Report]


def test_what_was_measured(report: Report, demo_bundle: Path) -> None:
    manifest = read_manifest(demo_bundle)
    assert report.bundle.digest == source_digest(manifest)
    assert report.bundle.precision == "fp32"
    assert (report.backend.name, report.backend.threads) == ("onnxruntime", 1)
    assert "engine onnxruntime-" in report.backend.reason
    assert report.backend.max_len == manifest.decoder.max_positions
    assert report.machine.logical_cpus >= report.machine.physical_cores >= 1
    assert report.machine.gpu is None
    assert {"python", "onnxruntime", "numpy", "llava-deploy"} <= report.versions.keys()


def test_everything_has_a_sample_a_round(report: Report) -> None:
    first = report.first_token
    assert first.pictures == 1
    assert 36 + 38 <= first.prompt_tokens <= 36 + 40
    parts = (first.preprocess, first.vision, first.splice, first.prefill, first.rest)
    for number in range(3):
        assert sum(part.each[number] for part in parts) == pytest.approx(first.total.each[number], rel=1e-6)
    assert all(part.median > 0 for part in parts)
    assert [(decode.batch, decode.context) for decode in report.decode] == [(1, 16), (1, 64)]
    assert [(decode.batch, decode.context) for decode in report.batches] == [(1, 16), (2, 16)]
    for decode in (*report.decode, *report.batches):
        assert decode.new_tokens == 6
        rate = decode.tokens_per_second
        assert len(rate.each) == 3
        assert 0 < rate.least <= rate.median <= rate.most
        # All that a step is, Python's part is less than.
        assert 0 < decode.python_seconds.least < decode.batch / rate.least


def test_the_limit_is_bandwidth_over_what_a_step_reads(report: Report) -> None:
    bandwidth = report.bandwidth.bytes_per_second
    assert report.bandwidth.kind == "host read"
    assert len(bandwidth.each) == 4 * 3
    shape = 2 * 4 * 2 * 32 * 4  # keys and values, layers, heads, their size, float32
    short, long = report.decode
    assert long.step_bytes - short.step_bytes == (long.context - short.context) * shape
    for decode in report.decode:
        assert decode.limit == pytest.approx(bandwidth.median / decode.step_bytes)
        assert decode.share == pytest.approx(decode.tokens_per_second.median / decode.limit)
    one, two = report.batches
    assert two.step_bytes - one.step_bytes == (16 + 2) * shape
    assert two.limit == pytest.approx(2 * bandwidth.median / two.step_bytes)


def test_memory_is_looked_at_phase_by_phase(report: Report) -> None:
    assert [peak.phase for peak in report.memory] == ["before loading", "loading", "one prompt", "batch of 2"]
    assert all(peak.anonymous > 1 << 20 and peak.device is None for peak in report.memory)


def test_a_short_context_is_text_only_and_what_does_not_fit_is_named(run_bench: Run, demo_bundle: Path) -> None:
    options = BenchOptions(None, (8, 64), (2,), 64, 1)
    found = run_bench(demo_bundle, Wanted("onnxruntime", max_len=32, threads=1), options)
    assert found.first_token.pictures == 0
    assert found.first_token.vision.most == 0
    assert [decode.context for decode in found.decode] == [8]
    assert [decode.batch for decode in found.batches] == [2]
    said = "\n".join(found.remarks)
    assert "answers of 16 tokens instead of 64" in said
    assert "text only: a picture takes 36 tokens" in said
    assert "context of 64 tokens left out" in said


def test_next_to_no_context_is_refused(run_bench: Run, demo_bundle: Path) -> None:
    with pytest.raises(OptionError, match="want a context of 16 tokens or more"):
        run_bench(demo_bundle, Wanted("onnxruntime", max_len=8, threads=1))


def test_turns_are_reported_and_all_prompts_but_the_first_tokens_repeat(
    run_bench: Run, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str, bool, int]] = []
    generate = Llava.generate

    def watching(self: Llava, prompts: list[str], images: object = None, *, max_new_tokens: int) -> object:
        asked.append((len(prompts), prompts[0], bool(images), max_new_tokens))
        return generate(self, prompts, images, max_new_tokens=max_new_tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(Llava, "generate", watching)
    turns: list[tuple[int, int]] = []
    options = BenchOptions(None, (16, 64), (1, 2), 6, 2)
    run_bench(demo_bundle, options=options, on_turn=lambda *at: turns.append(at))
    assert turns == [(done, 12) for done in range(1, 13)]
    turn = [(rows, shown) for rows, _, shown, _ in asked[:4]]
    assert turn == [(1, False), (1, False), (1, True), (2, False)]
    assert [(rows, shown) for rows, _, shown, _ in asked] == 3 * turn
    assert asked[0][1].startswith(asked[1][1])  # the shorter context is in the cache already
    assert {tokens for rows, _, shown, tokens in asked[4:] if not shown} == {6}


def test_a_batch_that_there_is_no_room_for_is_left_out(
    run_bench: Run, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = OnnxRuntimeDecoder.begin

    def cramped(self: OnnxRuntimeDecoder, batch: int) -> None:
        if batch > 2:
            raise BackendError("no room")
        begin(self, batch)

    monkeypatch.setattr(OnnxRuntimeDecoder, "begin", cramped)
    found = run_bench(demo_bundle, options=BenchOptions(None, (16,), (1, 2, 4), 4, 1))
    assert [decode.batch for decode in found.batches] == [1, 2]
    assert "batch of 4 left out: no room" in found.remarks


def test_answers_go_on_past_stop_tokens_and_steps_are_timed(demo_bundle: Path) -> None:
    loaded = load(demo_bundle, Wanted("onnxruntime", threads=1))
    usual = Llava.load(demo_bundle, threads=1)
    prompt = "USER: hello ASSISTANT:"
    (stopped,) = usual.generate([prompt], max_new_tokens=60)
    (answer,) = loaded.llava.generate([prompt], max_new_tokens=60)
    assert (stopped.finish_reason, answer.finish_reason) == ("stop", "length")
    assert answer.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    laps = loaded.decoder.laps
    assert len(laps) == 60
    assert all(0 < lap.run < lap.whole for lap in laps)
    assert np.isclose(sum(lap.run for lap in laps), loaded.decoder.run_seconds)


def test_without_an_engine_the_canonical_graphs_are_measured(run_bench: Run, demo_bundle_fp16: Path) -> None:
    found = run_bench(demo_bundle_fp16, options=BenchOptions(20, (16,), (1,), 3, 1))
    assert "canonical graphs" in found.backend.reason
    assert found.first_token.prompt_tokens == 20
    assert any("text only" in remark for remark in found.remarks)
