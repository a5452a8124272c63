"""What an engine for ONNX Runtime's CUDA provider is, stated once: its key, and which bundles it can be of.

Standard library only.
"""

from __future__ import annotations

from llava_deploy.engines.engine_manifest import EngineKey, source_digest
from llava_deploy.engines.manifest import Manifest

CUDA_PROVIDER = "CUDAExecutionProvider"
CUDA_SINCE = "1.25"
"""The oldest ONNX Runtime that its engines are for; they are not bound to one release, nor to one GPU."""

HEAD_DIM = 16
"""And its multiples: what ONNX Runtime's GroupQueryAttention rotates in full; other attention is not lowered."""

LAST_SLOTS = "last_slots"
"""Input of the decoder: int32 ``[batch]``, each row's last slot of the cache that is visible."""

TOTAL_SLOTS = "total_slots"
"""Input of the decoder: int32 scalar in the host's memory. For several tokens a row, slots of the row behind them; for
single tokens any number from the longest row's slots to the cache's, as kernels read what :data:`LAST_SLOTS` says."""


def cuda_key(manifest: Manifest) -> EngineKey:
    """Of the engine of a bundle; it is the same on every machine."""
    return EngineKey("onnxruntime-cuda", CUDA_SINCE, "cuda", source_digest(manifest), None, None)


def cuda_refusal(manifest: Manifest) -> str | None:
    """Why the provider cannot run a bundle; ``None`` where it can.

    Its attention has no kernel for float32, nor for heads whose size is no multiple of :data:`HEAD_DIM`.
    """
    dtypes = {manifest.decoder.dtype, manifest.vision.dtype}
    if dtypes != {"float16"}:
        found = " and ".join(sorted(dtypes))
        wants = f"onnxruntime-cuda wants a bundle of float16, found {found}"
        return f"{wants}; export it with --precision fp16, int4 or int4-awq"
    if manifest.decoder.head_dim % HEAD_DIM:
        wants = f"onnxruntime-cuda wants heads of a multiple of {HEAD_DIM}, found {manifest.decoder.head_dim}"
        return f"{wants}; run the bundle with another backend"
    return None
