"""The passes that make a canonical graph one for ONNX Runtime on a CPU, in order."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.column_scales import BlockColumnScales
from llava_deploy.engines.lowering.float32 import WidenFloats
from llava_deploy.engines.lowering.fused_linears import FuseLinears
from llava_deploy.engines.lowering.group_query_attention import LowerGroupQueryAttention, Steps
from llava_deploy.engines.lowering.int8_linears import RoundLinearsToInt8
from llava_deploy.engines.lowering.skip_norms import FuseSkipNorms
from llava_deploy.engines.names import Int8Part


def vision_passes(int8: tuple[Int8Part, ...] = ()) -> list[ir.passes.InPlacePass]:
    """For the vision graph."""
    return [WidenFloats(), *([RoundLinearsToInt8()] if "vision" in int8 else [])]


def decoder_passes(int8: tuple[Int8Part, ...] = ()) -> list[ir.passes.InPlacePass]:
    """For the decoder. Attention comes last: it takes in the product of queries, keys and values that was fused.

    With ``prefill`` in ``int8`` there is another graph for all steps that this one does not cover then.
    """
    steps = Steps.ONE_ROW_OR_TOKEN if "prefill" in int8 else Steps.ANY
    return [WidenFloats(), BlockColumnScales(), FuseSkipNorms(), FuseLinears(), LowerGroupQueryAttention(steps)]


def int8_decoder_passes() -> list[ir.passes.InPlacePass]:
    """For the decoder's steps of many tokens, in 8-bit integers."""
    return [WidenFloats(), RoundLinearsToInt8(), FuseSkipNorms(), LowerGroupQueryAttention()]
