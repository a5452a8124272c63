"""Configs of the llava-hf layout: what transformers makes of them, and what is refused by name."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import LlavaConfig as HfLlavaConfig

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.layouts import llava_hf
from llava_deploy.exporter.layouts.fields import Fields

# config.json of the published llava-1.5-7b-hf: most fields of the decoder are left to the class.
PUBLISHED = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def parse(values: dict[str, Any]) -> Any:
    return llava_hf.parse(Fields(values, "config.json"))


def assert_as_transformers(values: dict[str, Any]) -> None:
    ours, theirs = parse(values), HfLlavaConfig.from_dict(values)
    text, vision = theirs.text_config, theirs.vision_config
    for name in (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
        "max_position_embeddings hidden_act rms_norm_eps attention_bias mlp_bias"
    ).split():
        assert getattr(ours.decoder, name) == getattr(text, name), name
    for name in (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size num_channels "
        "hidden_act layer_norm_eps"
    ).split():
        assert getattr(ours.vision, name) == getattr(vision, name), name
    rope = {name: value for name, value in vars(ours.decoder.rope).items() if name != "theta" and value is not None}
    theirs_rope = {name: value for name, value in text.rope_parameters.items() if name != "type"}
    assert {**rope, "rope_theta": ours.decoder.rope.theta} == theirs_rope
    assert ours.decoder.tie_word_embeddings == theirs.tie_word_embeddings
    layers = theirs.vision_feature_layer
    assert ours.feature_layers == (tuple(layers) if isinstance(layers, list) else (layers,))
    assert ours.feature_select == {"default": "patch", "full": "cls_patch"}[theirs.vision_feature_select_strategy]
    assert ours.image_token_id == theirs.image_token_id
    hidden = text.hidden_size
    assert ours.projector.sizes == (vision.hidden_size * len(ours.feature_layers), hidden, hidden)
    assert (ours.projector.bias, ours.projector.hidden_act) == (
        theirs.multimodal_projector_bias,
        theirs.projector_hidden_act,
    )


def test_published() -> None:
    assert_as_transformers(PUBLISHED)
    fields = Fields(PUBLISHED, "config.json")
    llava_hf.parse(fields)
    assert fields.unused(llava_hf.NO_EFFECT) == ()


@pytest.mark.parametrize("seed", range(40))
def test_random_configs(seed: int) -> None:
    """Each field is there or not, in transformers 4's form or 5's; absent ones have transformers' defaults."""
    rng = random.Random(seed)

    def some(values: dict[str, list[Any]]) -> dict[str, Any]:
        return {name: rng.choice(choices) for name, choices in values.items() if rng.random() < 0.6}

    theta = {"rope_theta": rng.choice([10000.0, 500000, 250.5])} if rng.random() < 0.6 else {}
    kinds = [
        {},
        {"factor": 2.0, rng.choice(["type", "rope_type"]): "linear"},
        {"rope_type": "default"},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ]
    kind = rng.choice(kinds)
    new = rng.random() < 0.5
    rope = {"rope_parameters": {**kind, **theta}} if new else {"rope_scaling": kind or None, **theta}
    heads = rng.choice([2, 4])
    text = {
        "num_attention_heads": heads,
        "hidden_size": heads * 16,
        **some(
            {
                "model_type": ["llama"],
                "head_dim": [8, 24, None],
                "num_key_value_heads": [1, 2, None],
                "intermediate_size": [40],
                "num_hidden_layers": [1, 3],
                "vocab_size": [32100, 40000],
                "max_position_embeddings": [128, 4096],
                "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh"],
                "rms_norm_eps": [1e-5],
                "attention_bias": [True, False],
                "mlp_bias": [True, False],
                "tie_word_embeddings": [True, False],
                "pretraining_tp": [2],
            }
        ),
        **rope,
    }
    if text.get("vocab_size") is None:
        text["vocab_size"] = 32100
    vision = some(
        {
            "model_type": ["clip_vision_model"],
            "hidden_size": [24, 768],
            "num_hidden_layers": [3, 5],
            "image_size": [60, 224],
            "patch_size": [7, 14],
            "hidden_act": ["quick_gelu", "gelu"],
            "layer_norm_eps": [1e-6],
            "intermediate_size": [40],
        }
    )
    top = some(
        {
            "image_token_index": [7, 32001],
            "image_token_id": [9],
            "projector_hidden_act": ["gelu", "gelu_pytorch_tanh"],
            "vision_feature_select_strategy": ["default", "full"],
            "vision_feature_layer": [-1, 2, [-2, 1], [0]],
            "multimodal_projector_bias": [True, False],
            "tie_word_embeddings": [True, False],
        }
    )
    assert_as_transformers({"model_type": "llava", "vision_config": vision, "text_config": text, **top})


def test_rope_scaling_wins_over_rope_parameters() -> None:
    """As transformers, where both generations' fields stand in one file."""
    text = {
        "rope_theta": 77.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
    }
    assert_as_transformers({**PUBLISHED, "text_config": {**PUBLISHED["text_config"], **text}})  # type: ignore[dict-item]


REFUSED = [
    ("model_type", "llava_next"),
    ("vision_config", None),
    ("text_config", None),
    ("vision_feature_layer", "last"),
    ("vision_feature_layer", []),
    ("vision_feature_layer", 25),
    ("vision_feature_layer", -26),
    ("vision_feature_select_strategy", "cls"),
    ("image_token_index", 32064),
    ("projector_hidden_act", "relu"),
    ("multimodal_projector_bias", "yes"),
    ("quantization_config", {"quant_method": "awq"}),
    ("text_config.model_type", "qwen2"),
    ("text_config.hidden_size", 0),
    ("text_config.hidden_size", 4097),
    ("text_config.hidden_size", "4096"),
    ("text_config.hidden_size", True),
    ("text_config.rms_norm_eps", float("nan")),
    ("text_config.head_dim", 31),
    ("text_config.num_key_value_heads", 5),
    ("text_config.hidden_act", "relu2"),
    ("text_config.sliding_window", 4096),
    ("text_config.layer_types", ["sliding_attention"]),
    ("text_config.partial_rotary_factor", 0.5),
    ("text_config.pruned_heads", {"0": [1]}),
    ("text_config.quantization_config", {"bits": 4}),
    ("text_config.add_cross_attention", True),
    ("text_config.attention_bias", 1),
    ("vision_config.model_type", "siglip_vision_model"),
    ("vision_config.num_channels", 4),
    ("vision_config.image_size", [336, 224]),
    ("vision_config.patch_size", 400),
    ("vision_config.hidden_size", 1001),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda part: str(part)[:30])
def test_refused_by_name(key: str, value: Any) -> None:
    *path, last = key.split(".")
    values = {**PUBLISHED, **({path[0]: {**PUBLISHED[path[0]]}} if path else {})}  # type: ignore[dict-item]
    (values[path[0]] if path else values)[last] = value  # type: ignore[index]
    with pytest.raises(CheckpointError) as error:
        parse(values)
    assert f"{key}: want" in str(error.value)
    assert "found" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "proportional", "su"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_ropes_are_refused_by_name(kind: str, key: str) -> None:
    for name in ("type", "rope_type"):
        text = {**PUBLISHED["text_config"], key: {name: kind, "factor": 2.0}}  # type: ignore[dict-item]
        with pytest.raises(CheckpointError, match=rf"text_config\.{key}\.{name}: .*'{kind}'"):
            parse({**PUBLISHED, "text_config": text})


@pytest.mark.parametrize(
    ("rope", "name"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "attention_factor": 0.5}, "attention_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"rope_type": "default", "mrope_section": [1, 2, 3]}, "mrope_section"),
    ],
)
def test_rope_fields_are_complete_and_known(rope: dict[str, Any], name: str) -> None:
    text = {**PUBLISHED["text_config"], "rope_parameters": rope}  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=rf"rope_parameters\.{name}"):
        parse({**PUBLISHED, "text_config": text})


def test_unknown_keys_are_told() -> None:
    text = {**PUBLISHED["text_config"], "novel_gate": 3, "novel_nothing": None}  # type: ignore[dict-item]
    fields = Fields({**PUBLISHED, "text_config": text, "novel_flag": True, "novel_off": False}, "config.json")
    llava_hf.parse(fields)
    assert fields.unused(llava_hf.NO_EFFECT) == ("novel_flag", "text_config.novel_gate")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("multi_modal_projector.linear_1.weight", "projector.0.weight"),
        ("model.multi_modal_projector.linear_2.bias", "projector.1.bias"),
        ("multi_modal_projector.linear_3.bias", None),
        ("image_newline", None),
        ("model.layers.0.mlp.up_proj.weight", None),
    ],
)
def test_names(key: str, name: str | None) -> None:
    assert llava_hf.canonical_name(key) == name
