"""Brings a checkpoint's tensors together under canonical names, and holds them against what the graphs take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD, LlavaConfig
from llava_deploy.exporter.quantization.weight import QuantizedSource
from llava_deploy.exporter.sources.leftovers import rule_for, tower_rule_for
from llava_deploy.exporter.sources.lora import Adapter, merged
from llava_deploy.exporter.sources.tensors import DTYPES, TensorSource, renamed, require_dtype

_SHOWN = 3  # names of tensors in one message

Naming = Callable[[str], str | None]


class Collector:
    """Tensors found so far, by canonical name."""

    def __init__(self) -> None:
        self.found: dict[str, TensorSource] = {}
        self.left_out: dict[str, str] = {}
        self._strangers: list[TensorSource] = []

    def add(self, files: Mapping[str, TensorSource], naming: Naming) -> None:
        """Add a model's tensors.

        Raises:
            CheckpointError: two of them mean the same tensor.
        """
        for key, source in files.items():
            name = naming(key)
            if name is None:
                self._strangers.append(source)
            elif name in self.found:
                raise CheckpointError(
                    f"{source.origin}: means the tensor {name!r}, and so does {self.found[name].origin}; "
                    "remove the one that is stale"
                )
            else:
                self.found[name] = renamed(source, name)

    def add_tower(self, files: Mapping[str, TensorSource], naming: Naming) -> None:
        """Add a tower directory's tensors; the text side of a whole CLIP model is left out."""
        rules = {key: tower_rule_for(key) for key in files}
        self.left_out |= {key: rule for key, rule in rules.items() if rule is not None}
        self.add({key: source for key, source in files.items() if rules[key] is None}, naming)

    def lay_over(self, files: Mapping[str, TensorSource], naming: Naming) -> None:
        """Add tensors that replace those found before."""
        names = {key: naming(key) for key in files}
        for name in names.values():
            if name in self.found:
                old = self.found.pop(name)
                self.left_out[old.key] = "replaced by a tensor that was laid over it"
        self.add(files, lambda key: names[key])

    def merge(self, adapter: Adapter, naming: Naming) -> None:
        """Add an adapter's deltas to the weights that they adapt.

        Raises:
            CheckpointError: a weight is not there, or of another shape, or quantised.
        """
        for module, delta in adapter.deltas.items():
            name = naming(f"{module}.weight")
            if name is None or name not in self.found:
                raise CheckpointError(
                    f"{delta.up.origin}: adapts {module!r}, which the base model has not; "
                    "is this the base model that the adapter was trained on?"
                )
            base = self.found[name]
            if isinstance(base, QuantizedSource):
                raise CheckpointError(
                    f"{delta.up.origin}: adapts {module!r}, which is quantised in {base.origin}; "
                    "merge the adapter into the unquantised checkpoint, and quantise that with --precision int4-awq"
                )
            self.found[name] = merged(base, delta)

    def settle_tie(self, config: LlavaConfig, adapter: Adapter | None) -> LlavaConfig:
        """Decide what a tied output layer is, as transformers does (``PreTrainedModel.tie_weights``).

        An ``lm_head.weight`` in the file equal to the embeddings is left out; a different one is used, and the model is
        not tied; alone in the file it is the embeddings too.
        """
        if not config.decoder.tie_word_embeddings:
            return config
        if adapter is not None and any(re.search(r"embed_tokens|lm_head", name) for name in adapter.deltas):
            raise CheckpointError(
                "tie_word_embeddings: an adapter on embed_tokens or lm_head of a tied model is not supported; "
                "merge the adapter with peft first"
            )
        head, table = self.found.get(LM_HEAD), self.found.get(EMBED_TOKENS)
        if head is None:
            return config
        if table is not None and not _equal(head, table):
            return replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))
        del self.found[LM_HEAD]
        if table is None:
            self.found[EMBED_TOKENS] = renamed(head, EMBED_TOKENS)
        else:
            self.left_out[head.key] = "tied to the token embeddings, and equal to them"
        return config

    def settle(
        self, config: LlavaConfig, last_layer: int, expected: Mapping[str, tuple[int, ...]], where: str
    ) -> dict[str, TensorSource]:
        """Give exactly the expected tensors.

        Raises:
            CheckpointError: one missing, of another shape or a dtype that weights do not have, or left over and not
                known by a rule.
        """
        self._leave_out(config, last_layer, expected)
        missing = [name for name in expected if name not in self.found]
        if missing:
            raise CheckpointError(
                f"{where}: {len(missing)} of {len(expected)} tensors are missing: {_some(missing)}; "
                "fetch the checkpoint's files again, and compare them with its config.json"
            )
        for name, shape in expected.items():
            source = self.found[name]
            if source.shape != shape:
                raise CheckpointError(
                    f"{source.origin}: want shape {list(shape)} for {name!r}, as config.json says, found "
                    f"{list(source.shape)}; do the files belong together?"
                )
            require_dtype(source)
        return {name: self.found[name] for name in expected}

    def _leave_out(self, config: LlavaConfig, last_layer: int, expected: Mapping[str, tuple[int, ...]]) -> None:
        over: list[str] = []
        unexpected = [(name, source) for name, source in self.found.items() if name not in expected]
        for name, source in [*unexpected, *((None, source) for source in self._strangers)]:
            rule = rule_for(source.key, name, config.vision, last_layer)
            if rule is None and name is not None and self._is_empty_bias(name, source):
                rule = "a bias of zeros on a quantised layer that has none; older GPTQ tools saved it"
            if rule is None:
                over.append(source.origin)
            else:
                self.left_out[source.key] = rule
        if over:
            raise CheckpointError(
                f"{len(over)} tensors are left over, and no rule says why: {_some(over)}; "
                "do the files belong to this config.json?"
            )

    def _is_empty_bias(self, name: str, source: TensorSource) -> bool:
        layer, _, part = name.rpartition(".")
        is_quantised = isinstance(self.found.get(f"{layer}.weight"), QuantizedSource)
        return part == "bias" and is_quantised and source.dtype in DTYPES and not source.read().any()


def _some(names: list[str]) -> str:
    more = "" if len(names) <= _SHOWN else f" and {len(names) - _SHOWN} more"
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def _equal(first: TensorSource, second: TensorSource) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    require_dtype(first)
    return bool(np.array_equal(first.read(), second.read()))
