"""How a decoder is shared out among plans, and what that makes of the memory of builds and runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from llava_deploy.engines.decoder_parts import layer_ranges
from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.names import LARGEST_PART, Precision
from llava_deploy.engines.planner import parts as planner
from llava_deploy.engines.planner.boards import find_board
from llava_deploy.engines.planner.build import build_memory
from llava_deploy.engines.planner.model import PlannedModel, Sizes
from llava_deploy.engines.planner.parts import decoder_parts, part_weights, quantized_weights
from llava_deploy.engines.planner.plan import fits, plan, resolve_sizes
from llava_deploy.engines.planner.run import run_memory

SevenB = Callable[..., PlannedModel]
SIZES = Sizes.of_run(1, 4096, 1)


def test_the_largest_part_is_as_small_as_can_be() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.integers(1, 20, rng.integers(1, 8)).tolist()
        for count in range(1, len(weights) + 1):
            parts = planner._shared_out(weights, count)
            assert (len(parts), sum(parts), min(parts) >= 1) == (count, len(weights), True)
            cuts = itertools.combinations(range(1, len(weights)), count - 1)
            every = [np.diff((0, *cut, len(weights))) for cut in cuts]
            assert planner._largest(weights, parts) == min(planner._largest(weights, each) for each in every)


@pytest.mark.parametrize(("precision", "parts"), [("int4", (12, 12, 8)), ("fp16", (4, 4, 4, 4, 4, 4, 4, 3, 1))])
def test_7b_by_default(seven_b: SevenB, precision: Precision, parts: tuple[int, ...]) -> None:
    """As few as keep each at the limit: one less would not."""
    model = seven_b(precision)
    assert decoder_parts(model, None) == parts

    def largest(shares: tuple[int, ...]) -> int:
        return max(part_weights(model, layers).nbytes for layers in layer_ranges(shares))

    assert largest(parts) <= LARGEST_PART < largest(decoder_parts(model, len(parts) - 1))


def test_a_small_decoder_is_in_one_part_and_layers_beyond_the_limit_are_alone(
    demo: PlannedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decoder_parts(demo, None) == (demo.decoder.layers,)
    monkeypatch.setattr(planner, "LARGEST_PART", 1)
    assert decoder_parts(demo, None) == (1,) * demo.decoder.layers


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_every_weight_is_in_one_part(seven_b: SevenB, precision: Precision) -> None:
    model = seven_b(precision)
    parts = [part_weights(model, layers) for layers in layer_ranges(decoder_parts(model, 5))]
    names = [tensor.name for part in parts for tensor in part.tensors]
    assert sorted(names) == sorted(tensor.name for tensor in model.decoder_weights.tensors)
    found = sum((quantized_weights(part) for part in parts), start=Counter[int]())
    assert found == ({4: 7 * 32} if precision == "int4" else {})


@pytest.mark.parametrize("parts", [0, -1, 33])
def test_a_number_of_parts_that_cannot_be(seven_b: SevenB, parts: int) -> None:
    with pytest.raises(OptionError, match=rf"parts: want 1 to 32 \(layers of the decoder\), got {parts}"):
        decoder_parts(seven_b("int4"), parts)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_build_takes_less_in_more_parts(seven_b: SevenB, precision: Precision, backend: str) -> None:
    model = seven_b(precision)
    peaks = [
        build_memory(model, backend, SIZES, "in-place", decoder_parts(model, n))  # type: ignore[arg-type]
        for n in (1, 2, 4, 8)  # beyond that the tower is larger
    ]
    for before, after in itertools.pairwise(peaks):
        assert after.anonymous < before.anonymous
    for before, after in itertools.pairwise(peaks[:3]):
        assert after.mapped < before.mapped
        assert (after.device < before.device) == (backend == "tensorrt")


def test_7b_is_built_in_4_gib_and_in_int4_on_a_board_of_8_gb(seven_b: SevenB) -> None:
    for precision in ("fp16", "int4"):
        model = seven_b(precision)
        peak = build_memory(model, "tensorrt-rtx", SIZES, "in-place", decoder_parts(model, None))
        assert peak.anonymous < 4 * 2**30
    model, board = seven_b("int4"), find_board("orin-nano-8gb")
    for parts, does_fit in ((1, False), (None, True), (4, True)):
        peak = build_memory(model, "tensorrt", SIZES, "growing", decoder_parts(model, parts))
        assert fits(peak, board) is does_fit


def test_hidden_states_between_parts_are_in_two_buffers(seven_b: SevenB) -> None:
    model, sizes = seven_b("fp16"), Sizes.of_run(3, 2048, 1)
    taken = [run_memory(model, "tensorrt", sizes, "in-place", decoder_parts(model, n)).device for n in (1, 2, 3, 32)]
    buffer = 3 * 1024 * 4096 * 2  # rows, tokens of a piece, hidden size, halves
    assert [each - taken[0] for each in taken] == [0, buffer, 2 * buffer, 2 * buffer]


def test_a_plan_says_the_parts_and_takes_them(seven_b: SevenB) -> None:
    model, board = seven_b("int4"), find_board("rtx-4090")
    sizes = resolve_sizes(model, 1, None, None)
    assert plan(model, board, sizes, None).to_dict()["parts"] == (12, 12, 8)
    fewer, more = (
        next(s for s in plan(model, board, sizes, n).stages if (s.stage, s.backend) == ("build", "tensorrt"))
        for n in (1, 8)
    )
    assert fewer.memory is not None
    assert more.memory is not None
    assert more.memory.anonymous < fewer.memory.anonymous / 3
