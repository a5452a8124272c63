"""Beginning, waiting and ending: a full queue, clients that go, signals, sockets left behind, systemd's notices."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.errors import InputError, LlavaDeployError
from llava_deploy.runtime.serve.sockets import ClientGoneError, Lines, claimed, listen

Start = Callable[..., Any]


def test_whoever_comes_too_late_is_told(slow: Start) -> None:
    served = slow("--waiting", 1, "--clients", 4, "--max-new-tokens", 100_000)
    first, second, third, fourth = (served.client() for _ in range(4))
    first.send({"prompt": "count", "max_new_tokens": 100_000})
    assert first.line() == {"text": "0 "}
    second.send({"prompt": "count", "max_new_tokens": 2})
    deadline = time.monotonic() + 20
    while fourth.ask({"health": True})[0]["waiting"] != 1:
        assert time.monotonic() < deadline
    (busy,) = third.ask({"prompt": "count"})
    assert busy["code"] == "busy"
    fifth = served.client()
    assert (fifth.line()["code"], fifth.line()) == ("busy", None)
    first.close()
    assert second.line() == {"text": "0 "}
    assert [second.line().get("text"), second.line().get("finish_reason")] == ["1 ", "length"]
    assert len(third.ask({"prompt": "count", "max_new_tokens": 3})) == 4


NO_THREADS = """
import os, threading
begin = threading.Thread.start
def start(self):
    if self.name != "answers" and os.path.exists(os.environ["NO_THREADS"]):
        raise RuntimeError("can't start new thread")
    begin(self)
threading.Thread.start = start
"""
"""No thread for a client where there is a file of that name."""


def test_without_a_thread_for_a_client_it_is_told(start: Start, folder: Path) -> None:
    scarce = folder / "scarce"
    served = start("--clients", 4, script=NO_THREADS, NO_THREADS=str(scarce))
    assert served.health()["healthy"]
    scarce.touch()
    for _ in range(8):  # more than there are seats, which none of them keeps
        client = served.client()
        told = client.line()
        assert (told["code"], "no thread left" in told["error"], client.line()) == ("busy", True, None)
        client.close()
    scarce.unlink()
    assert served.health()["healthy"]
    code, said = served.end()
    assert (code, said.count("a client could not be taken: can't start new thread")) == (0, 8)


def test_files_are_read_when_it_is_their_turn(slow: Start, folder: Path) -> None:
    served = slow("--pictures", folder, "--max-new-tokens", 100_000)
    first, second = served.client(), served.client()
    first.send({"prompt": "count", "max_new_tokens": 100_000})
    served.until(lambda state: state["answering"] == 1)
    second.send({"prompt": "count", "max_new_tokens": 1, "images": ["late.png"]})
    served.until(lambda state: state["waiting"] == 1)
    (folder / "late.png").write_bytes(b"a picture that was not there when the question came")
    first.close()
    assert [second.line().get("text"), second.line().get("done")] == ["0 ", True]
    (folder / "late.png").unlink()
    assert "this path leads to none" in second.ask({"prompt": "count", "images": ["late.png"]})[-1]["error"]


def test_an_answer_ends_with_its_client(slow: Start) -> None:
    served = slow("--max-new-tokens", 100_000)
    for ask in ({"stream": True}, {"stream": False}):
        client, waits = served.client(), served.client()
        client.send({"prompt": "count", "max_new_tokens": 100_000, **ask})
        served.until(lambda state: state["answering"] == 1)
        waits.send({"prompt": "count", "max_new_tokens": 100_000})
        served.until(lambda state: state["waiting"] == 1)
        waits.close()
        served.until(lambda state: state["waiting"] == 0)
        client.close()
        served.until(lambda state: state["answering"] == 0)
    one_way = served.client()  # as `printf … | nc -U -N` does it: written, and still there to read
    one_way.send({"prompt": "count", "max_new_tokens": 40, "stream": False})
    one_way.socket.shutdown(socket.SHUT_WR)
    assert one_way.line()["text"].split() == [str(number) for number in range(40)]
    assert served.health()["failed"] == 0


def test_a_client_that_never_ends_its_line_is_dropped(slow: Start) -> None:
    served = slow("--patience", 1)
    idle = served.client()
    idle.send(b'{"half a')
    assert idle.line() is None
    assert served.health()["healthy"]


def test_a_client_that_does_not_read_is_dropped() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ClientGoneError):
        Lines(ours, 100, 0.2).send(b"x" * (8 << 20))


def test_sigterm_lets_a_short_answer_end(slow: Start) -> None:
    served = slow()
    client, other = served.client(), served.client()
    client.send({"prompt": "count", "max_new_tokens": 100})
    client.line()
    other.send({"prompt": "count"})
    served.until(lambda state: state["waiting"] == 1)
    served.process.send_signal(signal.SIGTERM)
    lines = [client.line() for _ in range(100)]
    assert lines[-1]["finish_reason"] == "length"
    assert other.line()["code"] == "stopping"
    assert served.process.wait(10) == 0
    assert not list(served.socket.parent.iterdir())


def test_a_long_answer_is_broken_off(slow: Start) -> None:
    served = slow("--max-new-tokens", 100_000)
    client = served.client()
    client.send({"prompt": "count", "max_new_tokens": 100_000, "stream": False})
    served.until(lambda state: state["answering"] == 1)
    began = time.monotonic()
    code, _ = served.end()
    assert (code, client.line()["code"]) == (0, "stopping")
    assert time.monotonic() - began < 10
    assert not list(served.socket.parent.iterdir())


def test_a_step_that_never_ends_is_seen_and_left_behind(slow: Start) -> None:
    served = slow("--step", 1)
    client = served.client()
    client.send({"prompt": "get stuck"})
    assert served.until(lambda state: not state["healthy"])["answering"] == 1
    code, _ = served.end()
    assert code == 0
    assert not list(served.socket.parent.iterdir())


def test_one_failure_is_an_error_and_three_in_a_row_are_the_end(slow: Start) -> None:
    served = slow()
    client = served.client()
    assert client.ask({"prompt": "broken"})[0] == {"error": "ZeroDivisionError: a bug", "code": "failed"}
    assert len(client.ask({"prompt": "count", "max_new_tokens": 2})) == 3
    for _ in range(3):
        assert client.ask({"prompt": "broken GPU"})[0] == {"error": "no GPU", "code": "failed"}
    _, said = served.process.communicate(timeout=20)
    assert served.process.returncode == 1
    assert "error: 3 answers in a row failed" in said.splitlines()[-1]
    assert not list(served.socket.parent.iterdir())


def test_a_killed_service_is_replaced_and_a_living_one_is_not(slow: Start) -> None:
    first = slow()
    second = slow(ready=False)
    _, said = second.process.communicate(timeout=60)
    assert second.process.returncode == 1
    assert "another process serves here" in said
    assert first.health()["healthy"]
    first.end(signal.SIGKILL)
    assert first.socket.is_socket()
    third = slow()
    assert third.health()["healthy"]
    assert third.end(signal.SIGINT)[0] == 0


def test_systemd_is_told(slow: Start, folder: Path) -> None:
    for address, given in ((str(folder / "notify"), str(folder / "notify")), (f"\0{folder}/n", f"@{folder}/n")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(20)
            manager.bind(address)
            served = slow(NOTIFY_SOCKET=given)
            first = manager.recv(1000).decode()
            assert first.startswith("READY=1\nSTATUS=ONNX Runtime")
            assert manager.recv(1000) == b"WATCHDOG=1"
            served.process.send_signal(signal.SIGTERM)
            while (state := manager.recv(1000)) == b"WATCHDOG=1":
                pass
            assert state == b"STOPPING=1"
            assert served.process.wait(10) == 0


def test_paths_that_no_socket_can_have(folder: Path) -> None:
    file = folder / "file"
    file.write_text("mine")
    cases = (
        (file, "something else is there"),
        (folder / "no" / "s", "no such directory"),
        (folder / ("s" * 108), "107"),
        (Path("/proc/s"), "/proc/s.lock: cannot be made"),
    )
    for path, message in cases:
        with pytest.raises(InputError, match=message), claimed(path):
            pytest.fail("claimed")
    assert file.read_text() == "mine"
    with listen(folder / "other", 0o600), pytest.raises(LlavaDeployError, match="serves"), claimed(folder / "other"):
        pytest.fail("claimed")
    with claimed(folder / "s"), pytest.raises(LlavaDeployError, match="another process"), claimed(folder / "s"):
        pytest.fail("claimed")
    assert sorted(path.name for path in folder.iterdir()) == ["file", "other"]
