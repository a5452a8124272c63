"""GPTQ checkpoints: ``quant_method: gptq``, as AutoGPTQ and GPTQModel write them.

Source: AutoGPTQ, ``auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py``; GPTQModel,
``gptqmodel/nn_modules/qlinear/torch.py`` and ``gptqmodel/utils/model.py`` (``convert_gptq_v1_to_v2_format``). Of a
layer with K inputs and N outputs: ``qweight`` int32 ``[K / 8, N]``, 8 rows in an int32, ``qzeros`` int32
``[K / group_size, N / 8]``, 8 columns in an int32, both from the lowest bits on, ``scales`` ``[K / group_size, N]``,
and ``g_idx`` ``[K]``, the group of each input feature. A weight is ``(q - z) * s``.

The first checkpoint format stores z - 1. AutoGPTQ takes each value for itself, so a stored 15 is a 0; GPTQModel takes
``0x11111111`` from a word of eight, so that a 0 borrows from its neighbour, and adds it again. Who wrote a file is in
its ``meta``. ``gptq_v2`` stores z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.quantization.formats.packed import (
    PER_INT32,
    SCALE_DTYPES,
    PackedTensor,
    group_sizes,
    order_by_group,
    read_bytes,
    read_scales,
    require_in_order,
    require_packed,
    require_shape,
    rows_from_words,
)
from llava_deploy.exporter.quantization.weight import QuantizedWeight, WeightFormat
from llava_deploy.exporter.sources.tensors import StoredTensor

METHOD = "gptq"

# How it was quantised and by what, and how other programs run it. lm_head: the file shows whether that layer is packed.
_NO_EFFECT = """
    act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent
    dataset desc_act disable_exllama exllama_config failsafe fallback gptaq gptaq_alpha hessian hyb_act lm_head
    max_input_length mock_quantization model_file_base_name model_name_or_path model_seqlen
    module_name_preceding_first_block modules_in_block_to_quantize mse offload_to_disk offload_to_disk_path pad_token_id
    parallel_packing quant_method static_groups tokenizer true_sequential use_cuda_fp16 use_exllama v2 v2_alpha
    vram_strategy wait_for_submodule_finalizers
""".split()


class ZeroPoints(Enum):
    """What ``qzeros`` holds."""

    AS_THEY_ARE = "gptq_v2"
    LESS_ONE_EACH = "gptq, of AutoGPTQ"
    LESS_ONE_IN_WORDS = "gptq, of GPTQModel"


@dataclass(frozen=True)
class GptqTensor(PackedTensor):
    """A weight in GPTQ's packing."""

    method: ClassVar[QuantizationMethod] = "gptq"

    stored_zero_points: ZeroPoints

    def read_quantized(self) -> QuantizedWeight:
        """The weight in 4 bits."""
        qweight, qzeros, scales = (self.parts[part] for part in GptqPacking.required)
        g_idx = self.parts.get("g_idx")
        permutation = None
        if g_idx is not None and self.format.permuted:
            permutation = order_by_group(g_idx, scales.shape[0], self.group_size)
        elif g_idx is not None:
            require_in_order(g_idx, self.group_size)
        data = rows_from_words(read_bytes(qweight))
        if permutation is not None:
            data = data[permutation]
        zero_points = _zero_points(read_bytes(qzeros), self.stored_zero_points)
        return self._weight(data, read_scales(scales), zero_points, permutation=permutation)


@dataclass(frozen=True)
class GptqPacking:
    """What the config says.

    Attributes:
        group_size: -1 means all input features.
        symmetric: all zero points are 8.
        is_ordered_by_activation: groups are not of input features that follow each other (``desc_act``).
        zero_points: what ``qzeros`` holds.
    """

    required: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    optional: ClassVar[tuple[str, ...]] = ("g_idx",)

    group_size: int
    symmetric: bool
    is_ordered_by_activation: bool
    zero_points: ZeroPoints

    def open(self, module: str, parts: Mapping[str, StoredTensor]) -> GptqTensor:
        """As :meth:`Packing.open`."""
        qweight, qzeros, scales = (parts[part] for part in self.required)
        words, out_features = require_packed(qweight, "int32")
        in_features = PER_INT32 * words
        size, stored = group_sizes(in_features, self.group_size, qweight)
        if out_features % PER_INT32:
            raise CheckpointError(
                f"{qweight.origin}: want a multiple of {PER_INT32} outputs, for qzeros to be packed, found "
                f"{out_features}; the file is damaged: take it from its source again"
            )
        reason = f"the shape of qweight and group_size {self.group_size} say"
        groups = in_features // size
        require_shape(qzeros, ("int32",), (groups, out_features // PER_INT32), reason)
        require_shape(scales, SCALE_DTYPES, (groups, out_features), reason)
        permuted = self.is_ordered_by_activation and groups > 1
        if "g_idx" in parts:
            require_shape(parts["g_idx"], ("int32", "int64"), (in_features,), "the shape of qweight says")
        elif permuted:
            raise CheckpointError(
                f"{qweight.origin}: want {module}.g_idx beside it, as desc_act says, found none; "
                "the file is damaged: take it from its source again"
            )
        form = WeightFormat(4, stored, self.symmetric, permuted)
        shape = (out_features, in_features)
        return GptqTensor(f"{module}.weight", qweight.key, shape, form, size, parts, self.zero_points)


def parse(fields: Fields) -> GptqPacking:
    """Read a ``quantization_config`` of this method.

    Raises:
        CheckpointError: anything that cannot be honoured, by name.
    """
    fields.require("bits", int)
    fields.only("bits", (4,), "other bits are not supported: take the unquantised checkpoint")
    fields.only("is_marlin_format", (False,), "Marlin's packing is not read: take the checkpoint in GPTQ's")
    fields.only("pack_dtype", ("int32",), "other words are not read: pack it in int32 with GPTQModel")
    for key in ("adapter", "rotation", "preprocessors"):
        fields.only(key, ({}, []), "it changes what the layers compute: take the unquantised checkpoint")
    dynamic = fields.get("dynamic", dict, {})
    if any(not str(pattern).startswith("-:") for pattern in dynamic):  # those that are left out are dense in the file
        raise fields.error("dynamic", "want it absent", "layers quantised in different ways are not supported")
    size = fields.get("group_size", int, 128)
    if size != -1 and size < 1:
        raise fields.error("group_size", "want -1 or a positive number", "correct the file")
    is_ordered = fields.get("desc_act", bool, False)
    symmetric = fields.get("sym", bool, True)
    zero_points = _stored_zero_points(fields)
    for name in _NO_EFFECT:
        fields.peek(name)
    return GptqPacking(size, symmetric, is_ordered, zero_points)


def _stored_zero_points(fields: Fields) -> ZeroPoints:
    formats = {key: fields.get(key, str, "").lower() for key in ("checkpoint_format", "format")}
    for key, value in formats.items():
        if value not in ("", "gptq", "gptq_v2"):
            step = "other packings are not read: write it in one of these with GPTQModel"
            raise fields.error(key, "want 'gptq' or 'gptq_v2'", step)
    said = {value for value in formats.values() if value}
    if len(said) > 1:
        raise fields.error(
            "format", f"want {formats['checkpoint_format']!r} as in checkpoint_format", "correct the file"
        )
    meta = fields.get("meta", dict, {})
    if said == {"gptq_v2"}:
        return ZeroPoints.AS_THEY_ARE
    writers = meta.get("quantizer", [])
    writers = writers if isinstance(writers, list) else [writers]
    is_gptqmodel = any(str(writer).startswith("gptqmodel") for writer in writers)
    return ZeroPoints.LESS_ONE_IN_WORDS if is_gptqmodel else ZeroPoints.LESS_ONE_EACH


def _zero_points(words: np.ndarray, stored: ZeroPoints) -> np.ndarray:
    """uint8 ``[groups, N / 8, 4]`` to ``[groups, N / 2]``, in which a byte holds two columns as it does in the file."""
    groups, count, size = words.shape
    if stored is ZeroPoints.LESS_ONE_IN_WORDS:
        words = (words.view("<u4") + np.uint32(0x11111111)).view(np.uint8)
    packed = words.reshape(groups, count * size)
    if stored is ZeroPoints.LESS_ONE_EACH:
        packed = ((packed + 1) & 15) | ((packed & 0xF0) + 0x10)  # bytes wrap, and so does each half of them
    return packed
