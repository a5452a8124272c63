"""What ``--json`` wrote, read back: one frozen dataclass with a ``schema`` number."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.plain import from_plain

Result = TypeVar("Result")


@dataclass(frozen=True)
class ResultForm(Generic[Result]):
    """A command's result.

    Attributes:
        kind: its class.
        schema: the only number that is read.
        command: that writes it, ``llava-deploy bench``.
        root: what its parts are told by in errors.
        again: how to make another; ends an error's message.
    """

    kind: type[Result]
    schema: int
    command: str
    root: str
    again: str

    def read(self, path: Path) -> Result:
        """Read a file of this form.

        Raises:
            InputError: no file, not JSON, or of another schema or form.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); want a result of {self.command}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON, or only a part of it ({error}); {self.again}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is not int or schema != self.schema:
            found = "none" if schema is None else f"{schema!r:.40}"
            wanted = f"want a result of {self.command}, of schema {self.schema}"
            raise InputError(f"{path}: {wanted}, found {found}; {self.again}")
        try:
            result: Result = from_plain(self.kind, data, self.root)
        except (TypeError, OverflowError, InputError) as error:
            raise InputError(f"{path}: {error}; {self.again}") from error
        return result
