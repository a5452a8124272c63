"""Reads both checkpoint layouts into :class:`LlavaLlamaForCausalLM`, and writes them.

Simple and strict: every tensor is named in the checkpoint and in the model, or it is an error. The exporter has its own
lazy reader; this one serves training and the tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig
from transformers import LlavaConfig as HfLlavaConfig

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.reference.llava_llama import LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava_deploy.exporter.reference.vision_tower import read_tower_config

_TOWER = "model.vision_tower.vision_tower."

# Prefixes of the llava-hf generations, the longest of each family first, and ours.
_FROM_HF = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.vision_tower.vision_model.", _TOWER),
    ("model.vision_tower.", _TOWER),
    ("vision_tower.vision_model.", _TOWER),
    ("vision_tower.", _TOWER),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("lm_head.", "lm_head."),
)
_FROM_ORIGINAL = ((_TOWER + "vision_model.", _TOWER),)
_TO_HF = (
    (_TOWER, "vision_tower.vision_model."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_BUFFERS = ("position_ids", "inv_freq")
_SELECT = {"default": "patch", "full": "cls_patch"}
_STRATEGY: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}


def from_checkpoint(
    directory: str | Path, *, vision_tower: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> LlavaLlamaForCausalLM:
    """Load a checkpoint of either layout; the tower comes frozen.

    Args:
        directory: config.json with safetensors, one file or sharded.
        vision_tower: directory of the tower, for the original layout; else what ``mm_vision_tower`` names.
        dtype: of all weights.

    Raises:
        CheckpointError: anything in the config that is not supported, or any tensor missing, left over or misshapen.

    """
    directory = Path(directory)
    raw = _read_json(directory / "config.json")
    is_hf = "text_config" in raw
    config = _config_from_hf(raw) if is_hf else LlavaLlamaConfig.from_dict(raw)
    if vision_tower is not None:
        config.mm_vision_tower = str(vision_tower)
    tensors = dict(_read_tensors(directory, _FROM_HF if is_hf else _FROM_ORIGINAL))
    inside = any(name.startswith(_TOWER) for name in tensors)
    if inside and config.mm_vision_config is None and config.mm_vision_tower is not None:
        # The directory gives the sizes; the weights come from the checkpoint.
        config.mm_vision_config = read_tower_config(config.mm_vision_tower).to_dict()
    model = LlavaLlamaForCausalLM(config)
    tower = model.get_vision_tower()
    if tower is not None and inside:
        tower.load_model()
    _fill(model, tensors, directory)
    if tower is not None:
        tower.load_model()
    nn.Module.to(model, dtype)
    return cast(LlavaLlamaForCausalLM, model.eval())


def save_hf(model: LlavaLlamaForCausalLM, directory: str | Path) -> None:
    """Write the published llava-hf layout (``language_model.model.…``), one safetensors file and config.json.

    Raises:
        CheckpointError: no ``image_token_id`` on the config, a projector other than mlp2x_gelu, or no tower.

    """
    config, tower = model.config, model.get_vision_tower()
    if tower is None or config.mm_projector_type != "mlp2x_gelu" or config.image_token_id is None:
        raise CheckpointError(
            "llava-hf layout: want a tower, mm_projector_type 'mlp2x_gelu' and image_token_id, got "
            f"{'a tower' if tower is not None else 'none'}, {config.mm_projector_type!r}, {config.image_token_id}; "
            "set them on the config, or use save_original"
        )
    text = {name: value for name, value in config.to_dict().items() if name in LlamaConfig().to_dict()}
    text |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    hf = HfLlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text,
        image_token_index=config.image_token_id,
        image_seq_length=tower.num_patches + (tower.select_feature == "cls_patch"),
        projector_hidden_act="gelu",
        vision_feature_layer=tower.select_layer,
        vision_feature_select_strategy=_STRATEGY[tower.select_feature],
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )
    _write(directory, hf, {_renamed(name, _TO_HF): tensor for name, tensor in _canonical_state(model).items()})


def save_original(model: LlavaLlamaForCausalLM, directory: str | Path) -> None:
    """Write the original layout (``model.layers.…``) with the tower inside, one safetensors file and config.json."""
    tower = model.get_vision_tower()
    if tower is not None:
        model.config.mm_vision_config = tower.config.to_dict()
    state = {name.replace(_TOWER, _TOWER + "vision_model."): t for name, t in _canonical_state(model).items()}
    _write(directory, model.config, state)


def _config_from_hf(raw: dict[str, Any]) -> LlavaLlamaConfig:
    text, vision = raw["text_config"], raw["vision_config"]
    for field, found, wanted in (
        ("model_type", raw["model_type"], "llava"),
        ("text_config.model_type", text["model_type"], "llama"),
        ("vision_config.model_type", vision["model_type"], "clip_vision_model"),
        ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), "gelu"),
        ("multimodal_projector_bias", raw.get("multimodal_projector_bias", True), True),
    ):
        if found != wanted:
            raise CheckpointError(f"config.json, {field}: want {wanted!r}, got {found!r}; the reference has no other")
    layer = raw.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(f"config.json, vision_feature_layer: want one layer, got {layer!r}")
    skipped = ("model_type", "architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
    return LlavaLlamaConfig(
        **{name: value for name, value in text.items() if name not in (*skipped, "tie_word_embeddings")},
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)),
        mm_vision_config={name: value for name, value in vision.items() if name not in skipped},
        mm_hidden_size=CLIPVisionConfig(**vision).hidden_size,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=layer,
        mm_vision_select_feature=_SELECT[raw.get("vision_feature_select_strategy", "default")],
        use_mm_proj=True,
        image_token_id=raw.get("image_token_index", raw.get("image_token_id")),
    )


def _canonical_state(model: LlavaLlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Give the model's tensors without the ``vision_model.`` that only some transformers versions have."""
    state = {_renamed(name, _FROM_ORIGINAL): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tensor for name, tensor in state.items() if not name.endswith(_BUFFERS)}


def _fill(model: LlavaLlamaForCausalLM, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    wanted = _canonical_state(model)
    if model.config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    missing, left_over = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or left_over:
        raise CheckpointError(
            f"checkpoint {directory}: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(left_over)} left over {left_over[:3]}; its files and its config.json do not belong together"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"checkpoint {directory}, tensor {name!r}: want shape {list(parameter.shape)} as config.json "
                    f"says, got {list(tensors[name].shape)}"
                )
            parameter.copy_(tensors[name])


def _read_tensors(directory: Path, table: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, torch.Tensor]]:
    index = directory / "model.safetensors.index.json"
    shards = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for shard in shards:
        if not (directory / shard).is_file():
            raise CheckpointError(f"checkpoint {directory}: want {shard}, found none; fetch the files again")
        with safe_open(directory / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if not name.endswith(_BUFFERS):
                    yield _renamed(name, table), file.get_tensor(name)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for prefix, replacement in table:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: want JSON in {path}: {error}") from error
    return content


def _write(directory: str | Path, config: Any, tensors: dict[str, torch.Tensor]) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    path = Path(directory) / "model.safetensors"
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
