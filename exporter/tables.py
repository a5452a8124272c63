"""What ``inspect`` found, as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llava_deploy.runtime.terminal import facts, picture_steps, prompt_form, size


def checkpoint_table(description: Mapping[str, Any]) -> Table:
    """What :func:`llava_deploy.exporter.inspect_report.describe` says of a checkpoint."""
    config, tensors = description["config"], description["tensors"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in tensors["dtypes"].items())
    files = [f"{file['path']} ({size(file['bytes'])})" for file in description["files"]]
    rules = Counter(description["left_out"].values())
    limit = config["tokenizer_model_max_length"]
    return facts(
        f"Checkpoint {description['directory']}",
        [
            ("layout", description["layout"]),
            ("vision", _vision(config)),
            ("projector", f"{config['projector']['kind']}, {' > '.join(map(str, config['projector']['sizes']))}"),
            ("decoder", _decoder(config["decoder"])),
            ("rope", _rope(config["decoder"]["rope"])),
            (
                "context",
                f"{config['decoder']['max_position_embeddings']} tokens, {config['image_features']} a picture"
                + ("" if limit is None else f"; prompts up to {limit}"),
            ),
            ("pictures", picture_steps(description["image"])),
            ("prompts", prompt_form(description["chat"])),
            ("tensors", f"{tensors['count']} ({dtypes}), {tensors['parameters']:,} parameters"),
            ("quantised", _quantised(description["quantized"])),
            ("files", "\n".join(files)),
            ("left out", "\n".join(f"{count}: {rule}" for rule, count in rules.items()) if rules else "nothing"),
            ("unused keys", ", ".join(description["unused_keys"]) if description["unused_keys"] else "none"),
        ],
    )


def _quantised(quantised: Mapping[str, Any]) -> str:
    lines = [f"{count} weights: {form}" for form, count in Counter(quantised["weights"].values()).items()]
    dense = len(quantised["dense"])
    if dense:
        lines.append(
            f"{dense} linear layer{'s' if dense > 1 else ''} of the decoder {'are' if dense > 1 else 'is'} dense"
        )
    return "\n".join(lines) if lines else "nothing"


def _vision(config: Mapping[str, Any]) -> str:
    vision = config["vision"]
    layers = ", ".join(map(str, config["feature_layers"]))
    return (
        f"{vision['model_type']}, {vision['num_hidden_layers']} layers of {vision['hidden_size']}, "
        f"{vision['num_attention_heads']} heads, {vision['image_size']} px in patches of {vision['patch_size']}, "
        f"{vision['hidden_act']}; features of layer {layers} ({config['feature_select']})"
    )


def _decoder(decoder: Mapping[str, Any]) -> str:
    flags = ("attention_bias", "mlp_bias", "tie_word_embeddings")
    return ", ".join(
        [
            f"{decoder['model_type']}, {decoder['num_hidden_layers']} layers of {decoder['hidden_size']}",
            f"{decoder['num_attention_heads']} heads of {decoder['head_dim']}",
            f"{decoder['num_key_value_heads']} of keys and values",
            f"MLP {decoder['intermediate_size']} ({decoder['hidden_act']})",
            f"vocabulary {decoder['vocab_size']}",
            *(flag for flag in flags if decoder[flag]),
        ]
    )


def _rope(rope: Mapping[str, Any]) -> str:
    values = [f"{key} {value:g}" for key, value in rope.items() if key != "rope_type" and value is not None]
    return ", ".join([rope["rope_type"], *values])
