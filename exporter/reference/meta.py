"""LLaVA's two mixins: a decoder gains a tower with a projector, and a causal LM takes pictures.

Source: LLaVA v1.1, ``llava/model/llava_arch.py``. Names and signatures are the original's, so that its training code
and ours meet the same classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, CLIPVisionConfig

from llava_deploy.engines.errors import CheckpointError, PromptError
from llava_deploy.exporter.reference.projector import build_vision_projector
from llava_deploy.exporter.reference.splice import SpliceOptions, features_per_image, splice
from llava_deploy.exporter.reference.token_rows import (
    add_patch_token,
    add_start_end_tokens,
    load_start_end_rows,
    read_adapter,
)
from llava_deploy.exporter.reference.vision_tower import CLIPVisionTower, build_vision_tower

Prepared = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Any, torch.Tensor | None, torch.Tensor | None
]


class LlavaMetaModel:
    """Mixed in before a decoder (``class LlavaLlamaModel(LlavaMetaModel, LlamaModel)``)."""

    config: Any
    vision_tower: CLIPVisionTower | list[CLIPVisionTower]
    mm_projector: nn.Module

    def __init__(self, config: Any) -> None:
        """Build the decoder and, if the config names a tower, the tower without its weights and the projector."""
        super().__init__(config)  # type: ignore[call-arg]
        names_tower = getattr(config, "mm_vision_tower", None) is not None
        if names_tower or getattr(config, "mm_vision_config", None) is not None:
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """Give the tower, out of the list that hides it from FSDP if need be; None if there is none."""
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower

    def initialize_vision_modules(self, model_args: Any, fsdp: Sequence[str] | None = None) -> None:
        """Make the tower and the projector ready for training and note them on the config.

        Args:
            model_args: ``vision_tower`` (a directory or a CLIP vision config), ``mm_vision_select_layer``,
                ``mm_vision_select_feature``, ``pretrain_mm_mlp_adapter`` (a file of ``torch.save`` or None) and, if
                not ``"linear"``, ``mm_projector_type``.
            fsdp: FSDP options; if there are any, the tower is held in a list, out of the sharded module's reach.

        Raises:
            CheckpointError: no tower there, unknown projector, or an adapter that does not fit.

        """
        tower = self.get_vision_tower()
        if tower is None:
            tower = build_vision_tower(model_args)
        else:
            tower.load_model()
            # The original leaves these as the config had them and then writes other ones on the config.
            tower.select_layer = model_args.mm_vision_select_layer
            tower.select_feature = model_args.mm_vision_select_feature
            if fsdp and not isinstance(self.vision_tower, list):
                # A registered child module cannot be overwritten by a list.
                del self.vision_tower
        self.vision_tower = [tower] if fsdp else tower

        source = model_args.vision_tower
        if isinstance(source, CLIPVisionConfig):
            self.config.mm_vision_config = source.to_dict()
        else:
            self.config.mm_vision_tower = None if source is None else str(source)
        self.config.use_mm_proj = True
        self.config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        self.config.mm_hidden_size = tower.hidden_size
        self.config.mm_vision_select_layer = model_args.mm_vision_select_layer
        self.config.mm_vision_select_feature = model_args.mm_vision_select_feature

        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(self.config)
        else:
            # LoRA freezes every parameter that is not its own.
            self.mm_projector.requires_grad_(True)
        if model_args.pretrain_mm_mlp_adapter is not None:
            _load_projector(self.mm_projector, model_args.pretrain_mm_mlp_adapter)


class LlavaMetaForCausalLM(ABC):
    """Mixed in after a causal LM; what it needs of it is ``config`` and the embedding accessors."""

    config: Any

    @abstractmethod
    def get_model(self) -> Any:
        """Give the decoder, a :class:`LlavaMetaModel` with ``embed_tokens``."""

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """Give the decoder's tower, None if it has none."""
        tower: CLIPVisionTower | None = self.get_model().get_vision_tower()
        return tower

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels ``[images, 3, height, width]`` to the decoder's width, ``[images, patches, hidden]``."""
        features: torch.Tensor = self.get_model().mm_projector(self.get_model().get_vision_tower()(images))
        return features

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        labels: torch.Tensor | None,
        images: torch.Tensor | Sequence[torch.Tensor] | None,
    ) -> Prepared:
        """Put the pictures' features in the place of their tokens.

        Args:
            input_ids: ``[batch, seq]`` int, IMAGE_TOKEN_INDEX for each picture.
            position_ids: ``[batch, seq]`` int or None.
            attention_mask: ``[batch, seq]`` of any dtype or None.
            past_key_values: a transformers cache, or the tuple of (key, value) pairs of old; passed through.
            labels: ``[batch, seq]`` int or None.
            images: see :func:`~llava_deploy.exporter.reference.splice.features_per_image`.

        Returns:
            ``(None, position_ids, attention_mask, past_key_values, inputs_embeds, labels)``, or, where there is
            nothing to splice, the arguments with None for ``inputs_embeds``.

        Raises:
            NotImplementedError: the adapter is being tuned with start and end tokens.
            PromptError: more pictures wanted than given (a ValueError).

        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            if self.get_vision_tower() is not None and images is not None and past_key_values is not None:
                attention_mask, position_ids = _extend(attention_mask, input_ids, past_key_values)
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        if getattr(self.config, "tune_mm_mlp_adapter", False) and getattr(self.config, "mm_use_im_start_end", False):
            raise NotImplementedError(
                "tune_mm_mlp_adapter with mm_use_im_start_end: what trains around the pictures is not defined; "
                "set one of the two to false in the config"
            )
        spliced = splice(
            input_ids,
            position_ids,
            attention_mask,
            labels,
            features_per_image(images, self.encode_images),
            embed=self.get_model().embed_tokens,
            options=self.splice_options(),
        )
        return (
            None,
            spliced.position_ids,
            spliced.attention_mask,
            past_key_values,
            spliced.inputs_embeds,
            spliced.labels,
        )

    def splice_options(self) -> SpliceOptions:
        """Read the length limit and the padding side from the config."""
        return SpliceOptions(
            model_max_length=getattr(self.config, "tokenizer_model_max_length", None),
            padding_side=getattr(self.config, "tokenizer_padding_side", "right"),
        )

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Add the picture tokens to the tokenizer and their rows to the embeddings.

        Args:
            model_args: ``mm_use_im_patch_token``, ``mm_use_im_start_end``, ``tune_mm_mlp_adapter`` (bools) and
                ``pretrain_mm_mlp_adapter`` (a file of ``torch.save`` with ``model.embed_tokens.weight``, or None).
            tokenizer: a transformers tokenizer.

        Raises:
            CheckpointError: the pretrained rows have neither of the two accepted shapes (a ValueError).

        """
        if model_args.mm_use_im_patch_token:
            add_patch_token(self, tokenizer)
        if model_args.mm_use_im_start_end:
            num_new = add_start_end_tokens(self, tokenizer)
            if model_args.tune_mm_mlp_adapter:
                self._train_embeddings(inputs=True, outputs=False)
            if model_args.pretrain_mm_mlp_adapter:
                load_start_end_rows(self, model_args.pretrain_mm_mlp_adapter, num_new)
        elif model_args.mm_use_im_patch_token and model_args.tune_mm_mlp_adapter:
            self._train_embeddings(inputs=False, outputs=False)

    def _train_embeddings(self, *, inputs: bool, outputs: bool) -> None:
        self.get_input_embeddings().requires_grad_(inputs)  # type: ignore[attr-defined]
        self.get_output_embeddings().requires_grad_(outputs)  # type: ignore[attr-defined]


def _extend(
    attention_mask: torch.Tensor | None, input_ids: torch.Tensor, past_key_values: Any
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Extend the mask with ones over the past and the new token; the new token's position is its sum - 1."""
    if isinstance(past_key_values, Cache):
        total = int(past_key_values.get_seq_length()) + 1
    else:
        total = int(past_key_values[-1][-1].shape[-2]) + 1
    if attention_mask is None:
        return None, torch.full_like(input_ids, total - 1, dtype=torch.long)
    if attention_mask.shape[1] > total:
        raise PromptError(
            f"attention_mask: want at most {total} columns (the past and one token), got {attention_mask.shape[1]}; "
            "pass the mask of the tokens so far"
        )
    ones = attention_mask.new_ones(len(attention_mask), total - attention_mask.shape[1])
    attention_mask = torch.cat([attention_mask, ones], dim=1)  # [batch, past + 1]
    return attention_mask, attention_mask.long().sum(dim=1, keepdim=True) - 1


def _load_projector(projector: nn.Module, path: str) -> None:
    weights = {name.split("mm_projector.")[1]: t for name, t in read_adapter(path).items() if "mm_projector." in name}
    wanted = projector.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        want = list(wanted[name].shape) if name in wanted else None
        got = list(weights[name].shape) if name in weights else None
        if want != got:
            raise CheckpointError(
                f"projector tensor {name!r} in {path}: want shape {want}, got {got} (None: not there); "
                "give the adapter that was trained for this mm_projector_type and these widths"
            )
    projector.load_state_dict(weights)
