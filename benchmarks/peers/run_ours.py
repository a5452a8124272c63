"""This project's bundles, through its public interface.

What the runtime remembers between calls cannot help: the warm-up question has another picture, whose features are not
the timed one's, and begins with another token, so that nothing of its context is reused. That is checked, not hoped.
"""

from __future__ import annotations

from collections.abc import Callable

from clock import Answer, Question, asked, measure

TASK = asked(__doc__)

from our_weights import MOST_REUSED, decoder_bytes, without_end  # noqa: E402 - threads are set by now
from PIL import Image  # noqa: E402

from llava_deploy.runtime import Llava  # noqa: E402

SLOTS = -(-(len(TASK.timed.ids) + TASK.new_tokens) // 256) * 256  # as llama.cpp is given


def load() -> Answer:
    # Always the full number of tokens, as with the other peers.
    llava = without_end(Llava.load(TASK.model, backend="onnxruntime", max_len=SLOTS, threads=TASK.threads))
    pictures = {one.image: Image.open(one.image).convert("RGB") for one in (TASK.timed, TASK.warm_up) if one.image}

    def answer(question: Question, tokens: int, on_tokens: Callable[[int], None]) -> list[int]:
        shown = [] if question.image is None else [pictures[question.image]]
        ids: list[int] = []
        for piece in llava.stream(question.prompt, shown, max_new_tokens=tokens):
            ids.extend(piece.token_ids)
            on_tokens(len(piece.token_ids))
            timings = piece.timings
        if timings is None or timings.reused_tokens > MOST_REUSED or (shown and not timings.vision):
            raise ValueError(f"an answer that was not computed from its beginning: {timings}")
        if timings.prompt_tokens != len(question.ids):
            raise ValueError(f"want a prompt of {len(question.ids)} tokens, the runtime saw {timings.prompt_tokens}")
        return ids

    return answer


measure(TASK, load, ("llava-deploy", "onnxruntime"), decoder_bytes=decoder_bytes(TASK.model))
