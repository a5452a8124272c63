"""onnxruntime-genai on the decoder alone: its builder has no LLaVA."""

from __future__ import annotations

import json
from collections.abc import Callable

from clock import Answer, Question, asked, measure

TASK = asked(__doc__)

import numpy as np  # noqa: E402 - threads are set by now
import onnxruntime_genai as genai  # noqa: E402


def load() -> Answer:
    config = genai.Config(str(TASK.model))
    session = {"intra_op_num_threads": TASK.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)

    def answer(question: Question, tokens: int, on_tokens: Callable[[int], None]) -> list[int]:
        params = genai.GeneratorParams(model)
        length = len(question.ids) + tokens
        # A least length keeps the end-of-text token from being chosen.
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array([question.ids], np.int32))
        ids = []
        for _ in range(tokens):
            generator.generate_next_token()
            ids.append(int(generator.get_next_tokens()[0]))
            on_tokens(1)
        return ids

    return answer


if TASK.mode != "text":
    raise ValueError("onnxruntime-genai: want mode text")
measure(TASK, load, ("onnxruntime-genai",))
