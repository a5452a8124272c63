"""Reads config files strictly: every value has the type it should have, and every key is used, harmless or reported."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llava_deploy.engines.errors import CheckpointError

T = TypeVar("T")
_LONGEST = 120  # characters of a value that an error shows
_MOST = 2**31 - 1  # of any whole number that a model's config holds


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: no such file, not JSON, or not an object.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: want a JSON file, found something else; fetch the file again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()  # half a character cannot be written into a bundle
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: want this file, found none; is this the checkpoint's directory, and was it fetched whole?"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: want JSON, found something else ({error}); fetch the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: want a JSON object, found {type(values).__name__}; fetch the file again")
    return values


class Fields:
    """One object of a config file, and which of its keys were read.

    ``null`` counts as absent, as transformers' configs mean it.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        """Wrap ``values`` from the file ``where``; ``prefix`` is the dotted path of the object inside the file."""
        self.values = values
        self.where = where
        self.prefix = prefix
        self._read: set[str] = set()
        self._children: dict[str, Fields] = {}

    @classmethod
    def from_file(cls, path: Path) -> Fields:
        """The object in a JSON file; errors as in :func:`read_json`."""
        return cls(read_json(path), str(path))

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null; does not count as reading it."""
        return self.values.get(key) is not None

    def peek(self, key: str) -> Any:
        """The value as it stands, None if absent; counts as reading it."""
        self._read.add(key)
        return self.values.get(key)

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of type ``kind``, None if absent.

        Raises:
            CheckpointError: a value of another type, not finite, or beyond 2**31; an int passes for a float.
        """
        value = self.peek(key)
        if value is None:
            return None
        if type(value) is int and abs(value) > _MOST:
            raise self.error(key, f"want {kind.__name__} of at most {_MOST}", "correct the file")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self.error(key, f"want {kind.__name__}", "correct the file")
        return value  # type: ignore[no-any-return]

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The value of type ``kind``, ``default`` if absent; errors as in :meth:`optional`."""
        value = self.optional(key, kind)
        return default if value is None else value

    def require(self, key: str, kind: type[T]) -> T:
        """The value of type ``kind``.

        Raises:
            CheckpointError: absent, or of another type.
        """
        value = self.optional(key, kind)
        if value is None:
            raise self.error(key, f"want this field ({kind.__name__})", "was the file written whole?")
        return value

    def positive(self, key: str, default: int, most: int = _MOST) -> int:
        """A whole number from 1 to ``most``, ``default`` if absent."""
        value = self.get(key, int, default)
        if value < 1:
            raise self.error(key, "want at least 1", "correct the file")
        if value > most:
            raise self.error(key, f"want at most {most:,}", "correct the file")
        return value

    def number(self, key: str, default: float, above: float) -> float:
        """A number greater than ``above``, ``default`` if absent."""
        value = self.get(key, float, default)
        if value <= above:
            raise self.error(key, f"want a number above {above:g}", "correct the file")
        return value

    def child(self, key: str) -> Fields:
        """The object under ``key``, the same each time.

        Raises:
            CheckpointError: absent, or not an object.
        """
        values = self.require(key, dict)
        return self._children.setdefault(key, Fields(values, self.where, f"{self.prefix}{key}."))

    def only(self, key: str, accepted: Collection[Any], reason: str) -> None:
        """Refuse the key by name if it is there with a value outside ``accepted``."""
        value = self.peek(key)
        if value is not None and value not in accepted:
            raise self.error(key, f"want {' or '.join(map(repr, accepted)) if accepted else 'it absent'}", reason)

    def error(self, key: str, want: str, next_step: str) -> CheckpointError:
        """The error about one key: what was wanted, what was found, where, and what to do next."""
        found = repr(self.values[key]) if key in self.values else "none"
        found = found if len(found) <= _LONGEST else found[:_LONGEST] + "…"
        return CheckpointError(f"{self.where}, {self.prefix}{key}: {want}, found {found}; {next_step}")

    def unused(self, no_effect: Collection[str]) -> tuple[str, ...]:
        """Dotted keys, here and in children, that hold something, were not read, and are not in ``no_effect``."""
        left = [k for k, v in self.values.items() if k not in self._read and k not in no_effect and not _is_empty(v)]
        below = [key for child in self._children.values() for key in child.unused(no_effect)]
        return tuple(sorted([*(f"{self.prefix}{key}" for key in left), *below]))


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing; 0 says something."""
    return value is None or value is False or (isinstance(value, list | dict | str) and not value)
