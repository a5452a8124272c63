"""The CLIP vision tower behind LLaVA's interface (LLaVA, ``multimodal_encoder/clip_encoder.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_deploy.engines.errors import CheckpointError

FeatureSelect = Literal["patch", "cls_patch"]


class CLIPVisionTower(nn.Module):
    """A CLIP vision model that gives the hidden states of one layer.

    The original stops all gradients through the tower; here it is frozen when loaded instead, so that
    ``requires_grad_(True)`` lets it train. Picture preprocessing is not held here: the runtime's recipe does it.
    """

    vision_tower: CLIPVisionModel

    def __init__(self, vision_tower: str | Path | CLIPVisionConfig, args: Any, *, delay_load: bool = False) -> None:
        """Read the tower's config, and its weights unless ``delay_load``.

        Args:
            vision_tower: a directory in transformers' layout (nothing is fetched), or a config, whose tower starts
                from random weights.
            args: has ``mm_vision_select_layer`` (index into the hidden states, 0 = embeddings) and, if not
                ``"patch"``, ``mm_vision_select_feature``.
            delay_load: leave the weights until :meth:`load_model`; only sizes are known till then.

        Raises:
            CheckpointError: ``vision_tower`` is no directory with a CLIP vision model, or the selection is unknown.

        """
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = None if isinstance(vision_tower, CLIPVisionConfig) else str(vision_tower)
        self.select_layer: int = args.mm_vision_select_layer
        select = getattr(args, "mm_vision_select_feature", "patch")
        if select not in ("patch", "cls_patch"):
            raise CheckpointError(
                f"mm_vision_select_feature: want 'patch' or 'cls_patch', got {select!r} in the config"
            )
        self.select_feature = cast(FeatureSelect, select)
        self._unloaded_config: CLIPVisionConfig = (
            vision_tower if isinstance(vision_tower, CLIPVisionConfig) else read_tower_config(vision_tower)
        )
        if not delay_load:
            self.load_model()

    def load_model(self) -> None:
        """Load (from the directory) or create (from the config) the weights, frozen. A second call changes nothing.

        Raises:
            CheckpointError: the directory's files leave some of the tower's tensors out.

        """
        if self.is_loaded:
            return
        if self.vision_tower_name is None:
            self.vision_tower = CLIPVisionModel(self._unloaded_config)
        else:
            self.vision_tower = _read_model(self.vision_tower_name)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Encode pixels ``[images, 3, height, width]`` to ``[images, patches (+ 1), mm_hidden_size]``, dtype kept.

        A list of ``[3, height, width]`` gives a list of ``[1, patches (+ 1), mm_hidden_size]``.
        """
        if isinstance(images, list):
            return [self._encode(image.unsqueeze(0)) for image in images]
        return self._encode(images)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        outputs = self.vision_tower(pixels.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
        features = outputs.hidden_states[self.select_layer]  # [images, 1 + patches, mm_hidden_size]
        if self.select_feature == "patch":
            features = features[:, 1:]
        return cast(torch.Tensor, features.to(pixels.dtype))

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config if self.is_loaded else self._unloaded_config

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_patches(self) -> int:
        return (cast(int, self.config.image_size) // cast(int, self.config.patch_size)) ** 2

    @property
    def dummy_feature(self) -> torch.Tensor:
        """One row of zeros, ``[1, mm_hidden_size]``."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


def build_vision_tower(args: Any, *, delay_load: bool = False) -> CLIPVisionTower:
    """Build the tower that a model config or training arguments name.

    ``mm_vision_config`` (a CLIP vision config as a mapping: the tower is inside the checkpoint) comes first, then the
    directory in ``mm_vision_tower`` or, in training arguments, ``vision_tower`` (which may be a config too).
    """
    inside = getattr(args, "mm_vision_config", None)
    if inside is not None:
        return CLIPVisionTower(CLIPVisionConfig(**inside), args, delay_load=delay_load)
    source = getattr(args, "mm_vision_tower", None)
    if source is None:
        source = getattr(args, "vision_tower", None)
    if source is None:
        raise CheckpointError("want a vision tower: mm_vision_tower, mm_vision_config or vision_tower; all are missing")
    return CLIPVisionTower(source, args, delay_load=delay_load)


def read_tower_config(directory: str | Path) -> CLIPVisionConfig:
    """Read the CLIP vision config in a directory (also out of a whole CLIP model's); nothing is fetched.

    Raises:
        CheckpointError: no config.json there.

    """
    if not (Path(directory) / "config.json").is_file():
        raise CheckpointError(
            f"vision tower: want a directory with config.json, found none at {str(directory)!r}; "
            "nothing is downloaded, so give the path of a local copy"
        )
    return CLIPVisionConfig.from_pretrained(directory, local_files_only=True)


def _read_model(directory: str) -> CLIPVisionModel:
    # transformers fills what a file lacks with random weights and only logs it.
    model, report = cast(
        tuple[CLIPVisionModel, dict[str, Any]],
        CLIPVisionModel.from_pretrained(directory, local_files_only=True, output_loading_info=True),
    )
    missing = sorted(name for name in report["missing_keys"] if not name.endswith("position_ids"))
    if missing:
        raise CheckpointError(
            f"vision tower {directory!r}: {len(missing)} tensors are missing, the first is {missing[0]!r}; "
            "fetch the files again"
        )
    return model
