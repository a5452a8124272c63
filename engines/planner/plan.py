"""What a model takes on a board: every stage's peak memory, whether that fits, how much would, and how fast it decodes.

Memory is counted where it is: the GPU's, the host's, or one of both. Files that are mapped are told apart and fit
always, since the system takes their pages back where it must.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.names import Backend
from llava_deploy.engines.planner.boards import Board
from llava_deploy.engines.planner.build import build_memory, engine_disk
from llava_deploy.engines.planner.export import export_memory
from llava_deploy.engines.planner.memory import Memory
from llava_deploy.engines.planner.model import PlannedModel, Sizes
from llava_deploy.engines.planner.onnxruntime_memory import int8_prefill_bytes
from llava_deploy.engines.planner.parts import decoder_parts
from llava_deploy.engines.planner.refusals import BackendStage, refusal
from llava_deploy.engines.planner.run import cache_form_of, decode_bound, run_memory

Stage = Literal["export", "build", "run"]
MOST_ROWS = 1024
"""No larger batch is looked for."""


@dataclass(frozen=True)
class Speed:
    """Decoded tokens a second, of all rows together, that the memory's bandwidth allows at most.

    Attributes:
        empty: with nothing in the cache.
        full: with every slot of it in use.
    """

    empty: float
    full: float


@dataclass(frozen=True)
class StagePlan:
    """One stage on one backend.

    Attributes:
        backend: ``None`` of an export.
        memory: at the peak; ``None`` where the stage cannot be had on the board.
        fits: ``None`` where the board's memory of that kind is not known.
        note: why it cannot be had, or what has to be known beside the numbers.
        largest_batch: rows that would fit at the length that was asked for; ``None`` where it makes no difference.
        largest_len: slots of the cache that would fit at that batch; likewise.
        speed: of decoding; ``None`` of other stages, and where the bandwidth is not known.
        disk: bytes that an engine takes beside the bundle, hard links not counted; ``None`` of all but builds.
    """

    stage: Stage
    backend: Backend | None
    memory: Memory | None
    fits: bool | None
    note: str
    largest_batch: int | None
    largest_len: int | None
    speed: Speed | None
    disk: int | None = None


@dataclass(frozen=True)
class Plan:
    """All stages of one model on one board.

    Attributes:
        model: its name.
        precision: of the bundle.
        board: what it is planned for.
        sizes: what is bound at most.
        parts: layers of the decoder in each of TensorRT's plans.
        bundle_bytes: of the bundle's weights on the disk.
        int8_prefill_bytes: what is not in the stages: the second decoder of ``build --int8 prefill``, in a run with
            ``onnxruntime`` and on the disk.
        stages: in the order in which they come.
    """

    model: str
    precision: str
    board: Board
    sizes: Sizes
    parts: tuple[int, ...]
    bundle_bytes: int
    int8_prefill_bytes: int
    stages: tuple[StagePlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; memory also summed by place, in bytes."""
        plain = dataclasses.asdict(self)
        for stage, entry in zip(self.stages, plain["stages"], strict=True):
            if stage.memory is not None:
                entry["memory"]["anonymous"] = stage.memory.anonymous
                entry["memory"]["mapped"] = stage.memory.mapped
                entry["memory"]["device"] = stage.memory.device
        return plain


def resolve_sizes(model: PlannedModel, max_batch: int, max_len: int | None, max_images: int | None) -> Sizes:
    """What is bound at most: by default all positions that the model knows, and as many pictures as rows.

    Raises:
        OptionError: a size below 1, or a length that the model does not know.
    """
    positions = model.decoder.max_positions
    if max_len is not None and max_len > positions:
        raise OptionError("max_len", f"want 1 to {positions}, the model's positions, got {max_len}")
    length = positions if max_len is None else max_len
    return Sizes.of_run(max_batch, length, max_batch if max_images is None else max_images)


def plan(model: PlannedModel, board: Board, sizes: Sizes, parts: int | None) -> Plan:
    """Plan every stage; TensorRT's with the decoder in so many parts.

    Raises:
        OptionError: of ``parts``: see :func:`~llava_deploy.engines.planner.parts.decoder_parts`.
    """
    shares = decoder_parts(model, parts)
    stages = []
    if model.source is not None:
        memory = export_memory(model)
        stages.append(
            StagePlan("export", None, memory, fits(memory, board), _host_note(memory, board), None, None, None)
        )
    for backend in get_args(Backend):
        stages += [_planned(stage, backend, model, board, sizes, shares) for stage in get_args(BackendStage)]
    return Plan(
        model.name,
        model.precision,
        board,
        sizes,
        shares,
        model.bundle_bytes,
        int8_prefill_bytes(model),
        tuple(stages),
    )


def fits(memory: Memory, board: Board) -> bool | None:
    """Whether a board has that; ``None`` where it is not known how much it has of what is wanted."""
    if board.is_unified:
        return None if board.memory is None else memory.unified <= board.memory
    device = True if memory.device == 0 else board.memory is not None and memory.device <= board.memory
    if board.host is not None:
        return device and memory.anonymous <= board.host
    return None if memory.device == 0 else device


def _planned(
    stage: BackendStage, backend: Backend, model: PlannedModel, board: Board, sizes: Sizes, parts: tuple[int, ...]
) -> StagePlan:
    why_not = refusal(stage, backend, model, board)
    if why_not:
        return StagePlan(stage, backend, None, False, why_not, None, None, None)

    def memory(at: Sizes) -> Memory:
        peak = build_memory if stage == "build" else run_memory
        return peak(model, backend, at, cache_form_of(backend, board), parts)

    found = memory(sizes)
    fit = fits(found, board)
    note = _host_note(found, board)
    if stage == "build":
        return StagePlan(stage, backend, found, fit, note, None, None, None, engine_disk(model, backend))
    if fit is None:
        return StagePlan(stage, backend, found, fit, note, None, None, None)
    batch = _largest(lambda n: fits(memory(dataclasses.replace(sizes, max_batch=n)), board) is True, MOST_ROWS)
    positions = model.decoder.max_positions
    length = _largest(lambda n: fits(memory(_of_length(sizes, n)), board) is True, positions)
    speed = None
    if backend != "onnxruntime" and board.bandwidth is not None:
        empty, full = (
            decode_bound(model, backend, sizes.max_batch, slots, board.bandwidth).tokens_per_second
            for slots in (0, sizes.max_len)
        )
        speed = Speed(empty, full)
    return StagePlan(stage, backend, found, fit, note, batch, length, speed)


def _of_length(sizes: Sizes, length: int) -> Sizes:
    return dataclasses.replace(sizes, max_len=length, max_seq=min(sizes.max_seq, length))


def _largest(is_good: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that is good, where all below a good one are; 0 where none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_good(middle) else (low, middle - 1)
    return low


def _host_note(memory: Memory, board: Board) -> str:
    if board.is_unified or board.host is not None:
        return ""
    return f"where the host has {memory.anonymous / 1e9:.1f} GB"
