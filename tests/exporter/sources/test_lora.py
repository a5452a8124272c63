"""LoRA adapters, merged as they are read, against peft's own ``merge_and_unload``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.checkpoint import Checkpoint, CheckpointOptions, open_checkpoint
from llava_deploy.exporter.sources.lora import non_lora_name

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

PLAIN = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "rslora": {**PLAIN, "use_rslora": True},
    "fan_in_fan_out": {**PLAIN, "fan_in_fan_out": True},
    "patterns": {
        **PLAIN,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"down_proj": 3, r"model.layers.0.self_attn.v_proj": 20},
    },
    "gaussian, with dropout": {**PLAIN, "init_lora_weights": "gaussian", "lora_dropout": 0.3},
    "embeddings and head": {**PLAIN, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "tower and projector": {**PLAIN, "target_modules": ["q_proj", "fc1", "mm_projector.0", "mm_projector.2"]},
    "whole modules": {**PLAIN, "modules_to_save": ["lm_head"]},
}
BIASES = {**PLAIN, "bias": "all"}


def adapted(model: Any, settings: dict[str, Any], directory: Path) -> Any:
    """Give ``model`` an adapter with random factors, save it, and merge it."""
    torch.manual_seed(3)
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and ("lora_" in name or "modules_to_save" in name or name.endswith("bias")):
            parameter.data.normal_(std=0.3)
    peft_model.save_pretrained(directory)
    return peft_model.merge_and_unload()


def assert_merged(checkpoint: Checkpoint, want: dict[str, torch.Tensor]) -> None:
    for name, source in checkpoint.tensors.items():
        np.testing.assert_allclose(source.read(), want[name].numpy(), atol=1e-6, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_peft_merges(make_original: Any, tmp_path: Path, variant: str) -> None:
    saved = make_original(tower="inside")
    merged = adapted(saved.model, VARIANTS[variant], tmp_path / "lora")
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(lora=tmp_path / "lora"))
    want = type(saved)(saved.directory, saved.tower, merged).canonical()
    assert_merged(checkpoint, want)
    changed = [name for name, value in saved.canonical().items() if not torch.equal(value, want[name])]
    assert changed
    assert checkpoint.tensors[changed[0]].files


def test_trained_biases_come_whole(make_original: Any, tmp_path: Path) -> None:
    saved = make_original(attention_bias=True, mlp_bias=True)
    merged = adapted(saved.model, BIASES, tmp_path / "lora")
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(lora=tmp_path / "lora"))
    want = type(saved)(saved.directory, saved.tower, merged).canonical()
    name = "language_model.layers.0.self_attn.q_proj.bias"
    np.testing.assert_array_equal(checkpoint.tensors[name].read(), want[name].numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_llava_hf_in_half_precision(make_llava: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    """The sum is rounded once, to the weight's dtype."""
    saved = make_llava(dtype=dtype)
    merged = adapted(saved.model, PLAIN, tmp_path / "lora")
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(lora=tmp_path / "lora"))
    want = type(saved)(saved.directory, merged).canonical()
    for name, source in checkpoint.tensors.items():
        got = torch.from_numpy(source.read().astype(np.float32))
        step = torch.finfo(dtype).eps * want[name].float().abs().clamp(min=1e-3)
        assert bool(((got - want[name].float()).abs() <= step).all()), name


def test_non_lora_trainables(make_original: Any, tmp_path: Path) -> None:
    """LLaVA's LoRA directories: the projector whole, and a config.json that makes a LLaVA of a plain Llama."""
    saved, other = make_original(), make_original("other", seed=1)
    merged = adapted(saved.model, PLAIN, tmp_path / "lora")
    projector = other.model.get_model().mm_projector.state_dict()
    whole = {f"base_model.model.model.mm_projector.{key}": value.clone() for key, value in projector.items()}
    torch.save(whole, tmp_path / "lora" / "non_lora_trainables.bin")
    values = json.loads((saved.directory / "config.json").read_text())
    (tmp_path / "lora" / "config.json").write_text(json.dumps(values))
    plain = {key: value for key, value in values.items() if not key.startswith(("mm_", "use_mm", "tune_mm"))}
    (saved.directory / "config.json").write_text(json.dumps(plain | {"model_type": "llama"}))
    tensors = load_file(saved.directory / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "mm_projector" not in k}, saved.directory / "model.safetensors")
    checkpoint = open_checkpoint(saved.directory, CheckpointOptions(lora=tmp_path / "lora"))
    want = type(saved)(saved.directory, saved.tower, merged).canonical()
    want |= {key: value for key, value in other.canonical().items() if key.startswith("projector.")}
    assert_merged(checkpoint, want)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("base_model.model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_names_of_non_lora_trainables(key: str, name: str) -> None:
    assert non_lora_name(key) == name


@pytest.fixture
def adapter(make_original: Any, tmp_path: Path) -> tuple[Any, Path]:
    saved = make_original()
    adapted(saved.model, PLAIN, tmp_path / "lora")
    return saved, tmp_path / "lora"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"a": 1}),
        ("trainable_token_indices", [5]),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["weight"]),
        ("a_field_of_the_future", {"on": True}),
    ],
)
def test_other_adapters_are_refused_by_name(adapter: Any, edit_json: Any, key: str, value: Any) -> None:
    saved, lora = adapter
    edit_json(lora / "adapter_config.json", lambda values: values.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json, {key}: .*peft"):
        open_checkpoint(saved.directory, CheckpointOptions(lora=lora))


def test_dora_tensors_are_refused(adapter: Any, edit_tensors: Any) -> None:
    saved, lora = adapter
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    edit_tensors(lora / "adapter_model.safetensors", lambda tensors: tensors.update({name: torch.ones(48)}))
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
        open_checkpoint(saved.directory, CheckpointOptions(lora=lora))


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q_PROJ}B.weight": None}, "lora_A and lora_B of 'model.layers.0.self_attn.q_proj', found A"),
        ({f"{Q_PROJ}A.weight": torch.ones(2, 48), f"{Q_PROJ}B.weight": torch.ones(48, 2)}, "want 4 rows"),
        ({f"{Q_PROJ}A.weight": torch.ones(4, 40)}, r"adapts a weight of shape \[48, 40\], found \[48, 48\]"),
        ({f"{Q_PROJ}A.weight": torch.ones(4, 3, 2, 2)}, "adapters of convolutions"),
        ({f"{Q_PROJ.replace('0', '7')}A.weight": torch.ones(4, 48)}, "lora_A and lora_B"),
        (
            {
                f"{Q_PROJ.replace('.0.', '.7.')}A.weight": torch.ones(4, 48),
                f"{Q_PROJ.replace('.0.', '.7.')}B.weight": torch.ones(48, 4),
            },
            "layers.7.self_attn.q_proj', which the base model has not",
        ),
    ],
)
def test_factors_that_do_not_fit(adapter: Any, edit_tensors: Any, change: dict[str, Any], message: str) -> None:
    saved, lora = adapter

    def edit(tensors: dict[str, Any]) -> None:
        tensors.update(change)
        for key in [key for key, value in tensors.items() if value is None]:
            del tensors[key]

    edit_tensors(lora / "adapter_model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved.directory, CheckpointOptions(lora=lora))


def test_no_adapter_file(adapter: Any) -> None:
    saved, lora = adapter
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"want adapter_model\.safetensors or adapter_model\.bin"):
        open_checkpoint(saved.directory, CheckpointOptions(lora=lora))


def test_adapter_on_tied_embeddings(make_original: Any, tmp_path: Path) -> None:
    saved = make_original(tie_word_embeddings=True)
    adapted(saved.model, {**PLAIN, "target_modules": ["lm_head"]}, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_checkpoint(saved.directory, CheckpointOptions(lora=tmp_path / "lora"))
