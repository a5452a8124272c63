"""Round to nearest: each group's scale from its extremes, each value to the nearest step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from llava_deploy.engines.errors import CheckpointError, InputError
from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.exporter.quantization.request import GROUP_SIZES
from llava_deploy.exporter.quantization.weight import QuantizedSource, QuantizedWeight, WeightFormat
from llava_deploy.exporter.sources.tensors import TensorSource

_ROWS = 64  # output features at a time: about a megabyte as float32, so the passes over them stay in the cache
_LINE = 64  # bytes
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight's groups, both ``[out_features, groups]``; scales are float16 values."""

    scales: torch.Tensor
    zero_points: torch.Tensor | None


def grid_for(low: torch.Tensor, high: torch.Tensor, form: WeightFormat) -> Grid:
    """The grid whose ends are the groups' extremes.

    ``low`` and ``high``, float32 ``[out_features, groups]``, are what the smallest and largest value shall be. Zero is
    always on the grid. Scales are rounded to float16, as they are stored, before anything is rounded with them.
    """
    if form.symmetric:
        steps = 2 ** (form.bits - 1) - 1
        return Grid(_as_stored(torch.maximum(high, -low) / steps), None)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = _as_stored((high - low) / 15)
    return Grid(scales, torch.round(-low / scales).clamp(0, 15))


def _as_stored(scales: torch.Tensor) -> torch.Tensor:
    return scales.half().float().clamp(min=_SMALLEST)  # a group of zeros takes any scale


def round_to_grid(groups: torch.Tensor, grid: Grid, form: WeightFormat) -> torch.Tensor:
    """Values to integers: float32 ``[out_features, groups, group_size]`` to whole float32 numbers.

    Symmetric ones are in ``-2 ** (bits - 1)`` and up, the others 0 to 15. ``groups`` is overwritten.
    """
    values = groups.div_(grid.scales[..., None]).round_()
    if grid.zero_points is None:
        half = 2 ** (form.bits - 1)
        return values.clamp_(-half, half - 1)
    return values.add_(grid.zero_points[..., None]).clamp_(0, 15)


def quantize(weight: np.ndarray, form: WeightFormat, origin: str) -> QuantizedWeight:
    """Round a weight ``[out_features, in_features]`` of any float dtype to the nearest.

    Raises:
        InputError: the group size does not divide the input features, or the output features are odd in number.
        CheckpointError: a value is NaN or infinite, or too large for float16 scales.
    """
    require_form(weight.shape, form, origin)
    out_features, in_features = weight.shape
    groups = 1 if form.group_size is None else in_features // form.group_size
    per_byte = 8 // form.bits
    data = np.empty((in_features, out_features // per_byte), np.uint8)
    scales = np.empty((groups, out_features), np.float16)
    zero_points = None if form.symmetric else np.empty((groups, out_features // per_byte), np.uint8)
    # Rows a cache line further apart than a power of two: their transposition would meet one set of the cache only.
    packed = torch.empty(_ROWS // per_byte, in_features + _LINE, dtype=torch.uint8)[:, :in_features]
    for start, rows in _chunks(weight):
        split = rows.view(len(rows), groups, -1)  # [rows, groups, group_size]
        grid = grid_for(split.amin(dim=2), split.amax(dim=2), form)  # ten times as fast as one call of aminmax
        if not bool(torch.isfinite(grid.scales).all()):
            raise CheckpointError(
                f"{origin}: holds NaN, infinite or very large values, of which float16 scales cannot be made; the "
                "checkpoint is damaged, take it from its source again"
            )
        codes = round_to_grid(split, grid, form).to(torch.int8).view(torch.uint8).flatten(1)  # [rows, in_features]
        columns = slice(start // per_byte, (start + len(rows)) // per_byte)
        data[:, columns] = _pack(codes, form, packed[: len(rows) // per_byte]).T
        scales[:, start : start + len(rows)] = grid.scales.T.numpy()
        if zero_points is not None and grid.zero_points is not None:
            codes = grid.zero_points.to(torch.uint8)  # [rows, groups]
            zero_points[:, columns] = _pack(codes, form, torch.empty_like(codes[::2])).T
    return QuantizedWeight(form, data, scales, zero_points, None)


def require_form(shape: tuple[int, ...], form: WeightFormat, origin: str) -> None:
    """Refuse what a format cannot hold.

    Raises:
        InputError: the group size does not divide the input features, or the output features are odd in number.
    """
    out_features, in_features = shape
    if form.group_size is not None and in_features % form.group_size:
        raise InputError(
            f"{origin}: its {in_features} input features cannot be cut into groups of {form.group_size}; "
            f"{_advice(in_features)}"
        )
    if form.bits == 4 and out_features % 2:
        raise InputError(f"{origin}: has {out_features} outputs, 4 bits want an even number; keep it in 8 bits or fp16")


def _advice(in_features: int) -> str:
    fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0]
    if fitting:
        return f"take groups of {' or '.join(fitting)}"
    return f"none of {', '.join(map(str, GROUP_SIZES))} divides them: export it with --precision fp16"


def _chunks(weight: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
    """Some rows at a time, as float32 that may be overwritten."""
    for start in range(0, len(weight), _ROWS):
        rows = np.ascontiguousarray(weight[start : start + _ROWS])
        if rows.dtype.name == "bfloat16":  # torch takes no bfloat16 from NumPy
            yield start, torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).float()
        else:
            yield start, torch.tensor(rows).float()


def _pack(codes: torch.Tensor, form: WeightFormat, packed: torch.Tensor) -> np.ndarray:
    """uint8 ``[rows, columns]`` into ``packed``; with 4 bits two rows share each byte, ``[rows / 2, columns]``."""
    if form.bits == 4:
        torch.bitwise_left_shift(codes[1::2], 4, out=packed)
        packed |= codes[0::2] & 15
    else:
        packed.copy_(codes)
    array: np.ndarray = packed.numpy()
    return array


@dataclass(frozen=True)
class RoundedTensor(QuantizedSource):
    """A float weight that is rounded as it is read."""

    method: ClassVar[QuantizationMethod] = "rtn"
    name: str
    source: TensorSource
    format: WeightFormat

    @property
    def key(self) -> str:  # type: ignore[override]
        """The source's."""
        return self.source.key

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The source's."""
        return self.source.shape

    @property
    def origin(self) -> str:
        """The source's."""
        return self.source.origin

    @property
    def files(self) -> tuple[Path, ...]:
        """The source's."""
        return self.source.files

    @property
    def nbytes(self) -> int:
        """The source's."""
        return self.source.nbytes

    def read_quantized(self) -> QuantizedWeight:
        """The weight, rounded."""
        return quantize(self.source.read(), self.format, self.origin)
