"""The passes that make a canonical graph one for ONNX Runtime's CUDA provider, in order."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.fused_linears import FuseLinears
from llava_deploy.engines.lowering.group_query_attention import Form, LowerGroupQueryAttention
from llava_deploy.engines.lowering.last_tokens import PickLastTokensEarly
from llava_deploy.engines.lowering.packed_products import PackProducts
from llava_deploy.engines.lowering.skip_norms import FuseSkipNorms
from llava_deploy.engines.lowering.transposed_weights import FuseTransposedWeights
from llava_deploy.engines.lowering.unused_inputs import DropUnusedInputs


def vision_passes() -> list[ir.passes.InPlacePass]:
    """For the vision graph, whose weights are as they were."""
    return [FuseTransposedWeights()]


def decoder_passes() -> list[ir.passes.InPlacePass]:
    """For the decoder; floats stay float16, and int4 weights lie as ONNX Runtime reads them.

    Weights of floats are as they were, so an engine can have them of the bundle.
    """
    products = [PickLastTokensEarly(), FuseSkipNorms(), FuseLinears(), PackProducts(), FuseTransposedWeights()]
    return [*products, LowerGroupQueryAttention(Form.STATED), DropUnusedInputs()]
