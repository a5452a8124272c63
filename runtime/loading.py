"""From a choice of backend to the two sessions."""

from __future__ import annotations

from dataclasses import dataclass

from llava_deploy.engines.engine_manifest import VISION_PLAN, decoder_plans
from llava_deploy.engines.errors import BackendError, OptionError
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.names import Backend
from llava_deploy.runtime.backend import DecoderSession, VisionSession
from llava_deploy.runtime.backend_choice import SPOKEN_BACKENDS, GpuChoice, OnnxRuntimeChoice, Wanted, choose, fall_back
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.cuda_choice import CudaChoice
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions, OnnxRuntimeVision
from llava_deploy.runtime.tensorrt_choice import TensorRtChoice

DEFAULT_MAX_LEN = 4096
"""Slots of ONNX Runtime's cache, where the model allows as many and the caller does not say."""


@dataclass(frozen=True)
class Sessions:
    """Both graphs, loaded, and the choice that they are of."""

    vision: VisionSession
    decoder: DecoderSession
    choice: OnnxRuntimeChoice | GpuChoice

    @property
    def backend(self) -> Backend:
        """What runs them."""
        return self.choice.backend

    @property
    def reason(self) -> str:
        """For people: which backend, and why a better one does not."""
        return self.choice.reason


def open_sessions(bundle: Bundle, wanted: Wanted, integrity: Integrity) -> Sessions:
    """Choose the backend and load the graphs.

    Raises:
        BundleError: a file of the engine is damaged.
        BackendError: no backend that may be taken runs here, or it cannot load the graphs.
        OptionError: ``max_len`` is outside what the model or the engine allows, or another option cannot be had.
    """
    positions = bundle.manifest.decoder.max_positions
    if wanted.max_len is not None and (type(wanted.max_len) is not int or not 1 <= wanted.max_len <= positions):
        raise OptionError("max_len", f"want 1 to {positions}, the model's positions, got {wanted.max_len!r}")
    choice = choose(bundle, wanted, integrity)
    if not isinstance(choice, OnnxRuntimeChoice):
        try:
            if isinstance(choice, TensorRtChoice):
                return _open_tensorrt(bundle, choice)
            return _open_cuda(bundle, choice, wanted)
        except BackendError as error:  # no memory on the GPU, say
            if wanted.backend != "auto":
                raise
            choice = fall_back(bundle, wanted, integrity, [f"not {SPOKEN_BACKENDS[choice.backend]}: {error}"])
    return _open_onnxruntime(bundle, choice, wanted)


def _slots(bundle: Bundle, wanted: Wanted) -> int:
    positions = bundle.manifest.decoder.max_positions
    return min(DEFAULT_MAX_LEN, positions) if wanted.max_len is None else wanted.max_len


def _open_cuda(bundle: Bundle, choice: CudaChoice, wanted: Wanted) -> Sessions:
    from llava_deploy.runtime.onnxruntime_cuda import OnnxRuntimeCudaDecoder, OnnxRuntimeCudaVision

    vision = OnnxRuntimeCudaVision(choice.vision, bundle.manifest.vision)
    decoder = OnnxRuntimeCudaDecoder(choice.decoder, bundle.manifest.decoder, _slots(bundle, wanted))
    return Sessions(vision, decoder, choice)


def _open_onnxruntime(bundle: Bundle, choice: OnnxRuntimeChoice, wanted: Wanted) -> Sessions:
    shape = bundle.manifest.decoder
    slots = _slots(bundle, wanted)
    options = OnnxRuntimeOptions(wanted.threads, choice.accuracy_level)
    vision = OnnxRuntimeVision(choice.vision, bundle.manifest.vision, options, rounds="vision" in choice.int8)
    decoder = OnnxRuntimeDecoder(choice.decoder, shape, slots, options, choice.int8_decoder)
    return Sessions(vision, decoder, choice)


def _open_tensorrt(bundle: Bundle, choice: TensorRtChoice) -> Sessions:
    from llava_deploy.runtime.tensorrt.decoder import TensorRtDecoder
    from llava_deploy.runtime.tensorrt.growing import GrowingDecoder
    from llava_deploy.runtime.tensorrt.plans import open_plans
    from llava_deploy.runtime.tensorrt.vision import TensorRtVision

    names = (VISION_PLAN, *decoder_plans(choice.recipe))
    plans = open_plans(choice.directory, names, choice.module, choice.device)
    vision = TensorRtVision(plans[0], bundle.manifest.vision)
    kind = TensorRtDecoder if choice.recipe.cache == "in-place" else GrowingDecoder
    decoder = kind(plans[1:], bundle.manifest.decoder, choice.max_len)
    return Sessions(vision, decoder, choice)
