"""Llama decoder configs, as transformers writes them (``models/llama/configuration_llama.py``)."""

from __future__ import annotations

from typing import Literal, cast

from llava_deploy.exporter.config import Activation, DecoderConfig, RopeConfig
from llava_deploy.exporter.layouts.fields import Fields

MODEL_TYPE = "llama"
_DEFAULT_THETA = 10_000.0

# Far beyond any model; what a damaged config says would not fit into memory.
MOST_LAYERS = 1024
_MOST_POSITIONS = 1 << 24

# transformers' names (activations.py) that mean the same function as one of ours.
_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "silu": "silu",
    "swish": "silu",
}

_NAMES_WITHOUT_EFFECT = """
    _attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path architectures
    attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_factor initializer_range is_decoder label2id length_penalty max_length
    max_sequence_length min_length name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type projection_dim remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
NO_EFFECT = frozenset(_NAMES_WITHOUT_EFFECT.split())
"""Keys of any transformers config that say nothing about what a forward pass computes at inference: where the files
came from, initialisation, dropout, training and generation settings. Special token ids are read by the chat recipe."""

_NO_QUANTISED = "a part with a packing of its own is not read: take the unquantised one"


def activation(fields: Fields, key: str, default: Activation) -> Activation:
    """An activation function by transformers' name.

    Raises:
        CheckpointError: a name that the graphs do not have.
    """
    name = fields.get(key, str, default)
    if name not in _ACTIVATIONS:
        raise fields.error(key, f"want one of {', '.join(_ACTIVATIONS)}", "this version has no other activation")
    return _ACTIVATIONS[name]


def epsilon(fields: Fields, key: str, default: float) -> float:
    """What a norm adds before its root.

    Raises:
        CheckpointError: a negative number.
    """
    value = fields.get(key, float, default)
    if value < 0:
        raise fields.error(key, "want 0 or more", "correct the file")
    return value


def refuse_unsupported(fields: Fields) -> None:
    """Refuse, by name, what any transformers config can say and the graphs cannot honour."""
    fields.only("quantization_config", (), _NO_QUANTISED)
    fields.only("pruned_heads", ({},), "models with pruned heads are not supported")
    fields.only("add_cross_attention", (False,), "cross attention is not supported")
    fields.only("is_encoder_decoder", (False,), "encoder-decoder models are not supported")
    fields.only("per_layer_config", ({}, []), "models whose layers differ are not supported")


def decoder_config(fields: Fields, tie_word_embeddings: bool) -> DecoderConfig:
    """The decoder that a Llama config describes; absent fields have ``LlamaConfig``'s defaults.

    Raises:
        CheckpointError: a field of the wrong type, or one that cannot be honoured, by name.
    """
    refuse_unsupported(fields)
    fields.peek("tie_word_embeddings")  # the caller knows where else it may stand
    fields.only("sliding_window", (), "sliding-window attention is not supported")
    fields.only("use_sliding_window", (False,), "sliding-window attention is not supported")
    if any(kind != "full_attention" for kind in fields.get("layer_types", list, [])):
        raise fields.error("layer_types", "want only 'full_attention'", "other attention layers are not supported")
    hidden, heads = fields.positive("hidden_size", 4096), fields.positive("num_attention_heads", 32)
    kv_heads = fields.positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"want a divisor of num_attention_heads {heads}", "correct the file")
    if not fields.has("head_dim") and hidden % heads:
        raise fields.error("hidden_size", f"want a multiple of {heads} heads, or head_dim", "correct the file")
    head_dim = fields.positive("head_dim", max(1, hidden // heads))
    if head_dim % 2:
        raise fields.error("head_dim", "want an even number, to be rotated in pairs", "correct the file")
    longest = fields.positive("max_position_embeddings", 2048, _MOST_POSITIONS)
    return DecoderConfig(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=fields.positive("intermediate_size", 11008),
        num_hidden_layers=fields.positive("num_hidden_layers", 32, MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.positive("vocab_size", 32000),
        max_position_embeddings=longest,
        hidden_act=activation(fields, "hidden_act", "silu"),
        rms_norm_eps=epsilon(fields, "rms_norm_eps", 1e-6),
        rope=_rope(fields, longest),
        attention_bias=fields.get("attention_bias", bool, False),
        mlp_bias=fields.get("mlp_bias", bool, False),
        tie_word_embeddings=tie_word_embeddings,
    )


def _rope(fields: Fields, longest: int) -> RopeConfig:
    """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (4).

    Where both stand, the order is transformers' (``convert_rope_params_to_dict``): a ``rope_scaling`` that says
    something replaces ``rope_parameters``; a ``rope_theta`` inside the object wins over one beside it.
    """
    fields.only("partial_rotary_factor", (1, 1.0), "partly rotated heads are not supported")
    beside = fields.number("rope_theta", _DEFAULT_THETA, above=0)
    original = fields.optional("original_max_position_embeddings", int)
    if original is not None:
        fields.positive("original_max_position_embeddings", longest)
    old, new = fields.get("rope_scaling", dict, {}), fields.get("rope_parameters", dict, {})
    key = "rope_scaling" if old else "rope_parameters"
    rope = Fields(old or new, fields.where, f"{fields.prefix}{key}.")
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind not in ("default", "linear", "llama3"):
        name = "rope_type" if rope.has("rope_type") else "type"
        raise rope.error(name, "want 'default', 'linear' or 'llama3'", "other rotary embeddings are not supported")
    rope.only("partial_rotary_factor", (1, 1.0), "partly rotated heads are not supported")
    theta = rope.number("rope_theta", beside, above=0)
    factor = low = high = None
    if kind != "default":
        rope.require("factor", float)
        factor = rope.number("factor", 1.0, above=0)
    if kind == "llama3":
        rope.require("low_freq_factor", float)
        rope.require("high_freq_factor", float)
        low = rope.number("low_freq_factor", 1.0, above=0)
        high = rope.number("high_freq_factor", 4.0, above=low)
        inside = rope.positive("original_max_position_embeddings", longest)
        original = inside if original is None else original
    if strange := rope.unused(("factor", "original_max_position_embeddings")):
        last = strange[0].rpartition(".")[2]
        raise rope.error(last, f"want no such field in a rope of type {kind!r}", "it cannot be honoured")
    return RopeConfig(
        rope_type=cast(Literal["default", "linear", "llama3"], kind),
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original if kind == "llama3" else None,
    )
