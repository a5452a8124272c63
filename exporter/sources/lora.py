"""LoRA adapters in PEFT's layout, merged into a weight when it is read.

Source: Hu et al. 2021, "LoRA"; peft, ``tuners/lora/layer.py``: W' = W + scaling · B A, where scaling is alpha / r, or
alpha / sqrt(r) with ``use_rslora``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.sources.tensors import DerivedTensor, TensorSource, open_file, require_dtype
from llava_deploy.exporter.sources.weight_files import ADAPTER_FILES, find_file

ADAPTER_CONFIG = "adapter_config.json"
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)\.")

# These change how adapters are trained, saved or found, not what a merged weight is. fan_in_fan_out: peft itself resets
# it for torch.nn.Linear, and there are no other weights here.
_NO_EFFECT = frozenset(
    """
    arrow_config auto_mapping base_model_name_or_path bias ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_dropout megatron_core
    modules_to_save peft_type peft_version qalora_group_size revision runtime_config target_modules task_type
    """.split()
)
_PLAIN_INITS = (True, False, "gaussian", "eva")
"""Ways to start A and B that leave the base weight as it was; pissa, olora, corda and others change it."""


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight: ``up`` [out, r] times ``down`` [r, in] times ``scaling``."""

    down: TensorSource
    up: TensorSource
    scaling: float
    is_embedding: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it fits: [out, in], or [vocabulary, hidden] of an embedding table."""
        shape = (self.up.shape[0], self.down.shape[1])
        return shape[::-1] if self.is_embedding else shape


@dataclass(frozen=True)
class Adapter:
    """An adapter's files by module and tensor names of the base model, without PEFT's prefix."""

    deltas: Mapping[str, Delta]
    whole: Mapping[str, TensorSource]


@dataclass(frozen=True)
class MergedTensor(DerivedTensor):
    """A weight with an adapter's delta, added up in float32 and stored in the weight's dtype."""

    name: str
    delta: Delta

    @property
    def origin(self) -> str:
        """Both files and keys."""
        return f"{self.source.origin} with {self.delta.up.origin}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The base weight's and the adapter's."""
        return tuple(dict.fromkeys((*self.source.files, *self.delta.up.files, *self.delta.down.files)))

    def read(self) -> np.ndarray:
        """The merged values."""
        dtype = require_dtype(self.source)
        up, down = (_wide(source) for source in (self.delta.up, self.delta.down))
        merged: np.ndarray = up @ down  # [out, in]
        merged *= np.float32(self.delta.scaling)
        if self.delta.is_embedding:
            merged = merged.T
        with np.errstate(over="ignore"):  # whoever writes the values checks that they are finite
            merged = merged + self.source.read()
        return merged.astype(dtype)


def _wide(source: TensorSource) -> np.ndarray:
    require_dtype(source)
    return source.read().astype(np.float32)


def merged(base: TensorSource, delta: Delta) -> MergedTensor:
    """``base`` with ``delta`` added.

    Raises:
        CheckpointError: their shapes differ.
    """
    if base.shape != delta.shape:
        raise CheckpointError(
            f"{delta.up.origin}: adapts a weight of shape {list(delta.shape)}, found {list(base.shape)} in "
            f"{base.origin}; is this the base model that the adapter was trained on?"
        )
    return MergedTensor(base, base.name, delta)


def open_adapter(directory: Path) -> Adapter:
    """Read ``adapter_config.json``, ``adapter_model`` and ``non_lora_trainables`` of a directory.

    Raises:
        CheckpointError: a file missing or damaged, another kind of adapter than plain LoRA (DoRA, PiSSA, …: refused by
            the name of the field that asks for it), or half of a pair of factors missing.
    """
    fields = Fields.from_file(directory / ADAPTER_CONFIG)
    _refuse_unsupported(fields)
    scalings = _Scalings(fields)
    if strange := fields.unused(_NO_EFFECT):
        raise fields.error(strange[0], "want no such field", "it cannot be honoured: merge the adapter with peft first")
    path = find_file(directory, ADAPTER_FILES)
    if path is None or path.suffix == ".json":
        raise CheckpointError(f"{directory}: want {' or '.join(ADAPTER_FILES)}, found neither; fetch the adapter again")
    factors: dict[str, dict[str, TensorSource]] = {}
    embeddings: set[str] = set()
    whole: dict[str, TensorSource] = {}
    for key, source in open_file(path).items():
        name = key.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[3]] = source
            embeddings |= {match[1]} if match[2] else set()
        elif "lora_" in name:
            raise CheckpointError(f"{source.origin}: not a plain LoRA tensor; merge the adapter with peft first")
        else:
            whole[_WRAPPER.sub(".", name)] = source
    other = next((directory / name for name in NON_LORA_FILES if (directory / name).is_file()), None)
    if other is not None:
        whole |= {non_lora_name(key): source for key, source in open_file(other).items()}
    deltas = {module: _delta(module, pair, scalings, module in embeddings, path) for module, pair in factors.items()}
    return Adapter(deltas, whole)


def non_lora_name(key: str) -> str:
    """A base model's name for a tensor of ``non_lora_trainables.bin`` (LLaVA, ``llava/model/builder.py``).

    The original takes off ``base_model.`` and then, if ``model.model.`` is left, ``model.``.
    """
    key = key.removeprefix("base_model.")
    return key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key


def _refuse_unsupported(fields: Fields) -> None:
    if fields.require("peft_type", str) != "LORA":
        raise fields.error("peft_type", "want 'LORA'", "other adapters are not supported: merge it with peft first")
    step = "merge the adapter with peft first"
    fields.only("use_dora", (False,), f"DoRA is not supported: {step}")
    fields.only("use_qalora", (False,), f"QALoRA is not supported: {step}")
    fields.only("lora_bias", (False,), f"biases of the factors are not supported: {step}")
    fields.only("init_lora_weights", _PLAIN_INITS, f"it changes the base model's weights: {step}")
    fields.only("layer_replication", ([],), f"replicated layers are not supported: {step}")


class _Scalings:
    """Rank and alpha of each module, patterns included (peft, ``get_pattern_key``)."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._rank = fields.positive("r", 8)
        self._alpha = fields.get("lora_alpha", float, 8.0)
        self._root = fields.get("use_rslora", bool, False)
        self._ranks = _patterns(fields, "rank_pattern", (int,))
        self._alphas = _patterns(fields, "alpha_pattern", (int, float))

    def scaling(self, module: str, source: TensorSource) -> float:
        """The factor on B A; the rank in the config has to be that of the tensors."""
        rank, alpha = _matching(self._ranks, module, self._rank), _matching(self._alphas, module, self._alpha)
        if source.shape[0] != rank:
            raise CheckpointError(
                f"{source.origin}: want {rank} rows, as {ADAPTER_CONFIG} says (r, rank_pattern), found "
                f"{source.shape[0]}; the adapter's files do not belong together"
            )
        return float(alpha / (math.sqrt(rank) if self._root else rank))


def _patterns(fields: Fields, key: str, kinds: tuple[type, ...]) -> Mapping[str, float]:
    patterns = fields.get(key, dict, {})
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise fields.error(key, f"want regular expressions ({pattern!r}: {error})", "correct the file") from error
        if type(value) not in kinds or not 0 < value < math.inf:
            raise fields.error(key, f"want a number above 0 for {pattern!r}", "correct the file")
    return patterns


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _delta(module: str, pair: Mapping[str, TensorSource], scalings: _Scalings, is_embedding: bool, path: Path) -> Delta:
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{path}: want lora_A and lora_B of {module!r}, found {''.join(pair)}; fetch it again")
    down, up = pair["A"], pair["B"]
    if len(down.shape) != 2 or len(up.shape) != 2 or up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"{up.origin}: want factors [out, r] and [r, in], found {list(up.shape)} and {list(down.shape)}; "
            "adapters of convolutions are not supported: merge the adapter with peft first"
        )
    return Delta(down, up, scalings.scaling(module, down), is_embedding)
