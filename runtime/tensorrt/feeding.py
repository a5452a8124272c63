"""What both kinds of decoder do with their engine and a step's inputs: refuse what does not fit, place what does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_deploy.engines.contract import DecoderShape
from llava_deploy.engines.errors import ContractError, OptionError
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt_recipe import EngineLimits
from llava_deploy.runtime.backend import Placement
from llava_deploy.runtime.tensorrt.buffers import Arrays, Fields
from llava_deploy.runtime.tensorrt.cuda import Device
from llava_deploy.runtime.tensorrt.engine import Engine
from llava_deploy.runtime.tensorrt.vision import TensorRtFeatures


def require_fit(engine: Engine, cache: CacheForm, max_len: int) -> EngineLimits:
    """What an engine was built for, once it is known to keep its cache so, and to have ``max_len`` slots.

    Raises:
        ContractError: it keeps its cache in another way.
        OptionError: of ``max_len``: it has fewer slots.
    """
    limits = engine.recipe.limits
    if engine.recipe.cache != cache:
        raise ContractError(f"{engine.name}: want an engine whose cache is {cache!r}, found {engine.recipe.cache!r}")
    if not 1 <= max_len <= limits.max_len:
        raise OptionError("max_len", f"want 1 to {limits.max_len}, what the engine was built for, got {max_len}")
    return limits


def require_batch(batch: int, limits: EngineLimits) -> None:
    """Refuse more rows than the engine was built for.

    Raises:
        OptionError: so it is.
    """
    if not 1 <= batch <= limits.max_batch:
        raise OptionError(
            "batch",
            f"want 1 to {limits.max_batch} prompts at once, what the engine was built for, got {batch}; ask fewer at "
            f"once, or build an engine for more with: llava-deploy build --max-batch {batch}",
        )


def check_step(inputs_embeds: np.ndarray, batch: int, shape: DecoderShape, max_seq: int) -> None:
    """Hold a step's embeddings against what the decoder takes.

    Raises:
        ContractError: another batch, hidden size or dtype, or more tokens than the engine takes at once.
    """
    want = np.dtype(shape.dtype)
    found = inputs_embeds.shape
    fits = (found[0], found[2], inputs_embeds.dtype) == (batch, shape.hidden_size, want)
    if not fits or not 1 <= found[1] <= max_seq:
        raise ContractError(
            f"inputs_embeds: want {want}[{batch}, 1 to {max_seq}, {shape.hidden_size}], got "
            f"{inputs_embeds.dtype}{list(found)}"
        )


def step_fields(shape: DecoderShape, batch: int, seq: int, total: int) -> Fields:
    """Inputs of a step that every decoder has; ``total`` is what the mask covers."""
    int64 = np.dtype(np.int64)
    return {
        "inputs_embeds": ((batch, seq, shape.hidden_size), np.dtype(shape.dtype)),
        "position_ids": ((batch, seq), int64),
        "attention_mask": ((batch, 1, seq, total), np.dtype(np.bool_)),
        "last_index": ((batch,), int64),
    }


def place_pictures(device: Device, arrays: Arrays, pictures: Sequence[Placement]) -> None:
    """Queue the copy of the inputs to the GPU, and of the pictures' features into ``inputs_embeds`` there.

    Features that are not TensorRT's, or of another dtype, go the long way, over the host.
    """
    embeds = arrays.host["inputs_embeds"]  # [batch, seq, hidden]
    copies = []
    for one in pictures:
        features = one.features
        if isinstance(features, TensorRtFeatures) and features.dtype == embeds.dtype:
            to = arrays.addresses["inputs_embeds"] + (one.row * embeds.shape[1] + one.at) * features.row_size
            copies.append((to, features.address + one.first * features.row_size, one.count * features.row_size))
        else:
            embeds[one.row, one.at : one.at + one.count] = features.numpy()[one.first : one.first + one.count]
    arrays.upload()
    for copy in copies:
        device.copy(*copy)
