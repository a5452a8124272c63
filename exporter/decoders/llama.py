"""The Llama decoder over a cache that is written in place (transformers, ``models/llama/modeling_llama.py``)."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import nn

from llava_deploy.engines.contract import hidden_state_name
from llava_deploy.exporter.blocks import Linear, OpBuilder, RMSNorm, activation, merge_heads, split_heads
from llava_deploy.exporter.config import DecoderConfig
from llava_deploy.exporter.decoders.interface import Cache, StepInputs
from llava_deploy.exporter.rope import rope_tables


@dataclass(frozen=True)
class Step:
    """What every layer of one call shares."""

    inputs: StepInputs
    total: ir.Value  # [1]
    cos: ir.Value  # [positions, head_dim / 2]
    sin: ir.Value  # [positions, head_dim / 2]


class SelfAttention(nn.Module):
    """Grouped-query attention; new keys and values are scattered into the cache, and the mask says what is seen."""

    def __init__(self, config: DecoderConfig, dtype: ir.DataType) -> None:
        super().__init__()
        size, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, head_dim
        self.q_proj = Linear(size, self.heads * head_dim, bias, dtype)
        self.k_proj = Linear(size, self.kv_heads * head_dim, bias, dtype)
        self.v_proj = Linear(size, self.kv_heads * head_dim, bias, dtype)
        self.o_proj = Linear(self.heads * head_dim, size, bias, dtype)

    def forward(self, op: OpBuilder, x: ir.Value, past: Cache, step: Step) -> tuple[ir.Value, Cache]:
        q = split_heads(op, self.q_proj(op, x), self.heads, self.head_dim)  # [batch, heads, seq, head_dim]
        k = split_heads(op, self.k_proj(op, x), self.kv_heads, self.head_dim)
        v = split_heads(op, self.v_proj(op, x), self.kv_heads, self.head_dim)
        q = op.RotaryEmbedding(q, step.cos, step.sin, step.inputs.position_ids)
        k = op.RotaryEmbedding(k, step.cos, step.sin, step.inputs.position_ids)
        present = Cache(
            key=op.TensorScatter(past.key, k, step.inputs.write_indices, axis=-2, mode="linear"),
            value=op.TensorScatter(past.value, v, step.inputs.write_indices, axis=-2, mode="linear"),
        )
        # Only the slots that the mask covers are read, so the cost follows the context and not the buffer.
        keys = op.Slice(present.key, [0], step.total, [2])  # [batch, kv_heads, total, head_dim]
        values = op.Slice(present.value, [0], step.total, [2])
        y = op.Attention(q, keys, values, step.inputs.attention_mask)  # [batch, heads, seq, head_dim]
        return self.o_proj(op, merge_heads(op, y, self.heads * self.head_dim)), present


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: DecoderConfig, dtype: ir.DataType) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(size, inner, bias, dtype)
        self.up_proj = Linear(size, inner, bias, dtype)
        self.down_proj = Linear(inner, size, bias, dtype)
        self.hidden_act, self.dtype = config.hidden_act, dtype

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        gate = activation(op, self.hidden_act, self.gate_proj(op, x), self.dtype)
        return self.down_proj(op, op.Mul(gate, self.up_proj(op, x)))


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, dtype)
        self.mlp = MLP(config, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, op: OpBuilder, x: ir.Value, past: Cache, step: Step) -> tuple[ir.Value, Cache]:
        y, present = self.self_attn(op, self.input_layernorm(op, x), past, step)
        x = op.Add(x, y)
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x))), present


class Decoder(nn.Module):
    """Layers and final norm; the token embedding is looked up outside the graph.

    With tied embeddings the table is the output layer, and the result is logits.
    """

    def __init__(self, config: DecoderConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        tied = config.tie_word_embeddings
        self.embed_tokens = Linear(config.hidden_size, config.vocab_size, False, dtype) if tied else None
        self.config, self.dtype = config, dtype

    def forward(self, op: OpBuilder, inputs: StepInputs, past: list[Cache]) -> tuple[ir.Value, list[Cache]]:
        c = self.config
        tables = rope_tables(c.rope, c.head_dim, c.max_position_embeddings)
        cos, sin = (
            op.initializer(ir.tensor(table.astype(self.dtype.numpy())), name=name)
            for name, table in zip(("cos", "sin"), tables, strict=True)
        )
        step = Step(inputs, op.Shape(inputs.attention_mask, start=3, end=4), cos, sin)
        x, present = inputs.inputs_embeds, []
        for index, layer in enumerate(self.layers):
            x, cache = layer(op, x, past[index], step)
            x.name = hidden_state_name(index + 1)
            present.append(cache)
        last = op.GatherND(x, op.Unsqueeze(inputs.last_index, [1]), batch_dims=1)  # [batch, hidden]
        last = self.norm(op, last)
        return (last if self.embed_tokens is None else self.embed_tokens(op, last)), present
