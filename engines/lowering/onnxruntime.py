"""The passes that make a canonical graph one for ONNX Runtime on a CPU, in order."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.column_scales import BlockColumnScales
from llava_deploy.engines.lowering.float32 import WidenFloats
from llava_deploy.engines.lowering.fused_linears import FuseLinears
from llava_deploy.engines.lowering.group_query_attention import LowerGroupQueryAttention
from llava_deploy.engines.lowering.skip_norms import FuseSkipNorms


def vision_passes() -> list[ir.passes.InPlacePass]:
    """For the vision graph."""
    return [WidenFloats()]


def decoder_passes() -> list[ir.passes.InPlacePass]:
    """For the decoder. Attention comes last: it takes in the product of queries, keys and values that was fused."""
    return [WidenFloats(), BlockColumnScales(), FuseSkipNorms(), FuseLinears(), LowerGroupQueryAttention()]
