"""OpenVINO GenAI on models that optimum-intel exports. --option precision=f32 --option cache=f32 for float32

Paged attention without the prefix cache, which would answer a known prompt without a prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clock import Answer, Question, asked, measure

TASK = asked(__doc__)

import numpy as np  # noqa: E402 - threads are set by now
import openvino  # noqa: E402
import openvino_genai as genai  # noqa: E402
from PIL import Image  # noqa: E402

SETTINGS = {"precision": "INFERENCE_PRECISION_HINT", "cache": "KV_CACHE_PRECISION"}


class Watch(genai.StreamerBase):  # type: ignore[misc]
    """Keeps the tokens as they come."""

    def __init__(self, on_tokens: Callable[[int], None]) -> None:
        super().__init__()
        self.ids: list[int] = []
        self._on_tokens = on_tokens

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        found = [token] if isinstance(token, int) else token
        self.ids.extend(found)
        self._on_tokens(len(found))
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held back."""


def load() -> Answer:
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = (1 << 31) - 1  # the whole prompt in one run
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": TASK.threads, "PERFORMANCE_HINT": "LATENCY"}
    settings |= {SETTINGS[name]: value for name, value in TASK.options.items()}
    kind = genai.VLMPipeline if TASK.mode == "vlm" else genai.LLMPipeline
    pipeline = kind(str(TASK.model), "CPU", scheduler_config=scheduler, **settings)
    pictures = {
        one.image: openvino.Tensor(np.asarray(Image.open(one.image).convert("RGB"))[None])
        for one in (TASK.timed, TASK.warm_up)
        if one.image
    }

    def answer(question: Question, tokens: int, on_tokens: Callable[[int], None]) -> list[int]:
        config, watch = genai.GenerationConfig(), Watch(on_tokens)
        config.max_new_tokens = config.min_new_tokens = tokens
        config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False
        if question.image is not None:
            # The pipeline writes a newline of its own after a picture.
            prompt = question.prompt.replace("<image>\n", "<ov_genai_image_0>")
            done = pipeline.generate(
                prompt, images=[pictures[question.image]], generation_config=config, streamer=watch
            )
        else:
            ids = np.array([question.ids], np.int64)
            inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
            done = pipeline.generate(inputs, config, watch)
        seen = done.perf_metrics.get_num_input_tokens()
        if seen != len(question.ids):
            raise ValueError(f"want a prompt of {len(question.ids)} tokens, the pipeline saw {seen}")
        return watch.ids

    return answer


measure(TASK, load, ("openvino", "openvino-genai"))
