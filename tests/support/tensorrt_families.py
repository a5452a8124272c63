"""Kinds of model that the tests of TensorRT go through; their conftest makes a bundle of each."""

KINDS = [
    "llava-1.5",
    "grouped heads, wide head_dim",
    "one key head, tied embeddings",
    "all biases, linear rope",
    "llama3 rope, gelu decoder",
    "two feature layers, cls kept",
    "first feature layer, gelu tower",
    "patches do not fill the picture",
    "linear projector",
    "mlp3x_gelu projector",
    "identity projector",
]
