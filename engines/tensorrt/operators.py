"""Operators that the ONNX parser of TensorRT 10.3 documents, with their types. Standard library only.

Source: the parser's operators list (onnx-tensorrt, docs/operators.md) as it stood in release 10.6, less what its
changelog (docs/Changelog.md) says was added after 10.3: BlackmanWindow, HammingWindow and HannWindow (10.4) and STFT
(10.5). The list's heading names opsets 9 to 20 in the 10.0 series and 9 to 22 in 10.6. That 10.3 took INT4 weights in
``DequantizeLinear`` follows from the changelog of 10.0.
"""

from __future__ import annotations

from collections.abc import Mapping

OPSETS = (9, 20)
"""First and last that are documented; INT4 weights need opset 21's ``DequantizeLinear``, and ONNX 1.16, which has it,
is what that parser was made with."""

IR_VERSION = 10
"""Of ONNX 1.16: the latest that it reads."""

_FLOATS = ("float32", "float16", "bfloat16")
_NUMBERS = (*_FLOATS, "int32", "int64")
_ALL = (*_NUMBERS, "bool")

_BY_TYPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        _FLOATS,
        (
            "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv "
            "ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool "
            "GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler "
            "InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax LpNormalization "
            "LpPool MatMul MaxPool MeanVarianceNormalization PRelu ParametricSoftplus Pow QuantizeLinear RNN "
            "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize Round ScaledTanh "
            "Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample"
        ),
    ),
    (("float32", "float16"), "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"),
    (
        _NUMBERS,
        (
            "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max "
            "Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean "
            "ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink "
            "Sign SpaceToDepth Sub Sum TopK"
        ),
    ),
    ((*_NUMBERS, "float8"), "Mean"),
    ((*_NUMBERS, "int8"), "Gelu"),
    (
        _ALL,
        (
            "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity "
            "If Loop OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu "
            "Unsqueeze Where"
        ),
    ),
    ((*_ALL, "uint8"), "Cast CastLike"),
    (("bool",), "And Not Or Xor"),
    (("int8", "float8", "int4"), "DequantizeLinear"),
)

OPERATORS_10_3: Mapping[str, tuple[str, ...]] = {name: types for types, names in _BY_TYPES for name in names.split()}
"""Types of each operator's data, by ONNX's names of them (``float8`` for the one of its kinds that TensorRT has)."""
