"""The tower and projector of a llava-hf checkpoint as the file that llama.cpp's libmtmd reads.

    python clip_gguf.py CHECKPOINT OUT.gguf

Matrices are float16, vectors float32; what no image feature depends on is left out.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

# The checkpoint's names, without "vision_tower.vision_model." and the like, and libmtmd's.
NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
    "linear_1.weight": "mm.0.weight",
    "linear_1.bias": "mm.0.bias",
    "linear_2.weight": "mm.2.weight",
    "linear_2.bias": "mm.2.bias",
}
PARTS = {
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
HALVES = ("vision_tower.vision_model.", "multi_modal_projector.")


def target_name(name: str, layers: int) -> str | None:
    """libmtmd's name; ``None`` of what no feature depends on: later layers, the last norm, the decoder."""
    half = next((half for half in HALVES if name.startswith(half)), None)
    if half is None:
        return None
    short = name.removeprefix(half)
    layer = LAYER.fullmatch(short)
    if layer is None:
        return NAMES.get(short)
    index, part, kind = layer.groups()
    return f"v.blk.{index}.{PARTS[part]}.{kind}" if int(index) < layers else None


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], pixels: dict[str, Any], layers: int) -> None:
    vision = config["vision_config"]
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", vision["hidden_act"] == "gelu")  # else quick_gelu
    for key, value in {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embedding_length": vision["hidden_size"],
        "feed_forward_length": vision["intermediate_size"],
        "projection_dim": config["text_config"]["hidden_size"],
        "block_count": layers,
        "attention.head_count": vision["num_attention_heads"],
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_array("clip.vision.image_mean", pixels["image_mean"])
    writer.add_array("clip.vision.image_std", pixels["image_std"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    config, pixels = (
        json.loads((given.checkpoint / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "preprocessor_config")
    )
    # hidden_states[-1] is the last layer's output, so feature layer -2 needs all layers but one.
    layers = config["vision_config"]["num_hidden_layers"] + 1 + config["vision_feature_layer"]
    writer = gguf.GGUFWriter(str(given.output), "clip")
    describe(writer, config, pixels, layers)
    for name, value in load_file(given.checkpoint / "model.safetensors").items():
        target = target_name(name, layers)
        if target is not None:
            is_matrix = value.ndim > 1 and "position" not in target
            writer.add_tensor(target, value.astype(np.float16 if is_matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
