"""What a ``quantization_config`` of compressed-tensors says of each layer.

Source: compressed-tensors, ``quantization/`` (``quant_config.py``, ``quant_scheme.py``, ``quant_args.py``) and
``utils/match.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.layouts.fields import Fields

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_OTHERS = "other formats are not read: take the unquantised checkpoint"
_LINEAR = "Linear"
_PATTERN = "re:"

# What was measured to choose the scales, what the status was, and how other programs run it.
_NO_EFFECT = """
    dequantize global_compression_ratio quant_method quantization_status run_compressed use_optimized_inference version
""".split()
_NO_EFFECT_OF_WEIGHTS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")


@dataclass(frozen=True)
class Scheme:
    """How the layers of one config group are stored; ``group_size`` -1 means all input features."""

    targets: tuple[str, ...]
    group_size: int
    symmetric: bool
    is_ordered_by_activation: bool


@dataclass(frozen=True)
class Schemes:
    """The config groups, and the layers that none of them is about."""

    groups: tuple[Scheme, ...]
    ignored: tuple[str, ...]

    def of(self, module: str, origin: str) -> Scheme:
        """The scheme of a layer: by its name or a pattern, else as a linear layer.

        Raises:
            CheckpointError: the config leaves the layer out.
        """
        if any(_matches(target, module) for target in self.ignored):
            raise CheckpointError(
                f"{origin}: want this layer dense, as the config's ignore list says, found it packed; "
                "do the files belong to this config.json?"
            )
        for scheme in self.groups:
            if any(_matches(target, module) for target in scheme.targets):
                return scheme
        for scheme in self.groups:
            if _LINEAR in scheme.targets:
                return scheme
        raise CheckpointError(
            f"{origin}: want a group of quantization_config.config_groups that names this layer, found none; "
            "do the files belong to this config.json?"
        )


def parse(fields: Fields) -> Schemes:
    """Read a ``quantization_config`` of this method.

    Raises:
        CheckpointError: another format, or anything that cannot be honoured, by name.
    """
    fields.require("format", str)
    fields.only("format", (_FORMAT,), _OTHERS)
    fields.only("kv_cache_scheme", ({},), "a quantised cache is not supported: take the unquantised checkpoint")
    fields.only("transform_config", ({},), "it rotates the activations: take the unquantised checkpoint")
    if fields.has("sparsity_config"):
        sparsity = fields.child("sparsity_config")
        sparsity.only("format", ("dense",), "sparse formats are not read: take the unquantised checkpoint")
        for key in sparsity.values:
            sparsity.peek(key)
    groups = fields.child("config_groups")
    schemes = tuple(_scheme(groups.child(name)) for name in groups.values)
    if not schemes:
        raise fields.error("config_groups", "want a group of layers", "was the file written whole?")
    ignored = _patterns(fields, "ignore")
    for name in _NO_EFFECT:
        fields.peek(name)
    return Schemes(schemes, ignored)


def _scheme(fields: Fields) -> Scheme:
    for key in ("input_activations", "output_activations"):
        fields.only(key, ({},), "quantised activations are not supported: take the unquantised checkpoint")
    fields.only("format", (_FORMAT,), _OTHERS)
    targets = _patterns(fields, "targets")
    weights = fields.child("weights")
    weights.require("num_bits", int)
    weights.only("num_bits", (4,), "other bits are not supported: take the unquantised checkpoint")
    weights.only("type", ("int",), "other values are not supported: take the unquantised checkpoint")
    weights.only("dynamic", (False,), "the scales have to be in the file")
    weights.only("block_structure", ([],), "blocks over outputs are not supported: take the unquantised checkpoint")
    size = weights.optional("group_size", int)
    strategy = weights.get("strategy", str, "group" if size is not None and size > 0 else "channel")
    if strategy not in ("group", "channel"):
        raise weights.error("strategy", "want 'group' or 'channel'", "others are not supported")
    if (strategy == "group") != (size is not None and size > 0):
        raise weights.error("group_size", f"want what strategy {strategy!r} goes with", "correct the file")
    order = weights.peek("actorder")
    if order not in (None, False, True, "group", "dynamic", "weight", "static"):
        raise weights.error("actorder", "want 'group', 'weight' or it absent", "there are no others")
    for name in _NO_EFFECT_OF_WEIGHTS:
        weights.peek(name)
    return Scheme(
        targets=targets,
        group_size=-1 if strategy == "channel" or size is None else size,
        symmetric=weights.get("symmetric", bool, True),
        is_ordered_by_activation=order in (True, "group", "dynamic"),
    )


def _patterns(fields: Fields, key: str) -> tuple[str, ...]:
    values = fields.get(key, list, [])
    for value in values:
        if not isinstance(value, str):
            raise fields.error(key, "want names", "correct the file")
        if value.startswith(_PATTERN):
            try:
                re.compile(value.removeprefix(_PATTERN))
            except re.error as error:
                raise fields.error(key, f"want regular expressions ({value!r}: {error})", "correct the file") from error
    return tuple(values)


def _matches(target: str, module: str) -> bool:
    """Whether ``target`` is the layer's name or a pattern at its beginning, as ``match_name`` has it."""
    if target.startswith(_PATTERN):
        return re.match(target.removeprefix(_PATTERN), module) is not None
    return target == module
