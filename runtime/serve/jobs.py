"""Questions that wait for their turn, and the thread that answers one after the other."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from llava_deploy.engines.errors import InputError, LlavaDeployError
from llava_deploy.runtime.answers import Answer
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.prompt import render_chat
from llava_deploy.runtime.serve.requests import PictureFile, Question
from llava_deploy.runtime.terminal_run import gathered

Message = dict[str, Any]
FAILURES_IN_A_ROW = 3
"""Answers that the backend may fail one after the other; a GPU that has lost its context fails them all."""
_LONGEST = 2000
"""Characters of an error; it may quote what was asked."""


def failure(text: str, code: str) -> Message:
    """What a client is sent instead of an answer."""
    line = " ".join(text.split())
    return {"error": line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…", "code": code}


class Job:
    """A question on its way; what it gets stands in ``messages``, ``None`` behind the last."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()


class WaitingRoom:
    """First come, first served, with few seats: who finds none is told so at once.

    Args:
        seats: questions that may wait beside the one that is being answered.
    """

    def __init__(self, seats: int) -> None:
        self._seats = seats
        self._waiting: deque[Job] = deque()
        self._answering = 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, job: Job) -> Message | None:
        """Take a seat; or why there is none."""
        with self._changed:
            if self._closed:
                return failure("the service is stopping; ask again when it is back", "stopping")
            if len(self._waiting) + self._answering > self._seats:
                waiting = f"{len(self._waiting)} wait"
                return failure(f"busy: one question is being answered and {waiting}; ask again later", "busy")
            self._waiting.append(job)
            self._changed.notify()
            return None

    def leave(self, job: Job) -> None:
        """Give up, wherever the job is by now."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def next(self) -> Job | None:
        """The next in line, as soon as there is one; ``None`` when the room is closed. The one before is done."""
        with self._changed:
            self._answering = 0
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            self._answering = 1
            return self._waiting.popleft()

    def close(self) -> None:
        """Let nobody in, and send away who waits."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.messages.put(failure("the service is stopping; ask again when it is back", "stopping"))
                job.messages.put(None)
            self._waiting.clear()
            self._changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """How many are being answered (one or none), and how many wait."""
        with self._changed:
            return self._answering, len(self._waiting)


class _StoppedError(Exception):
    """Nobody wants the rest of an answer."""


class Answerer:
    """The one thread that calls the model, which is not for several.

    Args:
        llava: the model.
        room: where the questions wait.
        log: takes a line about each answer, which says nothing of its content.
        give_up: called once, when the backend has failed :data:`FAILURES_IN_A_ROW` answers.
    """

    def __init__(
        self, llava: Llava, room: WaitingRoom, log: Callable[[str], None], give_up: Callable[[], None]
    ) -> None:
        self._llava = llava
        self._room = room
        self._log = log
        self._give_up = give_up
        self._abort = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._stepped = time.monotonic()
        self._failures = 0
        self.answered = 0
        self.failed = 0
        self.gave_up = False

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def silent_for(self) -> float:
        """Seconds since an answer that is under way last moved; 0 where there is none."""
        answering, _ = self._room.counts()
        return time.monotonic() - self._stepped if answering else 0.0

    def stop(self, grace: float, more: float) -> bool:
        """Let the answer that is under way end, from ``grace`` seconds on break it off; whether it has ended then.

        Breaking off waits for the step that is computed, ``more`` seconds at most.
        """
        self._thread.join(grace)
        self._abort.set()
        self._thread.join(more)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._room.next()) is not None:
            self._stepped = time.monotonic()
            message = self._outcome(job)
            if message is not None:
                job.messages.put(message)
            job.messages.put(None)
            if self._failures == FAILURES_IN_A_ROW:
                self.gave_up = True
                self._give_up()

    def _outcome(self, job: Job) -> Message | None:
        """Answer; the last message to send, ``None`` where nobody is there to get one."""
        try:
            answer = self._answer(job)
        except _StoppedError:
            self._log("an answer was broken off")
            return failure("the service is stopping; ask again when it is back", "stopping")
        except InputError as error:
            return failure(str(error), "bad-request")
        except LlavaDeployError as error:
            return self._failed(str(error))
        except Exception as error:  # noqa: BLE001 (a service outlives each single request)
            traceback.print_exc()
            return self._failed(f"{type(error).__name__}: {error}")
        self._failures = 0
        self.answered += 1
        timings = answer.timings
        rate = timings.decode_tokens_per_second
        self._log(f"{timings.new_tokens} tokens, the first after {1000 * timings.ttft:.0f} ms, then {rate:.0f}/s")
        whole = {} if job.question.stream else {"text": answer.text, "token_ids": list(answer.token_ids)}
        figures = {**dataclasses.asdict(timings), "decode_tokens_per_second": rate}
        return {"done": True, **whole, "finish_reason": answer.finish_reason, "timings": figures}

    def _failed(self, reason: str) -> Message:
        self._failures += 1
        self.failed += 1
        self._log(f"an answer failed: {reason}")
        return failure(reason, "failed")

    def _answer(self, job: Job) -> Answer:
        question = job.question

        def write(text: str) -> None:
            self._stepped = time.monotonic()
            if job.cancelled.is_set() or self._abort.is_set():
                raise _StoppedError
            if question.stream:
                job.messages.put({"text": text})

        if job.cancelled.is_set() or self._abort.is_set():
            raise _StoppedError
        asked = question.messages
        prompt = question.raw if asked is None else render_chat(asked, self._llava.manifest.chat)
        images = [source.read() if isinstance(source, PictureFile) else source for source in question.images]
        pieces = self._llava.stream(
            prompt,
            images,
            max_new_tokens=question.max_new_tokens,
            sampling=question.sampling,
            stop=question.stop,
        )
        return gathered(pieces, write)
