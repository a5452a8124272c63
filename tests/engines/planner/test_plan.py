"""Stages, what fits, the largest sizes that do, and speed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import get_args

import pytest

from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.names import Backend, CacheForm
from llava_deploy.engines.planner.boards import BOARDS, Board, find_board
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import PlannedModel, Sizes
from llava_deploy.engines.planner.parts import decoder_parts
from llava_deploy.engines.planner.plan import MOST_ROWS, Plan, StagePlan, fits, plan, resolve_sizes
from llava_deploy.engines.planner.run import cache_form_of, decode_bound, decode_bytes, run_memory

SevenB = Callable[..., PlannedModel]
GB = 10**9


def stage(planned: Plan, name: str, backend: str | None) -> StagePlan:
    (found,) = (s for s in planned.stages if (s.stage, s.backend) == (name, backend))
    return found


def test_every_stage_is_planned_for_every_backend(seven_b: SevenB) -> None:
    model = seven_b("int4")
    planned = plan(model, find_board("rtx-4090"), resolve_sizes(model, 1, None, None), None)
    assert [(s.stage, s.backend) for s in planned.stages] == [
        ("export", None),
        *((name, backend) for backend in get_args(Backend) for name in ("build", "run")),
    ]
    assert all(s.memory is not None for s in planned.stages)


def test_a_bundle_is_not_exported_again(demo: PlannedModel) -> None:
    planned = plan(demo, find_board("h100"), resolve_sizes(demo, 1, None, None), None)
    assert "export" not in {s.stage for s in planned.stages}


@pytest.mark.parametrize(
    ("precision", "board", "expected"),
    [
        ("fp16", "orin-nano-8gb", False),  # 14 GB of weights
        ("int4", "orin-nano-8gb", True),
        ("fp16", "agx-orin-64gb", True),
        ("fp16", "rtx-4090", True),
        ("fp16", "rtx-4060", False),
        ("int4", "rtx-4060", True),
        ("fp16", "orin-nx-16gb", False),
    ],
)
def test_7b_runs_with_tensorrt_where_one_would_expect_it(
    seven_b: SevenB, precision: str, board: str, expected: bool
) -> None:
    model = seven_b(precision)
    planned = plan(model, find_board(board), resolve_sizes(model, 1, 1024, None), None)
    assert stage(planned, "run", "tensorrt").fits is expected


@pytest.mark.parametrize("board", ["orin-nano-8gb", "rtx-4090", "h100", "thor-128gb"])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_largest_sizes_fit_and_no_larger_ones(seven_b: SevenB, board: str, precision: str) -> None:
    model, home = seven_b(precision), find_board(board)
    sizes = resolve_sizes(model, 2, 1024, None)
    run = stage(plan(model, home, sizes, None), "run", "tensorrt")
    assert run.largest_batch is not None
    assert run.largest_len is not None

    def does_fit(at: Sizes) -> bool:
        memory = run_memory(model, "tensorrt", at, cache_form_of("tensorrt", home), decoder_parts(model, None))
        return fits(memory, home) is True

    for n in (run.largest_batch, run.largest_batch + 1):
        if 1 <= n <= MOST_ROWS:
            assert does_fit(dataclasses.replace(sizes, max_batch=n)) == (n == run.largest_batch)
    for n in (run.largest_len, run.largest_len + 1):
        if 1 <= n <= model.decoder.max_positions:
            at = dataclasses.replace(sizes, max_len=n, max_seq=min(sizes.max_seq, n))
            assert does_fit(at) == (n == run.largest_len)


def test_unified_memory_holds_host_and_device_together() -> None:
    memory = Memory((Part("weights", "device", 3 * GB), Part("process", "host", 2 * GB), Part("weights", "mapped", GB)))
    nano = find_board("orin-nano-8gb")
    assert fits(memory, dataclasses.replace(nano, memory=5 * GB)) is True
    assert fits(memory, dataclasses.replace(nano, memory=5 * GB - 1)) is False


def test_a_card_is_held_against_its_own_memory_and_the_hosts_where_that_is_known() -> None:
    memory = Memory((Part("weights", "device", 3 * GB), Part("process", "host", 2 * GB)))
    card = dataclasses.replace(find_board("rtx-4090"), memory=3 * GB)
    assert fits(memory, card) is True
    assert fits(memory, dataclasses.replace(card, memory=3 * GB - 1)) is False
    assert fits(memory, dataclasses.replace(card, host=2 * GB)) is True
    assert fits(memory, dataclasses.replace(card, host=2 * GB - 1)) is False
    assert fits(Memory((Part("process", "host", GB),)), card) is None


def test_what_a_board_cannot_run_is_said(seven_b: SevenB) -> None:
    model = seven_b("int4")
    sizes = resolve_sizes(model, 1, None, None)
    rtx = stage(plan(model, find_board("agx-orin-64gb"), sizes, None), "run", "tensorrt-rtx")
    assert (rtx.memory, rtx.fits, rtx.note) == (None, False, "TensorRT for RTX 1.7 does not run on sm87")
    bare = Board("auto", "a laptop", None, 16 * GB, False, None, None, None, "")
    planned = plan(model, bare, sizes, None)
    assert stage(planned, "run", "tensorrt").note == "no NVIDIA GPU"
    assert stage(planned, "run", "onnxruntime").fits is True
    assert stage(planned, "build", "onnxruntime-cuda").fits is True
    assert stage(planned, "run", "onnxruntime-cuda").note == "no NVIDIA GPU"


def test_what_is_on_the_disk_beside_the_bundle(seven_b: SevenB) -> None:
    board = find_board("rtx-4090")

    def disk(precision: str) -> dict[str | None, int | None]:
        model = seven_b(precision)
        planned = plan(model, board, resolve_sizes(model, 1, None, None), None)
        assert {s.disk for s in planned.stages if s.stage != "build"} == {None}
        return {s.backend: s.disk for s in planned.stages if s.stage == "build"}

    fp16, int4 = seven_b("fp16"), seven_b("int4")
    graphs = fp16.bundle_bytes - fp16.embedding_bytes
    assert disk("fp16") == {
        "onnxruntime": 2 * graphs, "onnxruntime-cuda": 0, "tensorrt": graphs, "tensorrt-rtx": graphs,
    }  # fmt: skip
    assert disk("int4")["onnxruntime-cuda"] == int4.decoder_weights.nbytes


def test_the_second_decoder_of_int8_prefill_is_a_byte_for_each_weight(seven_b: SevenB) -> None:
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064
    for precision in ("fp16", "int4"):
        model = seven_b(precision)
        planned = plan(model, find_board("rtx-4090"), resolve_sizes(model, 1, None, None), None)
        assert planned.to_dict()["int8_prefill_bytes"] == weights


def test_decode_speed_is_bandwidth_over_what_a_step_reads(seven_b: SevenB) -> None:
    model = seven_b("fp16")
    planned = plan(model, find_board("h100"), resolve_sizes(model, 4, 2048, None), None)
    speed = stage(planned, "run", "tensorrt").speed
    assert speed is not None
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)  # norms and tables are a thousandth of it
    cache = 4 * 2048 * 2 * 32 * 4096 * 2
    assert speed.empty == pytest.approx(4 * 3350e9 / weights, rel=2e-3)
    assert speed.full == pytest.approx(4 * 3350e9 / (weights + cache), rel=2e-3)


def test_int4_reads_a_quarter_of_fp16_and_its_scales(seven_b: SevenB) -> None:
    fp16, int4 = (decode_bytes(seven_b(precision), "tensorrt", 1, 0) for precision in ("fp16", "int4"))
    assert 0.27 < int4 / fp16 < 0.31  # the output layer is fp16 in both


def test_on_a_cpu_floats_are_read_in_float32_and_quantised_values_as_they_are(seven_b: SevenB) -> None:
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 4096 * 32064
    fp16, int4 = (decode_bytes(seven_b(precision), "onnxruntime", 1, 0) for precision in ("fp16", "int4"))
    assert fp16 == pytest.approx(4 * (layers + head), rel=1e-3)  # norms are less than a thousandth of it
    assert int4 == pytest.approx(layers / 2 + layers / 128 * (2 + 1 / 2) + 4 * head, rel=1e-3)
    bound = decode_bound(seven_b("fp16"), "onnxruntime", 4, 1000, 20e9)
    assert bound.step_bytes - fp16 == 4 * 1000 * 2 * 32 * 4096 * 4
    assert bound.tokens_per_second == pytest.approx(4 * 20e9 / bound.step_bytes)


def test_a_growing_cache_is_there_twice(seven_b: SevenB) -> None:
    model, sizes = seven_b("int4"), Sizes.of_run(1, 4096, 1)

    def cache(form: CacheForm) -> int:
        parts = run_memory(model, "tensorrt", sizes, form, (32,)).parts
        return sum(part.nbytes for part in parts if part.name == "KV cache")

    assert cache("in-place") == 4096 * model.cache_bytes_per_slot
    assert cache("growing") == 2 * 4097 * model.cache_bytes_per_slot
    assert cache_form_of("tensorrt", find_board("orin-nano-8gb")) == "growing"
    assert cache_form_of("tensorrt", find_board("rtx-4090")) == "in-place"


def test_a_plan_is_json(seven_b: SevenB) -> None:
    model = seven_b("int4")
    planned = plan(model, find_board("thor-128gb"), resolve_sizes(model, 1, None, None), None)
    plain = json.loads(json.dumps(planned.to_dict()))
    run = next(s for s in plain["stages"] if (s["stage"], s["backend"]) == ("run", "tensorrt"))
    assert run["memory"]["device"] == sum(p["nbytes"] for p in run["memory"]["parts"] if p["place"] == "device")


@pytest.mark.parametrize(
    ("sizes", "option"), [((0, None, None), "max_batch"), ((1, 4097, None), "max_len"), ((1, None, 0), "max_images")]
)
def test_sizes_that_cannot_be_are_refused(
    seven_b: SevenB, sizes: tuple[int, int | None, int | None], option: str
) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_sizes(seven_b("fp16"), *sizes)
    assert caught.value.option == option


def test_boards_are_found_by_name_and_hold_together() -> None:
    with pytest.raises(OptionError, match="orin-nano-8gb"):
        find_board("orin")
    for name, board in BOARDS.items():
        assert find_board(name) is board
        assert board.memory is not None
        assert board.bandwidth is not None
        assert board.source.startswith("NVIDIA, ")
