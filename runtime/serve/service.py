"""Clients in, answers out: a thread for each connection, one that answers, and one that accepts and keeps watch."""

from __future__ import annotations

import contextlib
import json
import queue
import select
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_deploy.engines.errors import BackendError, InputError
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.serve.jobs import FAILURES_IN_A_ROW, Answerer, Job, Message, WaitingRoom, failure
from llava_deploy.runtime.serve.requests import Allowed, is_health, parse_line, parse_question
from llava_deploy.runtime.serve.sockets import ClientGoneError, LineError, Lines

if TYPE_CHECKING:
    import socket

_TICK = 0.5
"""Seconds between two looks at what only time changes."""
_GRACE = (3.0, 2.0)
"""Seconds that an answer has to end by itself when the service stops, and then to be broken off."""


@dataclass(frozen=True)
class ServeOptions:
    """What a service takes on.

    Attributes:
        allowed: in one request.
        waiting: questions that wait beside the one that is answered.
        clients: connections at once.
        longest_line: bytes of a request.
        patience: seconds that a client has for a line, and to take what it is sent.
        step: seconds in which an answer must move; beyond, the service says that it is not well.
    """

    allowed: Allowed
    waiting: int
    clients: int
    longest_line: int
    patience: float
    step: float


class Service:
    """A model that answers over a socket, until :meth:`stop`.

    Args:
        llava: the model; nobody else may use it.
        options: what it takes on.
        log: takes lines for people, from any thread.
    """

    def __init__(self, llava: Llava, options: ServeOptions, log: Callable[[str], None]) -> None:
        self._llava = llava
        self._options = options
        self._log = log
        self._room = WaitingRoom(options.waiting)
        self._answerer = Answerer(llava, self._room, log, self.stop)
        self._clients = threading.BoundedSemaphore(options.clients)
        self._stopping = threading.Event()
        self._quiet = threading.Condition()
        self._talking = 0
        """Requests whose last line is not sent yet."""
        self._began = time.monotonic()

    def stop(self) -> None:
        """Have :meth:`run` return soon; for signal handlers and other threads."""
        self._stopping.set()

    def run(self, listener: socket.socket, tell: Callable[[str], None]) -> bool:
        """Serve until stopped.

        Args:
            listener: see :func:`~llava_deploy.runtime.serve.sockets.listen`; closed here.
            tell: takes systemd's notices.

        Returns:
            Whether the last answer has ended; where not, the model is still computing in its thread.

        Raises:
            BackendError: stopped since the backend failed too often.
        """
        self._answerer.start()
        tell(f"READY=1\nSTATUS={self._llava.backend}")
        with listener:
            while not self._stopping.is_set():
                if self._is_well():
                    tell("WATCHDOG=1")
                if select.select([listener], [], [], _TICK)[0]:
                    self._accept(listener)
        tell("STOPPING=1")
        self._room.close()
        ended = self._answerer.stop(*_GRACE)
        with self._quiet:  # what was said last still has to reach the clients
            self._quiet.wait_for(lambda: not self._talking, _TICK)
        if self._answerer.gave_up:
            raise BackendError(f"{FAILURES_IN_A_ROW} answers in a row failed; start the service again, and see doctor")
        return ended

    def _is_well(self) -> bool:
        return self._answerer.silent_for() < self._options.step

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # gone already, or no file handles left
            self._log(f"a client could not be taken: {error.strerror}")
            self._stopping.wait(_TICK)
            return
        if not self._clients.acquire(blocking=False):
            _turn_away(connection, f"busy: {self._options.clients} clients are connected; come again later")
            return
        try:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        except RuntimeError as error:  # the system has no thread left
            self._clients.release()
            self._log(f"a client could not be taken: {error}")
            _turn_away(connection, "busy: the system has no thread left for one more client; come again later")

    def _serve(self, connection: socket.socket) -> None:
        lines = Lines(connection, self._options.longest_line, self._options.patience)
        try:
            with connection, contextlib.suppress(ClientGoneError):
                while not self._stopping.is_set():
                    try:
                        line = lines.receive()
                        if line is None:
                            return
                        if line.strip():
                            with self._talk():
                                self._take(line, lines)
                    except (LineError, InputError) as error:
                        lines.send(_encoded(failure(str(error), "bad-request")))
                    except ClientGoneError:
                        return
                    except Exception as error:  # noqa: BLE001 (a client is told, and others are not disturbed)
                        traceback.print_exc()
                        lines.send(_encoded(failure(f"{type(error).__name__}: {error}", "failed")))
        finally:
            self._clients.release()

    @contextlib.contextmanager
    def _talk(self) -> Iterator[None]:
        with self._quiet:
            self._talking += 1
        try:
            yield
        finally:
            with self._quiet:
                self._talking -= 1
                self._quiet.notify()

    def _take(self, line: bytes, lines: Lines) -> None:
        value = parse_line(line)
        if is_health(value):
            lines.send(_encoded(self._health()))
            return
        job = Job(parse_question(value, self._options.allowed))
        refused = self._room.enter(job)
        if refused is not None:
            lines.send(_encoded(refused))
            return
        try:
            _forward(job.messages, lines)
        except ClientGoneError:
            self._room.leave(job)
            raise

    def _health(self) -> dict[str, Any]:
        answering, waiting = self._room.counts()
        return {
            "healthy": self._is_well(),
            "model": self._llava.manifest.model.name,
            "precision": self._llava.manifest.model.precision,
            "backend": self._llava.backend,
            "max_len": self._llava.max_len,
            "max_new_tokens": self._options.allowed.new_tokens,
            "answering": answering,
            "waiting": waiting,
            "answered": self._answerer.answered,
            "failed": self._answerer.failed,
            "seconds": round(time.monotonic() - self._began, 3),
        }


def _turn_away(connection: socket.socket, reason: str) -> None:
    with connection, contextlib.suppress(ClientGoneError):
        Lines(connection, 0, _TICK).send(_encoded(failure(reason, "busy")))


def _forward(messages: queue.SimpleQueue[Message | None], lines: Lines) -> None:
    """Send what a question gets until there is no more, and look now and then whether anybody listens."""
    while True:
        try:
            message = messages.get(timeout=_TICK)
        except queue.Empty:
            lines.require_client()
            continue
        if message is None:
            return
        lines.send(_encoded(message))


def _encoded(message: Message) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"
