"""What the real modules take, read off their docstrings, so that the fakes refuse what they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_HANDLES = ("stream", "hStream", "event", "graph", "graphExec", "start", "end")


def cuda_parameters(function: Any) -> list[str]:
    """``['devPtr', 'int value', 'size_t count', 'stream']`` of ``cudaMemsetAsync``."""
    (inside,) = re.findall(r"\((.*)\)", function.__doc__.splitlines()[0])
    return [part.strip() for part in inside.split(",") if part.strip()]


def check_cuda_call(name: str, parameters: list[str], arguments: tuple[Any, ...]) -> None:
    """Raise the TypeError that cuda-python raises."""
    if len(arguments) != len(parameters):
        raise TypeError(f"{name}() takes exactly {len(parameters)} positional arguments ({len(arguments)} given)")
    for parameter, argument in zip(parameters, arguments, strict=True):
        kind, _, tail = parameter.rpartition(" ")
        if ":" in parameter:
            want = parameter.partition(":")[2].strip()
            if type(argument).__name__ != want:
                raise TypeError(f"{name}: want a {want} for {parameter!r}, got {type(argument).__name__}")
        elif kind:  # a C integer
            if not hasattr(argument, "__index__"):
                raise TypeError(f"{name}: an integer is required for {tail}, got {type(argument).__name__}")
        elif not hasattr(argument, "__int__"):
            raise TypeError(f"{name}: want an address or a handle for {parameter}, got {type(argument).__name__}")


def tensorrt_parameters(function: Any) -> list[int]:
    """How many arguments, self not counted, each overload of a method of the real module takes at least and at most."""
    counts: list[int] = []
    for line in function.__doc__.splitlines():
        found = re.search(rf"{function.__name__}\((self: .*)\) ->", line)
        if found:
            parts = re.sub(r"\[[^\[\]]*\]|<[^<>]*>", "", found.group(1)).split(",")[1:]
            required = sum("=" not in part for part in parts)
            counts.extend(range(required, len(parts) + 1))
    return counts


def held_against(real: type) -> Callable[[type], type]:
    """A class decorator: every public name of the fake is one of the real class, and takes as many arguments."""

    def check(fake: type) -> type:
        for name, value in vars(fake).items():
            if name.startswith("_"):
                continue
            if not hasattr(real, name):
                raise AttributeError(f"{real.__name__} has no {name}")
            if callable(value):
                counts = tensorrt_parameters(getattr(real, name))
                most, defaults = value.__code__.co_argcount - 1, len(value.__defaults__ or ())
                if not {most - defaults, most} <= set(counts):
                    raise TypeError(f"{real.__name__}.{name} takes {counts} arguments")
        return fake

    return check
