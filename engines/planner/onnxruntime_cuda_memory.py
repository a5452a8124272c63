"""Peak memory of ONNX Runtime's CUDA provider: of building its engine, and of running it.

A build takes neither GPU nor ONNX Runtime; its constants are fitted to measured peaks
(``benchmarks/results/planner_peaks.json``). Of a run, the weights, the cache and the values between layers follow from
the graphs' shapes; what the provider takes beside is :data:`PROVIDER`. That and what the host has are fitted to runs of
7B's shape on an H100 with ONNX Runtime 1.31.1 (``benchmarks/results/gpu/``: ``gpu_check_h100.json``, int4 and fp16, and
``bench_h100_7b_int4.json``); docs/planning.md says how near they are.
"""

from __future__ import annotations

from llava_deploy.engines.names import FEATURES_KEPT
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import TABLES, GraphWeights, PlannedModel, Sizes
from llava_deploy.engines.planner.onnx_header import TensorSize

_MB = 10**6
_LOGIT = 4  # bytes of a float32
_HALF = 2  # bytes of a float16, in which everything else is

PROVIDER = 290 * _MB
"""What CUDA's provider takes of the device beside what is counted here: the kernels that are loaded, cuBLAS's and
cuDNN's workspaces, recorded CUDA graphs, and what each tensor has up to the next 2 MiB, which CUDA gives it.

Of three runs 186 to 286 MB were left for it, so none took more than is planned.
``benchmarks/gpu_check/planned_memory.py`` says what is left of others.
"""

CONTEXT = 500 * _MB
"""Assumed for an empty CUDA context; what is measured on a GPU begins where there is one already."""

_ARENA = 2.0
"""How much an arena has of what is in use at once: it gives nothing back, and prompts of other lengths want blocks of
other sizes. Assumed; what it is wrong by is in :data:`PROVIDER`."""

_HOST_LOADING, _HOST_RUNNING = 420 * _MB, 900 * _MB
"""Anonymous memory of Python, the libraries and CUDA's bookkeeping, while the sessions are opened and later."""

_COPIES_LOADING, _COPIES_KEPT = 1.07, 0.5
"""How often quantised matrices are in anonymous memory then: all of them at first, as they are turned to the layout of
their products before they go to the GPU; half of that stays, why is not known. Floats go from their file."""

_HOST_LIBRARIES = 370 * _MB
"""Of CUDA's libraries that are mapped in the end. A weight is mapped while it goes to the GPU, before most of them."""

_BUILD = Part("process", "host", 72 * _MB)
_BUILD_LIBRARIES = Part("process", "mapped", 25 * _MB)
_FUSED_COPIES = 2
"""How often a weight that is put together is in memory: from the bundle's, and as the bytes that are written."""

_IMAGES = 4
"""Pictures that the runtime encodes at once."""

_FUSED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Projections that read the same values, by the first of them: quantised, they become one product."""

_WIDTHS = {"int4": 5, "floats": 3}
"""Rows of the intermediate size that a token of a prompt has in the widest place of a layer, beside two of the hidden
size: gate, up and their product; of quantised layers the product of both before it is split too."""


def cuda_build_memory(model: PlannedModel) -> Memory:
    """Peak of ``llava-deploy build --backend onnxruntime-cuda``: of the largest weight that is written.

    Quantised layers that read the same values are put together, a weight at a time. Other files of weights are the
    bundle's under a second name: nothing of them is read into memory.
    """
    if not model.decoder_weights.quantized:
        return Memory((_BUILD, _BUILD_LIBRARIES))
    products = _products(model.decoder_weights)
    fused = max((sum(t.nbytes for t in product) for product in products if len(product) > 1), default=0)
    mapped = max(model.decoder_weights.largest, _tied(model))
    written = Part("weights", "host", _FUSED_COPIES * fused)
    return Memory((written, _BUILD, Part("weights", "mapped", mapped), _BUILD_LIBRARIES))


def cuda_engine_bytes(model: PlannedModel) -> int:
    """Of an engine on the disk, beside the bundle: a decoder of quantised layers is written anew.

    All else are hard links; a file system without them has copies.
    """
    return model.decoder_bytes if model.decoder_weights.quantized else 0


def cuda_run_memory(model: PlannedModel, sizes: Sizes) -> Memory:
    """Peak of a run that fills its cache, which has all rows from the beginning.

    The host's is that of loading or of what comes after. So where host and GPU share their memory and loading takes
    more, the sum is too large, by at most what the GPU has beside the weights.
    """
    products = _products(model.decoder_weights)
    device = (
        Part("weights", "device", model.vision_weights.nbytes + model.decoder_bytes),
        Part("KV cache", "device", _cache(model, sizes)),
        Part("activations", "device", int(_ARENA * (_prefill(model, sizes) + _tower(model, sizes)))),
        Part("workspace", "device", _HALF * max((sum(t.values for t in product) for product in products), default=0)),
        Part("process", "device", CONTEXT + PROVIDER),
    )
    largest = max(model.vision_weights.largest, model.decoder_weights.largest, _tied(model))
    mapped = (
        Part("weights", "mapped", max(0, largest - _HOST_LIBRARIES)),
        Part("process", "mapped", _HOST_LIBRARIES),
    )
    phases = _loading(model), _running(model, sizes)
    return Memory((*device, *max(phases, key=lambda parts: sum(part.nbytes for part in parts)), *mapped))


def cuda_decode_bytes(model: PlannedModel, batch: int, slots: int) -> int:
    """Bytes that a decode step has to read: the decoder's weights as the bundle has them, and ``slots`` of each row."""
    tables = sum(t.nbytes for t in model.decoder_weights.tensors if t.name.endswith(TABLES))
    return model.decoder_bytes - tables + batch * slots * model.cache_bytes_per_slot


def _loading(model: PlannedModel) -> tuple[Part, ...]:
    """Anonymous memory of the host while the sessions are opened."""
    return (
        Part("weights", "host", int(_COPIES_LOADING * model.decoder_weights.quantized_bytes)),
        Part("process", "host", _HOST_LOADING),
    )


def _running(model: PlannedModel, sizes: Sizes) -> tuple[Part, ...]:
    """The same while prompts are answered."""
    return (
        Part("weights", "host", int(_COPIES_KEPT * model.decoder_weights.quantized_bytes)),
        Part("activations", "host", _piece(model, sizes) + _LOGIT * sizes.max_batch * model.decoder.vocab_size),
        Part("image features", "host", FEATURES_KEPT * model.features_bytes),
        Part("process", "host", _HOST_RUNNING),
    )


def _tied(model: PlannedModel) -> int:
    return model.embedding_bytes if model.is_tied else 0


def _products(weights: GraphWeights) -> list[list[TensorSize]]:
    """Quantised matrices of the layers, those together that become one."""
    groups: dict[str, list[TensorSize]] = {}
    for tensor in weights.quantized:
        if tensor.name.startswith("language_model.layers."):
            key = ".".join(_FUSED.get(word, word) for word in tensor.name.split("."))
            groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def _prefill(model: PlannedModel, sizes: Sizes) -> int:
    """Of the longest piece of a prompt; rows are read one by one, and attention has its scores by blocks."""
    form = "int4" if model.decoder_weights.quantized else "floats"
    row = 2 * model.decoder.hidden_size + _WIDTHS[form] * model.intermediate_size
    return sizes.max_seq * row * _HALF + _piece(model, sizes)


def _piece(model: PlannedModel, sizes: Sizes) -> int:
    """Embeddings of a piece of one row."""
    return sizes.max_seq * model.decoder.hidden_size * _HALF


def _cache(model: PlannedModel, sizes: Sizes) -> int:
    """Its bytes, as sessions allocate what is asked for, and the logits: of all rows, and of the one being read.

    Smaller caches of a process that asked for fewer rows before are not counted, and stay.
    """
    logits = _LOGIT * (sizes.max_batch + 1) * model.decoder.vocab_size
    return sizes.max_batch * sizes.max_len * model.cache_bytes_per_slot + logits


def _tower(model: PlannedModel, sizes: Sizes) -> int:
    """Of as many pictures as are encoded at once, the scores of one layer's attention as float32 among them."""
    hidden, inner = model.tower_sizes
    seen = model.vision.patches + 1
    rows = 2 * seen * (hidden + inner) * _HALF
    return min(sizes.max_images, _IMAGES) * (rows + 4 * model.tower_heads * seen * seen)
