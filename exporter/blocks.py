"""Modules that towers, projectors and decoders are made of, as declarative ONNX.

Attributes carry the checkpoint's weight names, so ``named_parameters`` says which tensors a graph wants. Linear weights
stay as the checkpoint stores them, ``[out_features, in_features]``: the source bytes can be used as they are, and each
backend folds or fuses the transposition as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from llava_deploy.exporter.config import Activation
from llava_deploy.exporter.quantization.weight import WeightFormat

__all__ = [
    "LayerNorm",
    "Linear",
    "OpBuilder",
    "QuantizedLinear",
    "RMSNorm",
    "activation",
    "merge_heads",
    "quantize_linears",
    "split_heads",
]


class Linear(nn.Module):
    """``x @ weight.T + bias``, as ``torch.nn.Linear``."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([out_features, in_features], dtype)
        self.bias = nn.Parameter([out_features], dtype) if bias else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y = op.MatMul(x, op.Transpose(self.weight, perm=[1, 0]))
        return y if self.bias is None else op.Add(y, self.bias)


class QuantizedLinear(nn.Module):
    """``x @ dequantized(weight) + bias``, the weight ``[in_features, out_features]`` in 4 or 8 bits.

    Standard ``DequantizeLinear``, blocks along the input features where they share scales in groups: ONNX Runtime
    fuses it with the product, and TensorRT keeps symmetric weights in 4 bits.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, dtype: ir.DataType, form: WeightFormat
    ) -> None:
        super().__init__()
        kind = {(4, True): ir.DataType.INT4, (4, False): ir.DataType.UINT4, (8, True): ir.DataType.INT8}
        stored = kind[form.bits, form.symmetric]
        groups = [] if form.group_size is None else [in_features // form.group_size]
        self.weight = nn.Parameter([in_features, out_features], stored)
        self.weight_scale = nn.Parameter([*groups, out_features], dtype)
        self.weight_zero_point = None if form.symmetric else nn.Parameter([*groups, out_features], stored)
        self.weight_permutation = nn.Parameter([in_features], ir.DataType.INT64) if form.permuted else None
        self.bias = bias
        self.group_size = form.group_size

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        parts = [self.weight, self.weight_scale]
        if self.weight_zero_point is not None:
            parts.append(self.weight_zero_point)
        if self.group_size is None:
            weight = op.DequantizeLinear(*parts, axis=1)
        else:
            weight = op.DequantizeLinear(*parts, axis=0, block_size=self.group_size)
        if self.weight_permutation is not None:
            x = op.Gather(x, self.weight_permutation, axis=-1)
        y = op.MatMul(x, weight)
        return y if self.bias is None else op.Add(y, self.bias)


def quantize_linears(root: nn.Module, formats: Mapping[str, WeightFormat], dtype: ir.DataType) -> None:
    """Put :class:`QuantizedLinear` in the place of every :class:`Linear` whose weight ``formats`` names."""
    modules = dict(root.named_modules())
    for name, form in formats.items():
        path = name.removesuffix(".weight")
        linear, (parent, _, attribute) = modules[path], path.rpartition(".")
        out_features, in_features = (int(size) for size in linear.weight.shape)
        replacement = QuantizedLinear(in_features, out_features, linear.bias, dtype, form)
        setattr(modules[parent], attribute, replacement)


class LayerNorm(nn.Module):
    """``torch.nn.LayerNorm`` over the last axis; mean and variance in float32."""

    def __init__(self, size: int, epsilon: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self.bias = nn.Parameter([size], dtype)
        self.epsilon = epsilon

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.epsilon)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019) over the last axis, computed in float32."""

    def __init__(self, size: int, epsilon: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self.epsilon = epsilon

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.epsilon)


def activation(op: OpBuilder, kind: Activation, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The activation functions of transformers' ``ACT2FN`` that LLaVA checkpoints use."""
    if kind == "gelu":
        return op.Gelu(x)
    if kind == "gelu_pytorch_tanh":
        return op.Gelu(x, approximate="tanh")
    if kind == "silu":
        return op.Mul(x, op.Sigmoid(x))
    slope = op.initializer(ir.tensor(1.702, dtype=dtype), name="quick_gelu_slope")
    return op.Mul(x, op.Sigmoid(op.Mul(x, slope)))


def split_heads(op: OpBuilder, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """``[batch, seq, heads * head_dim]`` to ``[batch, heads, seq, head_dim]``."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])


def merge_heads(op: OpBuilder, x: ir.Value, size: int) -> ir.Value:
    """``[batch, heads, seq, head_dim]`` to ``[batch, seq, size]``."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, size])
