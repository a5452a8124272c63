"""Memory at the peak of a build."""

from __future__ import annotations

from llava_deploy.engines.names import Backend
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import PlannedModel, Sizes

_MB = 10**6
_PROCESS = Part("process", "host", 200 * _MB)
_LIBRARIES = Part("process", "mapped", 200 * _MB)


def build_memory(model: PlannedModel, backend: Backend, sizes: Sizes) -> Memory:
    """Peak of ``llava-deploy build``: the larger of its two graphs, which are built one after the other.

    Args:
        model: see :func:`~llava_deploy.engines.planner.model.planned_bundle`.
        backend: what is built for.
        sizes: see :meth:`Sizes.of`; they matter to a backend that runs kernels as it builds.
    """
    del sizes
    weights = max(model.vision_weights.nbytes, model.decoder_bytes)
    factors = {"onnxruntime": (2.0, 1.0), "tensorrt": (1.9, 1.1), "tensorrt-rtx": (1.9, 1.1)}
    anonymous, mapped = factors[backend]
    parts = (
        Part("weights", "host", int(anonymous * weights)),
        Part("weights", "mapped", int(mapped * weights)),
        _PROCESS,
        _LIBRARIES,
    )
    return Memory(parts)
