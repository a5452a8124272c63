"""Bundle to answer: preprocessing, splice, sessions, KV cache, sampling, chat. Never torch, transformers or onnx.

The names below are imported when they are first asked for: ``llava-deploy --help`` needs none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_deploy.engines.integrity import Integrity
    from llava_deploy.runtime.answers import Answer, FinishReason, Piece, Timings
    from llava_deploy.runtime.llava import Llava
    from llava_deploy.runtime.sampling import GREEDY, SamplingOptions

__all__ = ["GREEDY", "Answer", "FinishReason", "Integrity", "Llava", "Piece", "SamplingOptions", "Timings"]

_HOMES = {
    "GREEDY": "llava_deploy.runtime.sampling",
    "Answer": "llava_deploy.runtime.answers",
    "FinishReason": "llava_deploy.runtime.answers",
    "Integrity": "llava_deploy.engines.integrity",
    "Llava": "llava_deploy.runtime.llava",
    "Piece": "llava_deploy.runtime.answers",
    "SamplingOptions": "llava_deploy.runtime.sampling",
    "Timings": "llava_deploy.runtime.answers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
