"""Plain values, as JSON has them, to instances of annotated frozen dataclasses, strictly. Standard library only."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal


def from_plain(want: Any, value: Any, where: str) -> Any:
    """``value``, as :func:`json.loads` gives it, as an instance of the annotation ``want``.

    Covers what the manifests use: frozen dataclasses, tuples, dicts, unions, literals and plain scalars.

    Raises:
        TypeError: it does not fit; the message names the place.
    """
    origin, args = typing.get_origin(want), typing.get_args(want)
    if dataclasses.is_dataclass(want) and isinstance(want, type):
        return _instance(want, value, where)
    if origin is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        if len(kinds) == len(value):
            return tuple(from_plain(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {from_plain(args[0], k, where): from_plain(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    elif origin in (typing.Union, types.UnionType):
        return _one_of(want, value, where)
    elif origin is Literal and any(type(value) is type(option) and value == option for option in args):  # True is no 1
        return value
    elif want is float and type(value) in (int, float):
        if math.isfinite(number := float(value)):
            return number
    elif type(value) is want:
        return value
    raise TypeError(f"{where}: want {want}, found {value!r:.80}")


def _one_of(want: Any, value: Any, where: str) -> Any:
    options = typing.get_args(want)
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, options)):
        # With one class among the options, its own error says which of the fields is wrong.
        return from_plain(next(filter(dataclasses.is_dataclass, options)), value, where)
    for option in options:
        with contextlib.suppress(TypeError):
            return from_plain(option, value, where)
    raise TypeError(f"{where}: want {want}, found {value!r:.80}")


def _instance(want: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{where}: want an object, found {type(value).__name__}")
    names = [f.name for f in dataclasses.fields(want)]
    missing, unknown = [n for n in names if n not in value], sorted(set(value) - set(names))
    if missing or unknown:
        raise TypeError(f"{where}: missing {missing}, unknown {unknown}")
    hints = _hints(want)
    return want(**{n: from_plain(hints[n], value[n], f"{where}.{n}") for n in names})


@functools.cache
def _hints(want: type) -> dict[str, Any]:
    """A class's annotations; to evaluate them takes longer than to hold a value against them."""
    return typing.get_type_hints(want)
