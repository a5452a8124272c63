"""Packers that follow the published formats, a nibble at a time, and checkpoints whose layers are packed by them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

# Everything a multiple of 64, which TinyChat wants.
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
DECODER_LINEAR = re.compile(r"language_model\.model\.layers\.\d+\.(?:self_attn|mlp)\.\w+\.weight")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """Random integers 0 to 15 ``q`` [K, N], ``z`` [groups, N], scales ``s`` [groups, N], and each input's group."""

    q: np.ndarray
    z: np.ndarray
    s: torch.Tensor
    g: np.ndarray

    def weight(self) -> np.ndarray:
        """(q - z) * s, float32 [N, K]."""
        rows = [
            (self.q[k].astype(np.float32) - self.z[self.g[k]].astype(np.float32)) * self.s[self.g[k]].float().numpy()
            for k in range(len(self.q))
        ]
        return np.stack(rows, axis=1)


def random_layer(
    seed: int,
    inputs: int,
    outputs: int,
    group: int,
    *,
    dtype: str = "float16",
    symmetric: bool = False,
    act: bool = False,
) -> Layer:
    rng = np.random.default_rng(seed)
    group = inputs if group == -1 else group
    groups = inputs // group
    q = rng.integers(0, 16, (inputs, outputs))
    z = np.full((groups, outputs), 8) if symmetric else rng.integers(0, 16, (groups, outputs))
    if not symmetric:
        z[:, :2] = 0, 15  # skewed groups, always among them
    s = torch.from_numpy(rng.uniform(0.001, 0.02, (groups, outputs))).to(DTYPES[dtype])
    g = np.arange(inputs) // group
    return Layer(q, z, s, rng.permutation(g) if act else g)


def words(rows: list[list[list[int]]], dtype: Any = np.int32) -> torch.Tensor:
    """Lists of nibbles, the lowest first, to integers."""
    bits = np.dtype(dtype).itemsize * 8
    values = [[sum(nibble << (4 * i) for i, nibble in enumerate(word)) for word in row] for row in rows]
    unsigned = np.array(values, np.uint64).astype(f"u{bits // 8}")
    return torch.from_numpy(unsigned.view(dtype).copy())


def down(values: np.ndarray) -> torch.Tensor:
    """8 rows of a column in a word."""
    rows, columns = values.shape
    blocks = range(-(-rows // 8))
    return words([[[int(v) for v in values[8 * b : 8 * b + 8, c]] for c in range(columns)] for b in blocks])


def across(values: np.ndarray, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """8 columns of a row in a word, in some order."""
    rows, columns = values.shape
    return words([[[int(values[r, 8 * b + i]) for i in order] for b in range(columns // 8)] for r in range(rows)])


def awq(layer: Layer) -> dict[str, torch.Tensor]:
    """AutoAWQ's GEMM: awq/modules/linear/gemm.py, order_map."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": across(layer.q, order), "qzeros": across(layer.z, order), "scales": layer.s}


def gptq(layer: Layer, stored: Callable[[np.ndarray], torch.Tensor]) -> dict[str, torch.Tensor]:
    """AutoGPTQ's qlinear_cuda.py, pack."""
    g_idx = torch.from_numpy(layer.g.astype(np.int32))
    return {"qweight": down(layer.q), "qzeros": stored(layer.z), "scales": layer.s, "g_idx": g_idx}


def less_one_each(z: np.ndarray) -> torch.Tensor:
    return across((z - 1) % 16)


def less_one_in_words(z: np.ndarray) -> torch.Tensor:
    """GPTQModel's utils/model.py, convert_gptq_v2_to_v1_format: int32 arithmetic, which borrows."""
    return across(z) - 0x11111111


def compressed(layer: Layer, *, g_idx: bool = False, symmetric: bool = False) -> dict[str, torch.Tensor]:
    """compressed-tensors' pack_to_int32: signed integers, 8 added, along K; zero points along N."""
    signed, zero_points = layer.q - 8, layer.z - 8
    parts = {
        "weight_packed": across(signed.T + 8),
        "weight_scale": layer.s.T.contiguous(),
        "weight_shape": torch.tensor(signed.T.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = down(zero_points.T + 8)
    if g_idx:
        parts["weight_g_idx"] = torch.from_numpy(layer.g.astype(np.int32))
    return parts


def tinychat(layer: Layer) -> dict[str, torch.Tensor]:
    """llm-awq's qmodule.py: pack_intweight with interleave 4 and kstride 64, and WQLinear.from_linear."""
    spread = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]
    spread += [4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31]
    q = layer.q.T
    outputs, inputs = q.shape
    packed = []
    for first in range(0, outputs, 4):
        row: list[list[int]] = []
        for stride in range(0, inputs, 64):
            flat: list[int] = []
            for output in range(first, first + 4):
                for half in (0, 32):
                    values = [int(q[output, stride + half + k]) for k in spread]
                    for eight in range(0, 32, 8):
                        flat += [values[eight + i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
            row += [flat[i : i + 4] for i in range(0, len(flat), 4)]
        packed.append(row)
    groups = len(layer.s)
    multiple = {128: 8, 64: 16, 32: 32}[inputs // groups]
    scales = torch.zeros(-(-groups // multiple) * multiple, outputs, dtype=torch.float16)
    scales[:groups] = layer.s
    scaled = torch.zeros_like(scales)
    scaled[:groups] = -(layer.s * torch.from_numpy(layer.z).float()).to(torch.float16)
    return {"qweight": words(packed, np.int16), "scales": scales, "scaled_zeros": scaled}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "true_sequential": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed_config(group_size: int | None, **weights: Any) -> dict[str, Any]:
    strategy = "channel" if group_size is None else "group"
    args = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": strategy, "group_size": group_size, **weights}
    scheme = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "config_groups": {"group_0": scheme},
    }


@dataclass(frozen=True)
class Format:
    """How layers are drawn and packed, what config.json says, and the format that a weight then has here."""

    config: dict[str, Any]
    pack: Callable[[Layer], Mapping[str, torch.Tensor]]
    group: int = 32
    draw: dict[str, Any] = field(default_factory=dict)
    method: str = "gptq"
    permuted: bool = False


FORMATS = {
    "awq": Format(AWQ, awq, method="autoawq"),
    "awq, older names, groups of 64": Format(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, awq, 64, method="autoawq"
    ),
    "awq without zero points": Format({**AWQ, "zero_point": False}, awq, draw={"symmetric": True}, method="autoawq"),
    "awq, one group": Format({**AWQ, "group_size": -1}, awq, -1, method="autoawq"),
    "gptq": Format(GPTQ, lambda layer: gptq(layer, less_one_each)),
    "gptq of gptqmodel": Format(
        {**GPTQ, "meta": {"quantizer": ["gptqmodel:4.0.0"]}}, lambda layer: gptq(layer, less_one_in_words)
    ),
    "gptq v2": Format({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda layer: gptq(layer, across)),
    "gptq, symmetric": Format(
        {**GPTQ, "sym": True}, lambda layer: gptq(layer, less_one_each), draw={"symmetric": True}
    ),
    "gptq, activation order": Format(
        {**GPTQ, "desc_act": True}, lambda layer: gptq(layer, less_one_each), draw={"act": True}, permuted=True
    ),
    "gptq, symmetric, activation order, v2": Format(
        {**GPTQ, "sym": True, "desc_act": True, "format": "gptq_v2"},
        lambda layer: gptq(layer, across),
        draw={"act": True, "symmetric": True},
        permuted=True,
    ),
    "gptq, one group": Format(
        {**GPTQ, "group_size": -1, "desc_act": True}, lambda layer: gptq(layer, less_one_each), -1
    ),
    "gptq without g_idx": Format(
        GPTQ, lambda layer: {k: v for k, v in gptq(layer, less_one_each).items() if k != "g_idx"}
    ),
    "compressed-tensors": Format(compressed_config(32), compressed, method="compressed-tensors"),
    "compressed-tensors, symmetric, bfloat16": Format(
        compressed_config(64, symmetric=True),
        lambda layer: compressed(layer, symmetric=True),
        64,
        {"dtype": "bfloat16", "symmetric": True},
        "compressed-tensors",
    ),
    "compressed-tensors, channels": Format(
        compressed_config(None), compressed, -1, {"dtype": "float32"}, "compressed-tensors"
    ),
    "compressed-tensors, activation order": Format(
        compressed_config(32, actorder="group"),
        lambda layer: compressed(layer, g_idx=True),
        draw={"act": True},
        method="compressed-tensors",
        permuted=True,
    ),
}


@dataclass(frozen=True)
class Packed:
    """A checkpoint with packed layers; the wanted weights have canonical names."""

    directory: Path
    wanted: dict[str, np.ndarray]
    dense: dict[str, np.ndarray]


MakePacked = Callable[..., Packed]


@pytest.fixture(params=FORMATS)
def format_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def formats() -> Mapping[str, Format]:
    return FORMATS


@pytest.fixture
def packers() -> Any:
    """What builds one layer and packs it."""

    class Packers:
        random_layer = staticmethod(random_layer)
        awq, compressed, tinychat = staticmethod(awq), staticmethod(compressed), staticmethod(tinychat)
        gptq, less_one_each = staticmethod(gptq), staticmethod(less_one_each)
        less_one_in_words, as_it_is = staticmethod(less_one_in_words), staticmethod(across)

    return Packers


@pytest.fixture
def make_packed(make_llava: Any, edit_json: Any) -> MakePacked:
    """A factory of llava-hf checkpoints with packed decoder layers; ``dense`` matches those that stay as they were."""

    def make(format_name: str, dense: str = r"(?!)", layers: re.Pattern[str] = DECODER_LINEAR) -> Packed:
        format_ = FORMATS[format_name]
        saved = make_llava(text=TEXT)
        wanted: dict[str, np.ndarray] = {}
        path = saved.directory / "model.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for seed, (key, value) in enumerate(load_file(path).items()):
            if not layers.fullmatch(key) or re.search(dense, key):
                tensors[key] = value
                continue
            outputs, inputs = value.shape
            layer = random_layer(seed, inputs, outputs, format_.group, **format_.draw)
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.{part}": tensor for part, tensor in format_.pack(layer).items()}
            wanted[key.replace("language_model.model.", "language_model.")] = layer.weight()
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        edit_json(saved.directory / "config.json", lambda values: values.update(quantization_config=format_.config))
        rest = {key: value.numpy() for key, value in saved.canonical().items() if key not in wanted}
        return Packed(saved.directory, wanted, rest)

    return make


@pytest.fixture
def make_tinychat(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    """Write a file as llm-awq does: the language model with the original layout's names, its layers packed."""

    def make(language_model: Mapping[str, torch.Tensor], *, group: int = 64, prefix: str = "model.") -> Any:
        content: dict[str, torch.Tensor] = {}
        wanted: dict[str, np.ndarray] = {}
        for seed, (name, value) in enumerate(language_model.items()):
            key = name.replace("language_model.", prefix)
            if not re.search(r"_proj\.weight$", name):
                content[key] = value.half() + 1
                wanted[name] = content[key].numpy()
                continue
            outputs, inputs = value.shape
            layer = random_layer(seed, inputs, outputs, group)
            module = key.removesuffix(".weight")
            content |= {f"{module}.{part}": tensor for part, tensor in tinychat(layer).items()}
            wanted[name] = layer.weight()
        path = tmp_path / "llava-w4-g64-awq-v2.pt"
        torch.save(content, path)
        return path, wanted

    return make


@pytest.fixture
def config_of() -> Callable[[Path], dict[str, Any]]:
    return lambda directory: dict(json.loads((directory / "config.json").read_text()))
