"""LLaVA over transformers' Llama (LLaVA, ``llava/model/language_model/llava_llama.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.exporter.reference.meta import LlavaMetaForCausalLM, LlavaMetaModel
from llava_deploy.exporter.reference.splice import SpliceOptions, features_per_image, splice


class LlavaLlamaConfig(LlamaConfig):
    """A Llama config with the original's fields for the tower, the projector and the splice."""

    model_type = "llava_llama"

    mm_vision_tower: str | None = None
    """Directory of the tower; None with ``mm_vision_config`` None means no tower."""
    mm_vision_config: dict[str, Any] | None = None
    """CLIP vision config of a tower whose weights are inside the checkpoint (not in the original)."""
    mm_hidden_size: int | None = None
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    use_mm_proj: bool = False
    tune_mm_mlp_adapter: bool = False
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    tokenizer_model_max_length: int | None = None
    tokenizer_padding_side: str = "right"
    image_token_id: int | None = None
    """The vocabulary's id for a picture, as the llava-hf layout needs it (not in the original)."""


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """The decoder with its tower and projector."""

    config_class = LlavaLlamaConfig


class LlavaLlamaForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
    """The whole model: token ids with -200 for each picture, and pixels, to logits and loss."""

    config_class = LlavaLlamaConfig
    model: LlavaLlamaModel

    def __init__(self, config: LlavaLlamaConfig) -> None:
        """Build the model with random weights; the tower stays without weights until ``load_model``."""
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaLlamaModel:
        """Give the decoder."""
        return self.model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        images: torch.Tensor | Sequence[torch.Tensor] | None = None,
        **options: Any,  # transformers' own: logits_to_keep, output_hidden_states, …
    ) -> CausalLMOutputWithPast:
        """Splice the pictures in (unless ``inputs_embeds`` is given) and run the decoder.

        Shapes as in :meth:`prepare_inputs_labels_for_multimodal`. Logits are ``[batch, spliced seq, vocab]``; the
        loss is the mean over labels other than IGNORE_INDEX, shifted by one.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("want input_ids or inputs_embeds, got neither; pass one of them")
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images
                )
            )
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **options,
        )
        return cast(CausalLMOutputWithPast, outputs)

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the interface is the original's, not transformers'
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | Sequence[torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,  # transformers' own: max_new_tokens, do_sample, …
    ) -> torch.Tensor:
        """Continue each row; gives the new tokens only, ``[batch, new tokens]``.

        Rows may differ in length and be padded on either side: they are spliced with the padding on the left,
        whatever the config says, because generation goes on at the right end.

        Raises:
            PromptError: more pictures wanted than given.

        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embed = self.get_input_embeddings()
        if images is None or self.get_vision_tower() is None:
            # Nothing is spliced or cut, but padding is moved. A row of text uses up one image's place: an empty one.
            nothing = embed.weight.new_zeros(0, embed.weight.shape[1])
            features = [nothing] * len(input_ids) if not (input_ids == IMAGE_TOKEN_INDEX).any() else []
            splicing = SpliceOptions(None, "left")
        else:
            features = features_per_image(images, self.encode_images)
            splicing = SpliceOptions(self.splice_options().model_max_length, "left")
        spliced = splice(input_ids, None, attention_mask, None, features, embed=embed, options=splicing)
        tokens = super().generate(  # type: ignore[misc]  # transformers' protocol for `self` is wider than it needs
            inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, **options
        )
        return cast(torch.Tensor, tokens)
