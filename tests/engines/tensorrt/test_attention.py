"""Attention that has no fused kernel is taken apart, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import tensorrt_rtx as trt

from llava_deploy.engines.tensorrt.attention import allow_decomposition, has_kernel

HEADS, LONGEST = 4, 64


class Quiet(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        """Refusals are what the tests are about."""


@pytest.fixture
def builder() -> Any:
    return trt.Builder(Quiet())


def attention(builder: Any, dtype: str, head_dim: int) -> Any:
    network = builder.create_network(0)
    shape = (-1, HEADS, -1, head_dim)
    tensors = [network.add_input(name, getattr(trt.DataType, dtype), shape) for name in ("q", "k", "v")]
    layer = network.add_attention(*tensors, trt.AttentionNormalizationOp.SOFTMAX, False)
    layer.mask = network.add_input("mask", trt.DataType.BOOL, (-1, 1, -1, -1))
    network.mark_output(layer.get_output(0))
    return network


def builds(builder: Any, network: Any, capability: str) -> bool:
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [[size if known == -1 else known for known in tensor.shape] for size in (1, 2, LONGEST)]
        profile.set_shape(tensor.name, *sizes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("capability", ["SM80", "SM120"])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("HALF", 8), ("HALF", 16), ("HALF", 20), ("HALF", 24), ("HALF", 128), ("HALF", 256), ("HALF", 264), ("FLOAT", 64)],
)
def test_the_rule_says_what_the_builder_does(builder: Any, dtype: str, head_dim: int, capability: str) -> None:
    assert builds(builder, attention(builder, dtype, head_dim), capability) == has_kernel(dtype, head_dim)


@pytest.mark.parametrize(("dtype", "head_dim"), [("HALF", 8), ("HALF", 264), ("FLOAT", 64)])
def test_what_has_no_kernel_builds_in_parts(builder: Any, dtype: str, head_dim: int) -> None:
    network = attention(builder, dtype, head_dim)
    assert allow_decomposition(trt, network) == 1
    assert builds(builder, network, "SM89")


def test_what_has_a_kernel_is_left_fused(builder: Any) -> None:
    network = attention(builder, "HALF", 64)
    assert allow_decomposition(trt, network) == 0
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    (layer,) = [each for each in layers if each.type == trt.LayerType.ATTENTION_INPUT]
    layer.__class__ = trt.IAttentionInputLayer
    assert not layer.attention.decomposable
