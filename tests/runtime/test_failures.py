"""What a request that failed leaves behind: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime import Llava

PROMPT = "USER: what is this? ASSISTANT:"


@pytest.fixture(scope="module")
def llava(demo_bundle: Path) -> Llava:
    return Llava.load(demo_bundle, backend="onnxruntime", threads=1, max_len=128)


def test_a_failed_step_makes_the_cache_be_forgotten(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    want = llava.generate([PROMPT], max_new_tokens=6)[0]
    assert llava.generate([PROMPT], max_new_tokens=6)[0].timings.reused_tokens > 0
    step = llava.decoder.step

    def failing(*arguments: Any) -> np.ndarray:
        if arguments[0].shape[1] == 1:
            raise BackendError("no memory")
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(llava.decoder, "step", failing)
        with pytest.raises(BackendError, match="no memory"):
            llava.generate([PROMPT, "another"], max_new_tokens=6)
    answer = llava.generate([PROMPT], max_new_tokens=6)[0]
    assert answer.timings.reused_tokens == 0
    assert answer.token_ids == want.token_ids


def test_a_failure_while_an_answer_is_read_leaves_nothing_either(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    llava.generate([PROMPT], max_new_tokens=6)

    def failing(*_: Any) -> np.ndarray:
        raise BackendError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(llava.decoder, "step", failing)
        with pytest.raises(BackendError, match="no memory"):
            list(llava.logits_along([PROMPT], None, [[7, 8]]))
    assert llava.generate([PROMPT], max_new_tokens=6)[0].timings.reused_tokens == 0


def test_values_that_overflowed_are_gone_with_their_request(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    want = llava.generate([PROMPT], max_new_tokens=6)[0].token_ids
    embed = llava.encoder.embed
    with monkeypatch.context() as patch:
        patch.setattr(llava.encoder, "embed", lambda ids: embed(ids) * np.float32(np.nan))
        with pytest.raises(BackendError, match="want finite values, found nan"):
            llava.generate(["a long question, " * 9])
    assert llava.generate([PROMPT], max_new_tokens=6)[0].token_ids == want
