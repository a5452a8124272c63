"""What a caller asks of quantisation. Nothing heavy is imported here: the command line is made of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.names import HeadPrecision

if TYPE_CHECKING:
    from llava_deploy.exporter.quantization.weight import WeightFormat

GROUP_SIZES = (32, 64, 128)
"""Input features that may share a scale."""

GROUP_SIZE = 128
"""Where none is asked for: what AWQ and GPTQ checkpoints have, and TensorRT's kernels are made for."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How a float checkpoint's decoder becomes int4.

    Attributes:
        group_size: input features that share a scale: 32, 64 or 128.
        symmetric: no zero points; a little faster where a backend has no kernel for them, a little less exact.
        lm_head: precision of the output layer; 8 bits have one scale an output.
    """

    group_size: int
    symmetric: bool
    lm_head: HeadPrecision

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise OptionError("group_size", f"want one of {', '.join(map(str, GROUP_SIZES))}, got {self.group_size!r}")
        if self.lm_head not in get_args(HeadPrecision):
            raise OptionError("lm_head", f"want one of {', '.join(get_args(HeadPrecision))}, got {self.lm_head!r}")

    @property
    def weight_format(self) -> WeightFormat:
        """Of every linear layer but the output layer."""
        from llava_deploy.exporter.quantization.weight import WeightFormat

        return WeightFormat(4, self.group_size, self.symmetric, permuted=False)

    @property
    def head_format(self) -> WeightFormat | None:
        """Of the output layer; ``None`` where it stays a float."""
        from llava_deploy.exporter.quantization.weight import WeightFormat

        columns = WeightFormat(8, None, symmetric=True, permuted=False)
        return {"fp16": None, "int8": columns, "int4": self.weight_format}[self.lm_head]


@dataclass(frozen=True)
class QuantizeRequest:
    """What the command line says about quantisation; ``None`` where it says nothing.

    Attributes:
        group_size: input features that share a scale.
        symmetric: no zero points.
        lm_head: precision of the output layer.
        calibration: for AWQ: a JSON-lines file, or ``demo`` for drawn pictures.
        device: for AWQ: PyTorch's name of the device to search on.
    """

    group_size: int | None
    symmetric: bool
    lm_head: HeadPrecision | None
    calibration: str | None
    device: str | None

    def options(self) -> QuantizeOptions:
        """With what is not said filled in."""
        group_size = GROUP_SIZE if self.group_size is None else self.group_size
        return QuantizeOptions(group_size, self.symmetric, "fp16" if self.lm_head is None else self.lm_head)
