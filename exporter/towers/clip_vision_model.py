"""CLIP's vision transformer up to the feature layer (transformers, ``models/clip/modeling_clip.py``)."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import nn

from llava_deploy.engines.contract import hidden_state_name
from llava_deploy.exporter.blocks import LayerNorm, Linear, OpBuilder, activation, merge_heads, split_heads
from llava_deploy.exporter.config import VisionConfig


class Embeddings(nn.Module):
    """Patch convolution, class token and position embedding."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter([size], dtype)
        self.patch_embedding = PatchEmbedding(config, dtype)
        self.position_embedding = PositionEmbedding(config.patches + 1, size, dtype)
        self.size, self.patch = size, patch

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        patches = self.patch_embedding(op, pixel_values)  # [images, hidden, rows, columns]
        patches = op.Transpose(op.Reshape(patches, [0, 0, -1]), perm=[0, 2, 1])  # [images, patches, hidden]
        images = op.Shape(pixel_values, start=0, end=1)
        class_token = op.Expand(op.Reshape(self.class_embedding, [1, 1, self.size]), op.Concat(images, [1, 1], axis=0))
        return self.position_embedding(op, op.Concat(class_token, patches, axis=1))


class PatchEmbedding(nn.Module):
    """One convolution whose stride is its kernel."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.weight = nn.Parameter([config.hidden_size, config.num_channels, self.patch, self.patch], dtype)

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        return op.Conv(pixel_values, self.weight, kernel_shape=[self.patch] * 2, strides=[self.patch] * 2)


class PositionEmbedding(nn.Module):
    """A learned vector for each position."""

    def __init__(self, positions: int, size: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([positions, size], dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.Add(x, self.weight)


class SelfAttention(nn.Module):
    """Every token sees every token."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.size, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj = Linear(self.size, self.size, True, dtype)
        self.k_proj = Linear(self.size, self.size, True, dtype)
        self.v_proj = Linear(self.size, self.size, True, dtype)
        self.out_proj = Linear(self.size, self.size, True, dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        q, k, v = (
            split_heads(op, proj(op, x), self.heads, self.size // self.heads)  # [images, heads, tokens, head_dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(op, merge_heads(op, op.Attention(q, k, v), self.size))


class MLP(nn.Module):
    """Two linears around an activation."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, True, dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, True, dtype)
        self.hidden_act, self.dtype = config.hidden_act, dtype

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.fc2(op, activation(op, self.hidden_act, self.fc1(op, x), self.dtype))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, dtype)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.mlp = MLP(config, dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.layer_norm1(op, x)))
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x)))


class Encoder(nn.Module):
    """The layers that the features need, and no more."""

    def __init__(self, config: VisionConfig, layers: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config, dtype) for _ in range(layers)])

    def forward(self, op: OpBuilder, x: ir.Value) -> list[ir.Value]:
        states = [x]
        for layer in self.layers:
            states.append(layer(op, states[-1]))
        for index, state in enumerate(states):
            state.name = hidden_state_name(index)
        return states


class VisionTower(nn.Module):
    """Pixels to the hidden states that ``feature_layers`` name, side by side on the feature axis.

    ``feature_layers`` are non-negative indices into the hidden states: 0 is the first layer's input, after the
    pre-layernorm; the last layer's output is taken before the post-layernorm, as transformers' ``hidden_states`` is.
    """

    def __init__(self, config: VisionConfig, feature_layers: tuple[int, ...], dtype: ir.DataType) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, dtype)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.encoder = Encoder(config, max(feature_layers), dtype)
        self.feature_layers = feature_layers

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        states = self.encoder(op, self.pre_layrnorm(op, self.embeddings(op, pixel_values)))
        features = [states[index] for index in self.feature_layers]  # each [images, 1 + patches, hidden]
        return features[0] if len(features) == 1 else op.Concat(*features, axis=-1)
