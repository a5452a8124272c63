"""A conversation in a terminal: questions and commands in, streamed answers out."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_deploy.engines.errors import LlavaDeployError, PictureError, PromptError
from llava_deploy.runtime.answers import Piece
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.pictures import PictureSource, TakenPicture, take_picture
from llava_deploy.runtime.terminal_run import AnswerOptions, closing_notes, write_text

HELP = """\
/image PATH   add a picture to the next question; several paths add several
/reset        forget the conversation and its pictures
/help         show this
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Conversation:
    """The messages so far, and the pictures that wait for the next question."""

    def __init__(self, llava: Llava, options: AnswerOptions) -> None:
        self._llava = llava
        self._options = options
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[TakenPicture] = []

    def show(self, source: PictureSource) -> Image.Image:
        """Load a picture; it goes with the next question.

        Raises:
            PictureError: it cannot be used.
        """
        taken = take_picture(source)
        self.waiting.append(taken)
        return taken.image

    def reset(self) -> None:
        """Forget everything."""
        self.messages.clear()
        self.waiting.clear()

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """Answer a question as it comes.

        Closed early, what was said until then is the answer; a question that gets none is forgotten.

        Raises:
            PromptError: the conversation is longer than the context, or placeholders and pictures differ.
        """
        parts = [{"type": "image", "image": picture} for picture in self.waiting]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        said: list[str] = []
        pieces = self._llava.chat(
            [*self.messages, message],
            max_new_tokens=self._options.max_new_tokens,
            sampling=self._options.sampling,
            stop=self._options.stop,
        )
        try:
            for piece in pieces:
                said.append(piece.text)
                yield piece
        finally:
            answer = "".join(said).strip()
            if answer:
                self.messages += [message, {"role": "assistant", "content": answer}]
                self.waiting = []


@dataclass(frozen=True)
class Terminal:
    """Where a conversation takes place.

    Attributes:
        read: the next line without its end, ``None`` when there are no more; ``KeyboardInterrupt`` drops the line.
        write: a part of an answer.
        note: a line that is no part of an answer.
        picture: shows a picture that was taken in.
        finish: ends an answer; gets its last piece, or ``None`` where it was stopped.
        lasting: whether someone sits there to try again after an error.
    """

    read: Callable[[], str | None]
    write: Callable[[str], None]
    note: Callable[[str], None]
    picture: Callable[[Image.Image], None]
    finish: Callable[[Piece | None], None]
    lasting: bool


def converse(conversation: Conversation, terminal: Terminal, pictures: Sequence[PictureSource] = ()) -> None:
    """Take lines until there are no more, or until ``/quit``; ``pictures`` go with the first question.

    Raises:
        LlavaDeployError: where ``terminal.lasting`` is false; else errors in pictures and prompts become notes.
    """
    for picture in pictures:
        terminal.picture(conversation.show(picture))
    while True:
        try:
            line = terminal.read()
        except KeyboardInterrupt:
            terminal.note("Ctrl-D or /quit leaves")
            continue
        if line is None or line.strip() in ("/quit", "/exit"):
            return
        try:
            _take(line.strip(), conversation, terminal)
        except (PictureError, PromptError) as error:
            if not terminal.lasting:
                raise
            terminal.note(f"error: {error}")


def _take(line: str, conversation: Conversation, terminal: Terminal) -> None:
    command, _, rest = line.partition(" ")
    if not line:
        return
    if command == "/image":
        for path in _paths(rest.strip()):
            picture = conversation.show(path)
            terminal.picture(picture)
            terminal.note(f"{path}: {picture.width} x {picture.height} pixels, goes with the next question")
    elif command == "/reset":
        conversation.reset()
        terminal.note("the conversation starts over, without pictures")
    elif command == "/help":
        terminal.note(HELP)
    elif command.startswith("/") and command[1:].isalpha():
        raise PromptError(f"{command} is not a command; /help lists them")
    else:
        _answer(line, conversation, terminal)


def _answer(text: str, conversation: Conversation, terminal: Terminal) -> None:
    last = None
    pieces = conversation.ask(text)
    try:
        for piece in pieces:
            # Some models begin with a space; the answer's first character stands at the margin.
            terminal.write(piece.text if last is not None else piece.text.lstrip())
            last = piece
    except KeyboardInterrupt:
        last = None
    except LlavaDeployError:
        pieces.close()
        raise
    pieces.close()
    terminal.finish(last)


def _paths(text: str) -> list[Path]:
    """One path as it stands, spaces and all; else several, quoted or escaped as a shell takes them."""
    whole = Path(text).expanduser()
    if not text or whole.exists():
        words = [text] if text else []
    else:
        try:
            words = shlex.split(text)
        except ValueError:
            words = [text]
    if not words:
        raise PictureError("/image: want the path of a picture, got none; for example: /image photo.jpg")
    return [Path(word).expanduser() for word in words]


def standard_terminal(max_len: int, say: Callable[[str], None]) -> Terminal:
    """Standard input and output; at a keyboard with a prompt, line editing and history.

    Args:
        max_len: tokens of context, for what is said of an answer.
        say: takes lines for people.
    """
    lasting = sys.stdin.isatty()
    if lasting:
        with contextlib.suppress(ImportError):  # a Python built without it: no line editing, then
            import readline  # noqa: F401 (input() uses it once it is imported)
        say("Ask about the pictures. /image PATH shows one, /help lists the rest, Ctrl-D leaves.")

    def read() -> str | None:
        try:
            if lasting:
                return input("> ")
            line = sys.stdin.readline()
        except EOFError:
            write_text("\n")
            return None
        except KeyboardInterrupt:
            write_text("\n")
            raise
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input: want UTF-8 text, found bytes that are not ({error})") from error
        return line.rstrip("\n") if line else None

    def picture(taken: Image.Image) -> None:
        if lasting and sys.stdout.isatty():
            from llava_deploy.runtime.terminal import print_thumbnail

            print_thumbnail(taken)

    def finish(last: Piece | None) -> None:
        write_text("\n")
        if last is not None and last.finish_reason is not None and last.timings is not None:
            for note in closing_notes(last.finish_reason, last.timings, max_len):
                say(note)

    return Terminal(read, write_text, say, picture, finish, lasting)
