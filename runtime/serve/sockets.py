"""Everything that touches a socket: the Unix socket that is listened on, lines from it, and systemd's notices.

The only module of the package that opens one. A Unix socket is a file: who may talk to it is a matter of the file's
mode and of its directory's, and no address of the network is listened on or called.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from llava_deploy.engines.errors import InputError, LlavaDeployError

_LONGEST_PATH = 107
"""Bytes: what sockaddr_un has room for, unix(7)."""
_CHUNK = 1 << 16
_WAITING = 128
"""Connections that the kernel keeps until they are taken."""


class ClientGoneError(Exception):
    """The other side has closed, or does not read what it is sent."""


class LineError(Exception):
    """A line that cannot be taken; the message is for the client."""


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Own the name of a socket while the block runs, so that two services never take turns in replacing each other's.

    The lock is a file beside the socket, gone when its owner ends. One that a killed process has left is nobody's.

    Raises:
        InputError: a path that no socket can have, in a directory that is not there or may not be written, or of
            something else.
        LlavaDeployError: another process serves there.
    """
    _require_usable(path)
    name = path.with_name(f"{path.name}.lock")
    busy = LlavaDeployError(f"{path}: another process serves here; stop it, or name another --socket")
    while True:
        try:
            lock = os.open(name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise InputError(f"{name}: cannot be made ({error.strerror}); name another --socket") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise busy from error
        if _is_still(lock, name):
            break
        os.close(lock)  # its owner removed it between the two calls
    try:
        if _answers(path):
            raise busy  # something that takes no lock of ours
        path.unlink(missing_ok=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        name.unlink(missing_ok=True)
        os.close(lock)


def listen(path: Path, mode: int) -> socket.socket:
    """Listen at a path that is :func:`claimed`; nobody can connect before the file has its ``mode``."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(os.fspath(path))
        path.chmod(mode)
        server.listen(_WAITING)
        server.setblocking(False)
    except OSError:
        server.close()
        raise
    return server


class Lines:
    """A client's connection, a line at a time.

    Args:
        connection: of the client.
        longest: bytes of a line; of a longer one the rest is read and thrown away.
        patience: seconds for a whole line to come, and for the client to take what it is sent.
    """

    def __init__(self, connection: socket.socket, longest: int, patience: float) -> None:
        self._connection = connection
        self._longest = longest
        self._patience = patience
        self._read = bytearray()

    def receive(self) -> bytes | None:
        """The next line without its end; ``None`` where there are no more, or none came in time.

        Raises:
            LineError: it is too long.
            ClientGoneError: the connection broke.
        """
        deadline = time.monotonic() + self._patience
        searched, dropped = 0, False
        while (end := self._read.find(b"\n", searched)) < 0:
            if len(self._read) > self._longest:
                dropped = True
            if dropped:
                self._read.clear()
            searched = len(self._read)
            try:
                self._connection.settimeout(max(0.001, deadline - time.monotonic()))
                chunk = self._connection.recv(_CHUNK)
            except TimeoutError:
                return None
            except OSError as error:
                raise ClientGoneError from error
            if not chunk:
                if dropped:
                    self._too_long()
                line, self._read = bytes(self._read), bytearray()
                return line or None  # the last line needs no end
            self._read += chunk
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        if dropped or len(line) > self._longest:
            self._too_long()
        return line

    def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            ClientGoneError: the client has closed, or does not read.
        """
        try:
            self._connection.settimeout(self._patience)
            self._connection.sendall(data)
        except OSError as error:
            raise ClientGoneError from error

    def require_client(self) -> None:
        """Look whether anybody is there to be answered; one that only writes no more still is.

        Raises:
            ClientGoneError: the client has closed.
        """
        watch = select.poll()
        watch.register(self._connection, 0)  # POLLHUP and POLLERR come unasked
        if watch.poll(0):
            raise ClientGoneError

    def _too_long(self) -> None:
        raise LineError(f"want a line of at most {self._longest:,} bytes, got more; scale the pictures down")


def notify(environment: Mapping[str, str], state: str) -> None:
    """Tell systemd, where it has started this process, for example ``READY=1``.

    A notice that does not arrive changes nothing here: whoever waits for it has a time limit. Source: sd_notify(3).
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(1.0)
        sender.sendto(state.encode("utf-8"), f"\0{address[1:]}" if address[0] == "@" else address)


def _require_usable(path: Path) -> None:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise InputError(f"{path}: want a path of at most {_LONGEST_PATH} bytes for a socket; name a shorter one")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such directory for a socket; make it, or name another --socket")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InputError(f"{path}: want a name that is free, or an old socket's; something else is there, and stays")


def _is_still(handle: int, name: Path) -> bool:
    try:
        there = name.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(handle)
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1.0)
        try:
            client.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True  # a queue that is full, or a file of somebody else: not ours to replace
        return True
