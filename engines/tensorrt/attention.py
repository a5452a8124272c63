"""Attention without a fused kernel: let TensorRT take it apart.

A parsed ``Attention`` is one layer, and TensorRT has fused kernels for it in halves only, where the heads' size is a
multiple of 8 from 16 to 256. (By building with TensorRT for RTX 1.7.1.116: twenty sizes from 8 to 512 for compute
capability 8.9 or 8.0 with 12.0, four of them for 7.5, 8.6 and 12.1 too, with a mask and without.) Any other it refuses,
unless the layer says that it may be made of single operators. Layers with a kernel are left as they are: were one of
them to lose its kernel, the build is to fail, and not to become slow.
"""

from __future__ import annotations

from typing import Any

_HALVES = ("HALF", "BF16")
_STEP, _SMALLEST, _LARGEST = 8, 16, 256  # of a head
_HEAD_AXIS = 3  # of [batch, heads, seq, head_dim]


def has_kernel(dtype: str, head_dim: int) -> bool:
    """Whether attention of heads of this size is fused; ``dtype`` is TensorRT's name of it."""
    return dtype in _HALVES and _SMALLEST <= head_dim <= _LARGEST and head_dim % _STEP == 0


def allow_decomposition(api: Any, network: Any) -> int:
    """Mark attentions that have no kernel as ones that may be taken apart; how many there are.

    Args:
        api: TensorRT's module.
        network: an ``INetworkDefinition``, parsed.
    """
    marked = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name != "ATTENTION_INPUT":
            continue
        queries = layer.get_input(0)
        if not has_kernel(queries.dtype.name, queries.shape[_HEAD_AXIS]):
            layer.__class__ = api.IAttentionInputLayer  # get_layer gives the base class
            layer.attention.decomposable = True
            marked += 1
    return marked
