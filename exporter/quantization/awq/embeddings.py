"""Calibration samples to what the decoder reads: token embeddings with the pictures' features spliced in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS
from llava_deploy.exporter.quantization.awq.calibration import CalibrationSample
from llava_deploy.exporter.reference.torch_model import TorchVision, load_vision
from llava_deploy.runtime.splice import SpliceOptions, splice


@torch.inference_mode()
def embed_samples(
    checkpoint: Checkpoint, samples: Sequence[CalibrationSample], max_tokens: int, device: torch.device
) -> list[torch.Tensor]:
    """Each sample's decoder input, float32 ``[seq, hidden]`` on the CPU, cut to ``max_tokens``.

    The vision tower is in memory only where a sample has pictures, and no longer than this takes.
    """
    vision = load_vision(checkpoint) if any(len(sample.pixels) for sample in samples) else None
    if vision is not None:
        vision.tower.to(device)
        vision.projector.to(device)
    table = checkpoint.tensors[EMBED_TOKENS].read()  # [vocab, hidden]
    options = SpliceOptions(model_max_length=max_tokens)

    def embed(ids: np.ndarray) -> np.ndarray:
        return np.asarray(table[ids], np.float32)

    embedded = []
    for sample in samples:
        # In the splice, a row of text uses up one picture's place: give it one that is empty.
        features = _features(vision, sample.pixels, device) or [np.zeros((0, table.shape[1]), np.float32)]
        spliced = splice(sample.ids[None], None, None, None, features, embed=embed, options=options)
        embedded.append(torch.from_numpy(spliced.inputs_embeds[0].copy()))
    return embedded


def _features(vision: TorchVision | None, pixels: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """One ``[patches, hidden]`` for each picture, one picture at a time."""
    if vision is None:
        return []
    return [vision.features(torch.from_numpy(picture)[None].to(device))[0].cpu().numpy() for picture in pixels]
