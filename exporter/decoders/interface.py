"""What every decoder takes and gives, as the graph's contract names it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class StepInputs:
    """The graph's inputs beside the cache; the names are the contract's."""

    inputs_embeds: ir.Value  # [batch, seq, hidden]
    position_ids: ir.Value  # [batch, seq]
    write_indices: ir.Value  # [batch]
    attention_mask: ir.Value  # [batch, 1, seq, total]
    last_index: ir.Value  # [batch]


@dataclass(frozen=True)
class Cache:
    """One layer's keys and values, each ``[batch, kv_heads, max_len, head_dim]``."""

    key: ir.Value
    value: ir.Value
