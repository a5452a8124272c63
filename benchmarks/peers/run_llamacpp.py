"""llama.cpp through llama-cpp-python; with --option tower=FILE, libmtmd's vision tower and projector."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from clock import Answer, Question, asked, measure

TASK = asked(__doc__)

import llama_cpp  # noqa: E402 - threads are set by now
from llama_cpp import mtmd_cpp as mtmd  # noqa: E402
from llamacpp_context import BATCH, Context, require  # noqa: E402
from PIL import Image  # noqa: E402

SLOTS = -(-(len(TASK.timed.ids) + TASK.new_tokens) // 256) * 256  # llama.cpp rounds up to this, too


class Tower:
    """libmtmd: vision tower, projector, and prompts with pictures."""

    def __init__(self, file: str, context: Context) -> None:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads, params.warmup = False, False, TASK.threads, True
        self._tower = mtmd.mtmd_init_from_file(file.encode(), context.model, params)
        if not self._tower:
            raise ValueError(f"{file}: libmtmd cannot load it")
        self._context = context
        self._bitmaps = {one.image: _bitmap(one.image) for one in (TASK.timed, TASK.warm_up) if one.image}

    def read(self, question: Question) -> int:
        """Prefill; the position behind the prompt."""
        text = question.prompt.encode().replace(b"<image>", mtmd.mtmd_default_marker())
        given = mtmd.mtmd_input_text()
        given.text, given.text_len, given.add_special, given.parse_special = text, len(text), False, True
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(self._bitmaps[question.image])
        require(mtmd.mtmd_tokenize(self._tower, chunks, ctypes.byref(given), bitmaps, 1), "mtmd_tokenize")
        seen = mtmd.mtmd_helper_get_n_tokens(chunks)
        if seen != len(question.ids):
            raise ValueError(f"want a prompt of {len(question.ids)} tokens, libmtmd saw {seen}")
        position, first = llama_cpp.llama_pos(0), llama_cpp.llama_seq_id(0)
        count = mtmd.mtmd_input_chunks_size(chunks)
        for index in range(count):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            code = mtmd.mtmd_helper_eval_chunk_single(
                self._tower, self._context.pointer, chunk, position, first, BATCH, index == count - 1,
                ctypes.byref(position),
            )  # fmt: skip
            require(code, "mtmd_helper_eval_chunk_single")
        mtmd.mtmd_input_chunks_free(chunks)
        return int(position.value)


def _bitmap(file: Path) -> object:
    picture = Image.open(file).convert("RGB")
    pixels = picture.tobytes()
    return mtmd.mtmd_bitmap_init(picture.width, picture.height, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels))


def load() -> Answer:
    context = Context(TASK.model, SLOTS, TASK.threads)
    tower = Tower(TASK.options["tower"], context) if TASK.mode == "vlm" else None

    def answer(question: Question, tokens: int, on_tokens: Callable[[int], None]) -> list[int]:
        context.clear()
        if tower is None:
            context.read(question.ids)
            position = len(question.ids)
        else:
            position = tower.read(question)
        return context.decode(position, tokens, on_tokens)

    return answer


measure(TASK, load, ("llama-cpp-python",))
