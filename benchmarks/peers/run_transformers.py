"""Hugging Face transformers, eager, on the CPU; in float32 it is the reference for tokens. --option dtype=bfloat16"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clock import Answer, Question, asked, measure

TASK = asked(__doc__)

import torch  # noqa: E402 - threads are set by now
from PIL import Image  # noqa: E402
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration  # noqa: E402
from transformers.generation import StoppingCriteria  # noqa: E402


class Watch(StoppingCriteria):
    """Stops nothing; it is called after every token."""

    def __init__(self, on_tokens: Callable[[int], None]) -> None:
        self._on_tokens = on_tokens

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self._on_tokens(1)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load() -> Answer:
    torch.set_num_threads(TASK.threads)
    kind = LlavaForConditionalGeneration if TASK.mode == "vlm" else AutoModelForCausalLM
    dtype = getattr(torch, TASK.options["dtype"])
    model, report = kind.from_pretrained(TASK.model, dtype=dtype, output_loading_info=True)
    missing = sorted(name for name in report["missing_keys"] if "lm_head" not in name)  # tied to the embeddings
    if missing:
        raise ValueError(f"{len(missing)} weights are not in the checkpoint, the first is {missing[0]}")
    model.eval().generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(TASK.model) if TASK.mode == "vlm" else None
    pictures = {one.image: Image.open(one.image).convert("RGB") for one in (TASK.timed, TASK.warm_up) if one.image}

    def feed(question: Question) -> dict[str, torch.Tensor]:
        if processor is None or question.image is None:
            ids = torch.tensor([question.ids])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = processor(images=pictures[question.image], text=question.prompt, return_tensors="pt")
        if found.input_ids[0].tolist() != question.ids:
            raise ValueError("the processor's tokens are not the task's")
        return {**found, "pixel_values": found.pixel_values.to(dtype)}

    @torch.inference_mode()
    def answer(question: Question, tokens: int, on_tokens: Callable[[int], None]) -> list[int]:
        found = model.generate(
            **feed(question), max_new_tokens=tokens, do_sample=False, stopping_criteria=[Watch(on_tokens)]
        )
        new: list[int] = found[0, len(question.ids) :].tolist()
        return new

    return answer


measure(TASK, load, ("torch", "transformers"))
