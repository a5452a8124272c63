"""AutoAWQ's GEMM packing, the ``quantization_config`` of which transformers reads as ``quant_method: awq``.

Source: AutoAWQ, ``awq/modules/linear/gemm.py`` (``WQLinear_GEMM``) and ``awq/utils/packing_utils.py``
(``dequantize_gemm``). Of a layer with K inputs and N outputs: ``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32
``[K / group_size, N / 8]``, ``scales`` ``[K / group_size, N]``. An int32 holds 8 columns, from the lowest bits on in
the order 0, 2, 4, 6, 1, 3, 5, 7, in the weights and in the zero points. A weight is ``(q - z) * s``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.quantization.formats.packed import (
    PER_INT32,
    SCALE_DTYPES,
    PackedTensor,
    group_sizes,
    read_bytes,
    read_scales,
    require_packed,
    require_shape,
)
from llava_deploy.exporter.quantization.weight import QuantizedWeight, WeightFormat
from llava_deploy.exporter.sources.tensors import StoredTensor

METHOD = "awq"

# How it was quantised, and how AutoAWQ or transformers run it. modules_to_not_convert: the file has those layers dense.
_NO_EFFECT = """
    act_group_aware batch_size block_name_to_quantize cache_block_outputs damp_percent dataset desc_act do_fuse
    exllama_config fuse_max_seq_len max_input_length meta model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize modules_to_fuse modules_to_not_convert pad_token_id quant_method tokenizer
    true_sequential
""".split()


@dataclass(frozen=True)
class AwqTensor(PackedTensor):
    """A weight in AutoAWQ's GEMM packing."""

    method: ClassVar[QuantizationMethod] = "autoawq"

    def read_quantized(self) -> QuantizedWeight:
        """The weight in 4 bits."""
        qweight, qzeros, scales = (self.parts[part] for part in AwqPacking.required)
        return self._weight(_in_order(read_bytes(qweight)), read_scales(scales), _in_order(read_bytes(qzeros)))


@dataclass(frozen=True)
class AwqPacking:
    """What the config says: ``group_size`` -1 means all input features; without zero points all of them are 8."""

    required: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    optional: ClassVar[tuple[str, ...]] = ()

    group_size: int
    symmetric: bool

    def open(self, module: str, parts: Mapping[str, StoredTensor]) -> AwqTensor:
        """As :meth:`Packing.open`."""
        qweight, qzeros, scales = (parts[part] for part in self.required)
        in_features, words = require_packed(qweight, "int32")
        size, stored = group_sizes(in_features, self.group_size, qweight)
        reason = f"the shape of qweight and group_size {self.group_size} say"
        require_shape(qzeros, ("int32",), (in_features // size, words), reason)
        require_shape(scales, SCALE_DTYPES, (in_features // size, PER_INT32 * words), reason)
        form = WeightFormat(4, stored, self.symmetric, permuted=False)
        shape = (PER_INT32 * words, in_features)
        return AwqTensor(f"{module}.weight", qweight.key, shape, form, size, parts)


def parse(fields: Fields) -> AwqPacking:
    """Read a ``quantization_config`` of this method.

    Raises:
        CheckpointError: another packing than GEMM, or anything that cannot be honoured, by name.
    """
    if fields.peek("backend") == "llm-awq":
        step = "a file of TinyChat's is read with --quantized FILE, over the unquantised checkpoint"
        raise fields.error("backend", "want AutoAWQ's GEMM packing", step)
    fields.only("bits", (4,), "other bits are not supported: take the unquantised checkpoint")
    fields.only("w_bit", (4,), "other bits are not supported: take the unquantised checkpoint")
    for key in ("version", "format", "checkpoint_format"):
        version = fields.get(key, str, "gemm")
        if version.lower() != "gemm":
            step = "other packings are not read: pack it as GEMM with AutoAWQ, or take the unquantised checkpoint"
            raise fields.error(key, "want 'gemm'", step)
    key = "q_group_size" if fields.has("q_group_size") else "group_size"
    size = fields.get(key, int, 128)
    if size != -1 and size < 1:
        raise fields.error(key, "want -1 or a positive number", "correct the file")
    symmetric = not fields.get("zero_point", bool, True)
    fields.peek("sym")  # transformers writes GPTQ's default; zero_point is what AWQ says
    for name in _NO_EFFECT:
        fields.peek(name)
    return AwqPacking(size, symmetric)


def _in_order(words: np.ndarray) -> np.ndarray:
    """uint8 ``[rows, N / 8, 4]`` with columns 0 2, 4 6, 1 3, 5 7 to ``[rows, N / 2]`` with 0 1, 2 3, 4 5, 6 7."""
    rows, count, size = words.shape
    ordered = np.empty((rows, count, size), np.uint8)
    for half in (0, 1):
        even, odd = words[..., half], words[..., half + 2]
        np.bitwise_or(even & 15, odd << 4, out=ordered[..., 2 * half])
        np.bitwise_or(even >> 4, odd & 0xF0, out=ordered[..., 2 * half + 1])
    return ordered.reshape(rows, count * size)
