"""The passes that make a canonical graph one for TensorRT, in order."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.attention import LowerAttention
from llava_deploy.engines.lowering.growing_cache import GrowCache
from llava_deploy.engines.lowering.opset import DeclareOpset
from llava_deploy.engines.lowering.rms_norm import LowerRMSNormalization
from llava_deploy.engines.lowering.rotary import LowerRotaryEmbedding
from llava_deploy.engines.lowering.scales import RaiseZeroScales
from llava_deploy.engines.lowering.static_cache import FixCacheLength
from llava_deploy.engines.lowering.zero_points import LowerZeroPoints
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt.constructs import Release, takes


def vision_passes(release: Release) -> list[ir.passes.InPlacePass]:
    """For the vision graph: as it is where the release has ``Attention``, else in the operators of TensorRT 10.3."""
    return [] if takes(release, "Attention") else [LowerAttention(), DeclareOpset()]


def decoder_passes(cache: CacheForm, max_len: int) -> list[ir.passes.InPlacePass]:
    """For the decoder.

    Args:
        cache: as :func:`~llava_deploy.engines.tensorrt.constructs.cache_form` gives it for a release. ``growing`` takes
            the operators of TensorRT 10.3 and no others.
        max_len: slots of the cache; a growing one has no length of its own.
    """
    if cache == "in-place":
        return [LowerZeroPoints(), FixCacheLength(max_len)]
    return [
        LowerZeroPoints(),
        GrowCache(),
        LowerRMSNormalization(),
        LowerRotaryEmbedding(),
        LowerAttention(),
        RaiseZeroScales(),
        DeclareOpset(),
    ]
