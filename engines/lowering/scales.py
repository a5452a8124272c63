"""Scales above zero: the only ones that the parser of TensorRT 10.3 takes for a quantised weight."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

_OPERATOR = "DequantizeLinear"


class RaiseZeroScales(ir.passes.InPlacePass):
    """A scale of zero becomes the smallest number of its dtype: 2^-24 in float16.

    A group with such a scale stands for zeros; it then stands for at most 2^-21 (int8: 2^-17) of either sign, which is
    less than the rounding of any other group. Source: the parser's import of ``DequantizeLinear`` as of release 10.6
    ("Scale coefficients must all be positive"); TensorRT for RTX 1.7.1.116 takes zero and below.

    Requires: no scale of a constant weight is below zero.

    Ensures: none is zero. Weights without such scales, which are all that this project makes itself, are not touched.
    """

    def requires(self, model: ir.Model) -> None:
        """None is below zero."""
        for value, scales in _scales(model.graph):
            if (scales < 0).any():
                raise ir.passes.PreconditionError(
                    f"weight scales {value.name!r}: want none below zero, found {float(scales.min()):g}"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace those that have zeros."""
        changed = False
        for value, scales in _scales(model.graph):
            if (scales == 0).any():
                smallest = np.finfo(scales.dtype).smallest_subnormal
                value.const_value = ir.tensor(np.where(scales == 0, smallest, scales), name=value.name)
                changed = True
        return ir.passes.PassResult(model, modified=changed)


def _scales(graph: ir.Graph) -> Iterator[tuple[ir.Value, np.ndarray]]:
    for node in graph:
        value = node.inputs[1] if node.op_type == _OPERATOR else None
        if value is not None and value.const_value is not None:
            yield value, np.asarray(value.const_value.numpy())
