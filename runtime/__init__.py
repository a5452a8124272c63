"""Bundle to answer: preprocessing, splice, sessions, KV cache, sampling, chat. Never torch, transformers or onnx."""

from llava_deploy.engines.integrity import Integrity
from llava_deploy.runtime.answers import Answer, FinishReason, Piece, Timings
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.sampling import GREEDY, SamplingOptions

__all__ = ["GREEDY", "Answer", "FinishReason", "Integrity", "Llava", "Piece", "SamplingOptions", "Timings"]
