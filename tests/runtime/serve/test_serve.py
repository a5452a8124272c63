"""Answers over a socket are those of the model, and nothing that a client sends ends the service."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import stat
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.runtime import Llava

Start = Callable[..., Any]
QUESTION = "What colours are there?"


def drawn(count: int) -> list[tuple[str, str]]:
    """Pictures as data URIs and a question about each."""
    found = []
    for example in islice(examples(Split.HELD_OUT, 5), count):
        file = io.BytesIO()
        example.picture.save(file, "PNG")
        found.append((f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", example.question))
    return found


def messages(picture: object, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def said(lines: list[dict[str, Any]]) -> str:
    return "".join(line.get("text", "") for line in lines)


def test_answers_are_the_models(start: Start, demo_bundle: Path) -> None:
    llava = Llava.load(demo_bundle, threads=1)
    served = start()
    client = served.client()
    for picture, question in drawn(4):
        want = "".join(piece.text for piece in llava.chat(messages(picture, question), max_new_tokens=24)).strip()
        assert want
        for request in ({"prompt": question, "images": [picture]}, {"messages": messages(picture, question)}):
            lines = client.ask({**request, "max_new_tokens": 24})
            assert said(lines) == want
            assert set(lines[-1]) == {"done", "finish_reason", "timings"}
            assert lines[-1]["timings"]["new_tokens"] >= len(lines) - 1 > 1
            (whole,) = client.ask({**request, "max_new_tokens": 24, "stream": False})
            assert (whole["text"], whole["done"]) == (want, True)
            assert len(whole["token_ids"]) == whole["timings"]["new_tokens"]
    text = f"USER: <image>\n{QUESTION} ASSISTANT:"
    picture, _ = drawn(1)[0]
    options = {"max_new_tokens": 12, "temperature": 3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7}
    first, again, other = (
        said(client.ask({"prompt": text, "raw": True, "images": [picture], **options, "seed": seed, "stop": ["zzz"]}))
        for seed in (7, 7, 8)
    )
    assert first == again != other
    state = served.health()
    assert (state["healthy"], state["answered"], state["failed"], state["answering"]) == (True, 19, 0, 0)
    assert state["backend"] == llava.backend
    code, log = served.end()
    assert code == 0
    assert not any(word in log for _, question in drawn(4) for word in (question, "USER"))


def test_clients_take_turns(start: Start, demo_bundle: Path) -> None:
    llava = Llava.load(demo_bundle, threads=1)
    asked = drawn(4)
    want = ["".join(piece.text for piece in llava.chat(messages(*pair))).strip() for pair in asked]
    served = start("--clients", 8)
    got: dict[int, list[str]] = {}

    def keep_asking(index: int) -> None:
        client = served.client()
        picture, question = asked[index]
        got[index] = [said(client.ask({"prompt": question, "images": [picture]})) for _ in range(5)]
        client.close()

    threads = [threading.Thread(target=keep_asking, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {index: [want[index]] * 5 for index in range(4)}


BAD = [
    (b"\xff\xfe\x00garbage\n", "want one JSON object a line, in UTF-8"),
    (b"[1, 2]\n", "want one JSON object a line, got list"),
    (b"null\n", "got NoneType"),
    (b"[" * 100_000 + b"\n", "want one JSON object a line"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}\n", "want one JSON object a line"),
    (b'{"prompt": "x", "temperature": NaN}\n', "NaN is no JSON"),
    ({}, "want either prompt or messages"),
    ({"prompt": "x", "messages": []}, "want either prompt or messages"),
    ({"prompt": 1}, "prompt: want text, got int"),
    ({"prompt": "\ud800"}, "not valid Unicode"),
    ({"prompt": "x" * 500_000}, "want at most 262,144 characters of text in one request, got 500,000"),
    ({"prompt": "x", "colour": 1}, "unknown: colour; a request has prompt, messages"),
    ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens: want a whole number from 1 to 40, got 0"),
    ({"prompt": "x", "max_new_tokens": 41}, "max_new_tokens: want a whole number from 1 to 40, got 41"),
    ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens: want a whole number"),
    ({"prompt": "x", "top_p": "1"}, "top_p: want a number"),
    ({"prompt": "x", "temperature": 10**400}, "temperature: want a number"),
    ({"prompt": "x", "top_k": "y" * 100_000}, "yyy…"),
    ({"prompt": "x", "stream": 1}, "stream: want true or false"),
    ({"prompt": "x", "stop": "###"}, "stop: want a list of texts"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop: want at most 16"),
    ({"prompt": "x", "images": "data:"}, "images: want a list"),
    ({"prompt": "x", "images": ["photo.jpg"]}, "this service reads no files"),
    ({"prompt": "x", "images": ["/etc/passwd"]}, "this service reads no files"),
    ({"prompt": "x", "images": ["https://example.org/a.png"]}, "this service reads no files"),
    ({"prompt": "x", "images": [{"path": "a"}]}, "image 0: want a data URI, got dict"),
    ({"prompt": "x", "images": ["data:image/png;base64,AAAA"]}, "not a picture"),
    ({"prompt": "x", "images": ["data:,a"] * 4}, "want at most 3 pictures in one request, got 4"),
    ({"prompt": "<image>", "raw": True}, "1 placeholders"),
    ({"prompt": "x " * 5000}, "tokens, but the context holds"),
    ({"messages": []}, "want the user's message last"),
    ({"messages": "x"}, "messages: want a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0, part 0"),
    ({"messages": [{"role": "user", "content": "x"}], "images": []}, "with messages, a picture is a part"),
    ({"messages": [{"role": "user", "content": "x"}], "raw": True}, "only a prompt can be taken as it is"),
    ({"health": True, "prompt": "x"}, "by itself"),
]


def test_what_is_wrong_is_said_and_the_connection_lives_on(start: Start) -> None:
    served = start("--max-new-tokens", 40, "--max-images", 3, "--max-request", 1)
    client = served.client()
    for sent, message in BAD:
        (answer,) = client.ask(sent)
        assert set(answer) == {"error", "code"}, (sent, answer)
        assert answer["code"] == "bad-request"
        assert message in answer["error"], (sent, answer)
        assert "\n" not in answer["error"]
        assert len(answer["error"]) < 3000
    (answer,) = client.ask(b'{"prompt": "' + b"a" * (3 << 20) + b'"}\n')
    assert "want a line of at most 1,048,576 bytes" in answer["error"]
    client.send(b'\n \r\n{"prompt": "Hel')
    client.send(b'lo", "max_new_tokens": 3}\n{"prompt": "Hello", "max_new_tokens": 3}\n')
    lines = [client.line() for _ in range(2)]
    while sum("done" in line for line in lines) < 2:
        lines.append(client.line())
    client.send(b'{"prompt": "Hello", "max_new_tokens": 3, "stream": false}')  # no line's end: the last of all
    client.socket.shutdown(socket.SHUT_WR)
    assert client.line()["done"] is True
    assert client.line() is None
    assert served.health()["failed"] == 0


def test_a_crowd_is_told_and_not_turned_away_unheard(start: Start) -> None:
    served = start("--clients", 4)
    served.process.send_signal(signal.SIGSTOP)
    clients = []
    for _ in range(100):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(20)
        client.connect(str(served.socket))  # BlockingIOError where the kernel's queue is full
        clients.append(client)
    served.process.send_signal(signal.SIGCONT)
    assert all(b'"busy"' in client.recv(1000) for client in clients[4:])
    for client in clients:
        client.close()


def test_noise(start: Start) -> None:
    served = start("--max-new-tokens", 4)
    noise = random.Random(3)
    valid = json.dumps({"prompt": QUESTION, "images": [drawn(1)[0][0]], "max_new_tokens": 2}).encode()
    client = served.client()
    for turn in range(150):
        line = bytearray(valid)
        for _ in range(noise.randrange(1, 6)):
            line[noise.randrange(len(line))] = noise.choice(b' "{}[]:,\\0e\xff\x00')
        client.send(bytes(line) + b"\n")
        if turn % 5 == 0:
            client.close()  # without reading
            client = served.client()
            continue
        while set(answer := client.line()) == {"text"}:
            pass
        assert "error" in answer or "done" in answer
    assert served.health()["failed"] == 0


def test_files_of_one_directory_alone(start: Start, folder: Path) -> None:
    inside, outside = folder / "pictures", folder / "elsewhere"
    for place in (inside / "more", outside):
        place.mkdir(parents=True)
        next(examples(Split.HELD_OUT, 5)).picture.save(place / "a.png")
    (inside / "link.png").symlink_to("more/a.png")
    (inside / "out.png").symlink_to(outside / "a.png")
    (inside / "away").symlink_to(outside)
    os.mkfifo(inside / "pipe")
    served = start("--pictures", inside)
    client = served.client()
    uri, question = drawn(1)[0]
    want = said(client.ask({"prompt": question, "images": [uri]}))
    for path in ("more/a.png", "link.png", str(inside / "more" / "a.png"), "more/../link.png"):
        assert said(client.ask({"prompt": question, "images": [path]})) == want
    for path in ("pipe", "more"):
        (answer,) = client.ask({"prompt": question, "images": [path]})
        assert "want a picture file below the service's --pictures directory, of at most" in answer["error"], path
    there = ("out.png", "away/a.png", "../elsewhere/a.png", str(outside / "a.png"), str(outside), "/dev/null")
    not_there = ("no", "away/no", "../elsewhere/no", str(outside / "no"), "/no", "a\0b", "out.png/no")
    answers = [client.ask({"prompt": question, "images": [path]}) for path in (*there, *not_there)]
    answers += [client.ask({"messages": messages(path, question)}) for path in (*there, *not_there)]
    assert {json.dumps(answer) for answer in answers} == {json.dumps(answers[0])}  # what lies elsewhere is not told
    assert answers[0][0]["code"] == "bad-request"
    assert "which the service may read; this path leads to none" in answers[0][0]["error"]
    assert served.health()["failed"] == 0


@pytest.mark.parametrize("mode", ["600", "660"])
def test_who_may_connect(start: Start, mode: str) -> None:
    served = start("--mode", mode)
    assert stat.S_IMODE(served.socket.stat().st_mode) == int(mode, 8)
