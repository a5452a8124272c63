"""What is loaded rounds to 8 bits, and hides a wrong weight in it: the graphs are replayed without that, too."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.engines.names import AccuracyLevel
from llava_deploy.runtime.backend_choice import OnnxRuntimeChoice
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.encoding import PromptEncoder
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions, OnnxRuntimeVision
from llava_deploy.runtime.selftest.limits import Arithmetic, Rounding, rounds_activations
from llava_deploy.runtime.selftest.replay import Recorded, features_stage, logits_stage, replay_twice
from llava_deploy.runtime.selftest.report import GoldenStage, NotRun

_EXACT: AccuracyLevel = 1
_FEATURES, _LOGITS = "image features, not rounded", "logits, not rounded"


def rounds_features(choice: OnnxRuntimeChoice) -> bool:
    """Whether the tower that is loaded computes in 8-bit integers."""
    return "vision" in choice.int8


def rounds_logits(choice: OnnxRuntimeChoice) -> bool:
    """Whether the decoder that is loaded does, or multiplies its quantised weights so."""
    return "prefill" in choice.int8 or rounds_activations(choice.accuracy_level)


def exact_stages(
    bundle: Bundle, choice: OnnxRuntimeChoice, many: Sequence[Recorded], threads: int | None, max_len: int
) -> Iterator[GoldenStage | NotRun]:
    """Image features and logits of the canonical graphs in floats, where those that are loaded round to 8 bits.

    Args:
        bundle: with its graphs.
        choice: what will be loaded for the rest of the test; not now, so that there is one model in memory at a time.
        many: goldens, none of which is longer than ``max_len``.
        threads: of one operator.
        max_len: slots of the cache.

    Raises:
        BackendError: ONNX Runtime cannot load a graph.
    """
    vision_too, logits_too = rounds_features(choice), rounds_logits(choice)
    if not vision_too and not logits_too:
        return
    manifest = bundle.manifest
    missing = {entry.path for entry in manifest.left_out}
    if missing & {VISION_GRAPH, DECODER_GRAPH}:
        yield NotRun(
            _LOGITS if logits_too else _FEATURES,
            "what is loaded rounds to 8 bits, which hides a weight that is off by a percent, and the graphs that could "
            "tell were left out when the bundle was packed",
        )
        return
    rounding = Rounding(manifest.model.precision, Arithmetic.FLOATS)
    exact = None if manifest.quantization is None else _EXACT
    options = OnnxRuntimeOptions(threads, exact)
    vision = OnnxRuntimeVision(bundle.path(VISION_GRAPH), manifest.vision, options)
    if vision_too:
        seeing = [one for one in many if one.golden.pictures]
        yield from replay_twice(features_stage(_FEATURES, vision, rounding), seeing)
    if logits_too:
        encoder = PromptEncoder(bundle, vision)
        decoder = OnnxRuntimeDecoder(bundle.path(DECODER_GRAPH), manifest.decoder, max_len, options)
        yield from replay_twice(logits_stage(_LOGITS, encoder, decoder, rounding), many)
        del decoder, encoder
    del vision
    gc.collect()  # before the other model comes
