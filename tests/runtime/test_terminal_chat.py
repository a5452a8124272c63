"""The conversation loop, with a script in place of a keyboard and a model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_deploy.engines.errors import PictureError, PromptError
from llava_deploy.runtime.answers import Piece, Timings
from llava_deploy.runtime.sampling import GREEDY
from llava_deploy.runtime.terminal_chat import Conversation, Terminal, converse
from llava_deploy.runtime.terminal_run import AnswerOptions, closing_notes

TIMINGS = Timings(0.0, 0.0, 0.0, 0.0, 0.1, 0.02, 40, 30, 3)


class Parrot:
    """Says the last text again, a word at a time, after a space."""

    def __init__(self) -> None:
        self.conversations: list[Sequence[Any]] = []
        self.closed = 0

    def chat(self, messages: Sequence[Any], **_: Any) -> Generator[Piece, None, None]:
        self.conversations.append(messages)
        text = messages[-1]["content"][-1]["text"]
        if text == "too long":
            raise PromptError("the context is full")
        return self._words(text.split())

    def _words(self, words: list[str]) -> Generator[Piece, None, None]:
        try:
            for word in words[:-1]:
                yield Piece((1,), f" {word}", None, None)
            yield Piece((1,), f" {words[-1]}", "stop", TIMINGS)
        finally:
            self.closed += 1


class Script:
    """A terminal that types lines; an exception among them is raised in their place."""

    def __init__(self, *lines: str | BaseException, interrupt_at: str | None = None) -> None:
        self.lines = list(lines)
        self.interrupt_at = interrupt_at
        self.written = ""
        self.notes: list[str] = []
        self.pictures: list[Image.Image] = []
        self.ends: list[Piece | None] = []

    def terminal(self, *, lasting: bool = True) -> Terminal:
        return Terminal(self.read, self.write, self.notes.append, self.pictures.append, self.ends.append, lasting)

    def read(self) -> str | None:
        line = self.lines.pop(0) if self.lines else None
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str) -> None:
        self.written += text
        if text.strip() == self.interrupt_at:
            raise KeyboardInterrupt


@pytest.fixture
def parrot() -> Any:
    return Parrot()


@pytest.fixture
def conversation(parrot: Any) -> Conversation:
    return Conversation(parrot, AnswerOptions(8, GREEDY, ()))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.new("RGB", (4, 2)).save(path)
    return path


def kinds(message: Any) -> list[str]:
    return [part["type"] for part in message["content"]]


def test_questions_and_answers_become_messages(parrot: Any, conversation: Conversation, picture: Path) -> None:
    script = Script(f"/image {picture}", "hello there", "", "  and again ", "/quit", "never")
    converse(conversation, script.terminal())
    assert script.written == "hello thereand again"
    assert [end.finish_reason for end in script.ends if end is not None] == ["stop", "stop"]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert kinds(conversation.messages[0]) == ["image", "text"]
    assert kinds(conversation.messages[2]) == ["text"]
    assert conversation.messages[1]["content"] == "hello there"
    assert script.lines == ["never"]
    assert len(parrot.conversations[1]) == 3


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(parrot: Any, conversation: Conversation) -> None:
    script = Script("one two three", "go on", interrupt_at="two")
    converse(conversation, script.terminal())
    assert script.written == "one twogo on"
    assert script.ends[0] is None
    assert conversation.messages[1]["content"] == "one two"
    assert parrot.closed == 2


def test_ctrl_c_at_the_prompt_drops_the_line(conversation: Conversation) -> None:
    script = Script(KeyboardInterrupt(), "hello")
    converse(conversation, script.terminal())
    assert "Ctrl-D" in script.notes[0]
    assert script.written == "hello"


def test_errors_become_notes_where_someone_can_try_again(conversation: Conversation, picture: Path) -> None:
    script = Script("/image nowhere.png", f"/image {picture}", "too long", "/nonsense", "/image", "hello")
    converse(conversation, script.terminal())
    errors = [note for note in script.notes if note.startswith("error: ")]
    assert ["nowhere.png" in errors[0], "context" in errors[1], "/nonsense" in errors[2]] == [True] * 3
    assert "want the path" in errors[3]
    # The question that failed is forgotten, its picture is not.
    assert [kinds(message) for message in conversation.messages[:1]] == [["image", "text"]]


@pytest.mark.parametrize(("line", "error"), [("/image nowhere.png", PictureError), ("too long", PromptError)])
def test_errors_end_a_script(line: str, error: type[Exception], conversation: Conversation) -> None:
    with pytest.raises(error):
        converse(conversation, Script(line, "hello").terminal(lasting=False))


def test_pictures_given_at_the_start_go_with_the_first_question(conversation: Conversation, picture: Path) -> None:
    script = Script("hello", "again")
    converse(conversation, script.terminal(), [picture, picture])
    assert [shown.size for shown in script.pictures] == [(4, 2)] * 2
    assert [kinds(message) for message in conversation.messages[::2]] == [["image", "image", "text"], ["text"]]


def test_reset_forgets_messages_and_pictures(conversation: Conversation, picture: Path) -> None:
    converse(conversation, Script("hello", f"/image {picture}", "/reset").terminal())
    assert (conversation.messages, conversation.waiting) == ([], [])


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "escaped", "'{0}' '{0}'"])
def test_paths_as_people_type_them(form: str, conversation: Conversation, picture: Path) -> None:
    typed = str(picture).replace(" ", "\\ ") if form == "escaped" else form.format(picture)
    converse(conversation, Script(f"/image {typed}").terminal(lasting=False))
    assert len(conversation.waiting) == (2 if form.count("{") == 2 else 1)


def test_help_lists_the_commands(conversation: Conversation) -> None:
    script = Script("/help")
    converse(conversation, script.terminal())
    assert all(command in script.notes[0] for command in ("/image", "/reset", "/quit"))


def test_a_path_is_a_question_where_it_is_no_command(conversation: Conversation) -> None:
    script = Script("/usr/bin is what?")
    converse(conversation, script.terminal())
    assert script.written == "/usr/bin is what?"


def test_closing_notes() -> None:
    (speed,) = closing_notes("stop", TIMINGS, 100)
    assert speed == "3 tokens, the first after 20 ms, then 20 tokens/s; prompt of 40 tokens, 30 of them known"
    assert closing_notes("length", TIMINGS, 100)[0] == "cut off after 3 tokens: --max-new-tokens allows more"
    assert closing_notes("context", TIMINGS, 100)[0] == "cut off: the context of 100 tokens is full"
