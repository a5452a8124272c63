"""Whether two graphs are one but for the values of their weights, and where they first differ.

What a graph holds beside weights is compared too: operators and how they are joined, attributes such as a norm's
epsilon, constants such as the rotary tables. Names that only a graph's own nodes know may differ, as those that another
version of the exporter gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

Pairs: TypeAlias = dict[ir.Value, ir.Value]


def first_difference(stored: ir.Model, made: ir.Model) -> str | None:
    """Where ``made``, whose weights have no values yet, is another graph than ``stored``.

    Returns:
        What differs, what is stored and what was found, for an error's message; ``None`` where they are one.
    """
    return next(_differences(stored.graph, made.graph), None)


def _differences(stored: ir.Graph, made: ir.Graph) -> Iterator[str]:
    yield from _weight_differences(stored.initializers, made.initializers)
    pairs: Pairs = {}
    yield from _interface("input", stored.inputs, made.inputs, pairs)
    yield from _tables(stored.initializers, made.initializers, pairs)
    for want, found in zip_longest(stored, made):
        if want is None or found is None or want.op_type != found.op_type or want.domain != found.domain:
            names = [None if node is None else node.op_type for node in (want, found)]
            where = _place(want if want is not None else found)
            yield f"an operator of {where}: want {names[0]}, found {names[1]}"
            return  # nothing behind it is in step
        yield from _node_differences(want, found, pairs)
    for want_end, found_end in zip_longest(stored.outputs, made.outputs):
        if pairs.get(want_end) is not found_end:
            yield f"an output: want {_name(want_end)}, found {_name(found_end)}"


def _weight_differences(stored: Mapping[str, ir.Value], made: Mapping[str, ir.Value]) -> Iterator[str]:
    for name, value in made.items():
        if value.const_value is None:
            found = _type(value)
            want = _type(stored[name]) if name in stored else "none"
            if want != found:
                yield f"weight {name}: want {want}, found {found}"
    for name in stored:
        if "." in name and name not in made:
            yield f"weight {name}: want {_type(stored[name])}, found none"


def _interface(kind: str, stored: Sequence[ir.Value], made: Sequence[ir.Value], pairs: Pairs) -> Iterator[str]:
    for want, found in zip_longest(stored, made):
        if want is None or found is None or (want.name, _type(want)) != (found.name, _type(found)):
            yield f"an {kind}: want {_name(want)}, found {_name(found)}"
            return
        pairs[want] = found


def _tables(stored: Mapping[str, ir.Value], made: Mapping[str, ir.Value], pairs: Pairs) -> Iterator[str]:
    """Weights are paired by their names; so are constants with a name of their own, which have to be equal."""
    for name, value in made.items():
        if name in stored:
            if value.const_value is None:
                pairs[stored[name]] = value
            elif "." in name:
                if not _equal(stored[name], value):
                    yield f"constant {name}: want {_values(stored[name])}, found {_values(value)}"
                pairs[stored[name]] = value


def _node_differences(want: ir.Node, found: ir.Node, pairs: Pairs) -> Iterator[str]:
    where = f"{want.op_type} of {_place(want)}"
    for name in dict.fromkeys((*want.attributes, *found.attributes)):
        values = [_attribute(node, name) for node in (want, found)]
        if values[0] != values[1]:
            yield f"{name} of {where}: want {values[0]}, found {values[1]}"
    for left, right in zip_longest(want.inputs, found.inputs):
        if left is None or right is None:
            if left is not right:
                yield f"an input of {where}: want {_name(left)}, found {_name(right)}"
        elif left in pairs:
            if pairs[left] is not right:
                yield f"an input of {where}: want {_name(left)}, found {_name(right)}"
        elif _equal(left, right):
            pairs[left] = right
        else:
            yield f"an input of {where}: want {_values(left)}, found {_values(right)}"
    for left, right in zip_longest(want.outputs, found.outputs):
        if left is None or right is None:
            yield f"outputs of {where}: want {len(want.outputs)}, found {len(found.outputs)}"
            return
        pairs[left] = right


def _attribute(node: ir.Node, name: str) -> object:
    """As a file holds it: floats are of 32 bits."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return None
    value = attribute.value
    if isinstance(value, float):
        return float(np.float32(value))
    if isinstance(value, ir.TensorProtocol):
        return value.tobytes()
    return list(value) if isinstance(value, (list, tuple)) else value


def _equal(left: ir.Value, right: ir.Value) -> bool:
    a, b = left.const_value, right.const_value
    return a is not None and b is not None and _type(left) == _type(right) and a.tobytes() == b.tobytes()


def _type(value: ir.Value) -> str:
    shape = None if value.shape is None else [size if isinstance(size, int) else str(size) for size in value.shape]
    return f"{value.dtype}{shape}"


def _name(value: ir.Value | None) -> str:
    return "none" if value is None else f"{value.name} ({_type(value)})"


def _values(value: ir.Value) -> str:
    """A constant's first values, and the last one, which tells tables of different scale apart."""
    if value.const_value is None:
        return _name(value)
    flat = value.const_value.numpy().reshape(-1)
    shown = flat if flat.size <= 4 else [*flat[:2], "…", flat[-1]]
    return f"{_type(value)} of {', '.join(map(str, shown))}"


def _place(node: ir.Node | None) -> str:
    """Module of the model that a node was made for."""
    if node is None or node.name is None:
        return "the graph"
    return node.name.rpartition("/")[0].replace("/", ".") or "the graph"
