"""A Llama decoder of any shape as a GGUF file, its weights drawn: matrices in Q4_0, the output layer in Q8_0.

    python drawn_gguf.py OUT.gguf '{"layers": 22, "hidden": 2048, …}'

Prints the bytes of weights that a decode step reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from decoder_shape import Shape
from processes import RESULT

BLOCK = 32
STEP = 0.0045  # with values of -7 to 7: the deviation of a trained layer's weights
POOL = 1 << 16
"""Blocks that are drawn; a matrix takes them over and over, from another one on each."""


@dataclass(frozen=True)
class Tensor:
    """One to write; ``kind`` F32 is a norm's weight, of ones."""

    name: str
    rows: int
    columns: int
    kind: gguf.GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a matrix."""
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return self.columns // per_block * block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.rows * self.row_bytes

    def data(self, pools: dict[gguf.GGMLQuantizationType, np.ndarray], seed: int) -> np.ndarray:
        """Its bytes, uint8 ``[rows, row_bytes]``; float32 ``[columns]`` of a norm."""
        if self.kind == gguf.GGMLQuantizationType.F32:
            return np.ones(self.columns, np.float32)
        blocks = np.roll(pools[self.kind], seed * 977, axis=0)
        return np.resize(blocks, (self.rows, self.row_bytes))


def tensors(shape: Shape) -> Iterator[Tensor]:
    """In the file's order, by llama.cpp's names."""
    q4, q8, f32 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_0", "Q8_0", "F32"))
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    yield Tensor("token_embd.weight", shape.vocabulary, hidden, q4)
    for layer in range(shape.layers):
        at = f"blk.{layer}"
        yield Tensor(f"{at}.attn_norm.weight", 1, hidden, f32)
        yield Tensor(f"{at}.attn_q.weight", hidden, hidden, q4)
        yield Tensor(f"{at}.attn_k.weight", kv, hidden, q4)
        yield Tensor(f"{at}.attn_v.weight", kv, hidden, q4)
        yield Tensor(f"{at}.attn_output.weight", hidden, hidden, q4)
        yield Tensor(f"{at}.ffn_norm.weight", 1, hidden, f32)
        yield Tensor(f"{at}.ffn_gate.weight", shape.intermediate, hidden, q4)
        yield Tensor(f"{at}.ffn_up.weight", shape.intermediate, hidden, q4)
        yield Tensor(f"{at}.ffn_down.weight", hidden, shape.intermediate, q4)
    yield Tensor("output_norm.weight", 1, hidden, f32)
    yield Tensor("output.weight", shape.vocabulary, hidden, q8)


def draw_pools() -> dict[gguf.GGMLQuantizationType, np.ndarray]:
    """Blocks of both formats: a float16 scale, then 32 values, uint8 ``[POOL, bytes]``."""
    rng = np.random.default_rng(0)
    scale = np.frombuffer(np.float16(STEP).tobytes(), np.uint8)
    scales = np.broadcast_to(scale, (POOL, 2))
    low, high = rng.integers(1, 16, (2, POOL, BLOCK // 2), np.uint8)  # 8 stands for 0
    eights = rng.integers(-7, 8, (POOL, BLOCK), np.int8).view(np.uint8)
    kinds = gguf.GGMLQuantizationType
    return {
        kinds.Q4_0: np.concatenate([scales, low | (high << 4)], axis=1),
        kinds.Q8_0: np.concatenate([scales, eights], axis=1),
    }


def write(output: Path, shape: Shape) -> int:
    """Write the file; bytes of weights that a step reads: all but the embedding table."""
    writer = gguf.GGUFWriter(str(output), "llama")
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    every, pools = list(tensors(shape)), draw_pools()
    for one in every:
        is_norm = one.kind == gguf.GGMLQuantizationType.F32
        size = (one.columns,) if is_norm else (one.rows, one.row_bytes)
        writer.add_tensor_info(one.name, size, np.dtype(np.float32 if is_norm else np.uint8), one.nbytes, one.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for seed, one in enumerate(every):
        writer.write_tensor_data(one.data(pools, seed))
    writer.close()
    return sum(one.nbytes for one in every[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("shape", help="fields of Shape, JSON")
    given = parser.parse_args()
    size = write(given.output, Shape(**json.loads(given.shape)))
    print(RESULT + json.dumps({"weight_bytes": size}))


if __name__ == "__main__":
    main()
