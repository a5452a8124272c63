"""The passes that make a canonical graph one for ONNX Runtime on a CPU, in order."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.column_scales import BlockColumnScales
from llava_deploy.engines.lowering.float32 import WidenFloats
from llava_deploy.engines.lowering.fused_linears import FuseLinears
from llava_deploy.engines.lowering.group_query_attention import Form, LowerGroupQueryAttention
from llava_deploy.engines.lowering.int8_linears import RoundLinearsToInt8
from llava_deploy.engines.lowering.int8_projections import PackInt8Projections
from llava_deploy.engines.lowering.last_tokens import PickLastTokensEarly
from llava_deploy.engines.lowering.multi_head_attention import LowerMultiHeadAttention
from llava_deploy.engines.lowering.skip_norms import FuseSkipNorms
from llava_deploy.engines.lowering.unused_inputs import DropUnusedInputs
from llava_deploy.engines.lowering.whole_scores import AttendWithoutTiles
from llava_deploy.engines.names import Int8Part

_TOLD_OF_NEW_TOKENS = (1, 32)
"""The release whose GroupQueryAttention is known to take ``query_seqlens`` on the CPU: its own operator schema says so,
and ``tests/engines/lowering`` run it."""


def vision_passes(int8: tuple[Int8Part, ...] = ()) -> list[ir.passes.InPlacePass]:
    """For the vision graph."""
    rounding = [RoundLinearsToInt8()] if "vision" in int8 else []
    return [WidenFloats(), *rounding, LowerMultiHeadAttention()]


def decoder_passes(form: Form, int8: tuple[Int8Part, ...] = ()) -> list[ir.passes.InPlacePass]:
    """For the decoder. Attention comes late: it takes in the product of queries, keys and values that was fused.

    Where another decoder has the steps of many tokens, this one's scores are few.
    """
    attention = LowerGroupQueryAttention(form)
    products = [WidenFloats(), PickLastTokensEarly(), BlockColumnScales(), FuseSkipNorms(), FuseLinears()]
    untiled = [AttendWithoutTiles()] if "prefill" in int8 else []
    return [*products, attention, *untiled, DropUnusedInputs()]


def int8_decoder_passes(form: Form) -> list[ir.passes.InPlacePass]:
    """For the decoder's steps of many tokens, in 8-bit integers.

    Norms stay beside their sums: together they take less time for one token, and more for 233.
    """
    attention = LowerGroupQueryAttention(form)
    products = [WidenFloats(), PickLastTokensEarly(), RoundLinearsToInt8()]
    return [*products, attention, PackInt8Projections(), DropUnusedInputs()]


def attention_form(version: str) -> Form:
    """What the attention of a release of ONNX Runtime, as ``1.32.0``, can be."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return Form.ALONE if (major, minor) >= _TOLD_OF_NEW_TOKENS else Form.BRANCH
