"""The same shapes in transformers: how fast they are as people run them, eager and compiled, in fp16.

``generate`` with its default cache, and with a static cache, which has it compile each token's step with
``torch.compile`` (mode ``reduce-overhead``: CUDA graphs). A token's time is that of its arrival on the host, and every
figure that ``speed.py`` has too is of the same work, from the host to the host.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any, Literal

import numpy as np
import torch
import transformers
from device_memory import device_peak, host_peak
from names import ShapeName
from outcome import NotRunError
from shapes import config_of
from speed import ANSWER, FIRSTS, PREFILLED, bandwidth, median_ms
from transformers import (
    CLIPVisionConfig,
    CompileConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer

from llava_deploy.exporter.reference.torch_model import llama_config

Mode = Literal["eager", "compiled"]
IMAGE = 4  # a token's number


class _Arrivals(BaseStreamer):
    """When each token came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        value.cpu()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def measure(
    shape: ShapeName, mode: Mode, prompt_tokens: int, max_len: int, device: str, copy_gb_per_s: float | None
) -> dict[str, Any]:
    """A part: a LLaVA of random weights, made on the device, answers about pictures.

    Args:
        shape: of the model.
        mode: how its decoder's steps are run.
        prompt_tokens: of the prompt, the picture's among them, as many as the runtime has.
        max_len: slots of a static cache.
        device: PyTorch's name of it.
        copy_gb_per_s: what the GPU copies.
    """
    with device_peak() as peak:
        began = time.perf_counter()
        model = _model(shape, device)
        made = time.perf_counter()
        prompt = _Prompt(model, prompt_tokens, device)
        static = StaticCache(config=model.config.text_config, max_cache_len=max_len) if mode == "compiled" else None
        for seed in range(3):  # compilation is here, and its graphs' capture
            _answer(model, prompt, seed, static, min(8, max_len - prompt_tokens))
        warm = time.perf_counter()
    if mode == "compiled" and getattr(model, "_compiled_call", None) is None:
        raise NotRunError(f"transformers {transformers.__version__} compiles nothing on {device}")
    answers = [_answer(model, prompt, 10 + seed, static, 1) for seed in range(FIRSTS)]
    first = statistics.median(times[0] for times in answers)
    room = min(ANSWER, max_len - prompt_tokens)
    long = [_answer(model, prompt, 100 + seed, static, room) for seed in range(3)]
    rate = statistics.median((len(times) - 1) / (times[-1] - times[0]) for times in long)
    vision_ms = _vision_ms(model, prompt.pixels(200), device)
    prefilled = min(PREFILLED, max_len)
    prefill_ms = _prefill_ms(model, prefilled, static, device)
    text = model.config.text_config
    cache = 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * (prompt_tokens + room // 2)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - _not_read(model)
    return {
        "backend": f"transformers, {mode}, PyTorch {torch.__version__} on {device}",
        "made_s": round(made - began, 2),
        "warm_up_s": round(warm - made, 2),
        "device_peak_bytes": peak.device,
        "vision_ms": vision_ms,
        "prompt_tokens": prompt_tokens,
        "ttft_ms": round(first * 1e3, 3),
        "answer_tokens": [len(times) for times in long],
        "prefill_tokens": prefilled,
        "prefill_ms": prefill_ms,
        "decode_tokens_per_s": round(rate, 2),
        "host_peak_bytes": host_peak(),
        **bandwidth(weights + cache, rate, copy_gb_per_s),
    }


def _model(shape: ShapeName, device: str) -> LlavaForConditionalGeneration:
    config = config_of(shape)
    vision = {name: value for name, value in dataclasses.asdict(config.vision).items() if name != "model_type"}
    hf = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=llama_config(config.decoder),
        image_token_index=IMAGE,
        image_seq_length=config.image_features,
        vision_feature_layer=config.feature_layers[0],
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(hf)
    finally:
        torch.set_default_dtype(usual)
    return model.eval()


def _not_read(model: Any) -> int:
    """Bytes of weights that a token's step does not read: tower, projector and embeddings."""
    parts = (model.model.vision_tower, model.model.multi_modal_projector, model.get_input_embeddings())
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


class _Prompt:
    """Token ids with a picture's placeholders, and pixels on the host."""

    def __init__(self, model: Any, tokens: int, device: str) -> None:
        config = model.config
        patches, side = config.image_seq_length, config.vision_config.image_size
        text = torch.arange(tokens - patches) % 500 + 8
        self.ids = torch.cat([text[:1], torch.full((patches,), IMAGE), text[1:]])[None].to(device)
        self._size = (1, 3, side, side)

    def pixels(self, seed: int) -> torch.Tensor:
        drawn = np.random.default_rng(seed).standard_normal(self._size, np.float32)
        return torch.from_numpy(drawn).half()


def _vision_ms(model: Any, pixels: torch.Tensor, device: str) -> float:
    """One picture's pixels on the host to its features there."""

    def encode() -> None:
        found = model.model.get_image_features(pixel_values=pixels.to(device))
        features = getattr(found, "pooler_output", found)  # what it gives has changed between releases
        features = features if isinstance(features, torch.Tensor) else features[0]
        features.cpu()

    with torch.inference_mode():
        return median_ms(encode, 10)


def _prefill_ms(model: Any, tokens: int, static: StaticCache | None, device: str) -> float:
    """Embeddings on the host to the logits of the last one there; not compiled, as in ``generate``."""
    drawn = np.random.default_rng(3).standard_normal((1, tokens, model.config.text_config.hidden_size), np.float32)
    embeds = torch.from_numpy(drawn * 0.5).half()

    def prefill() -> None:
        if static is not None:
            static.reset()
        cache = DynamicCache(config=model.config.text_config) if static is None else static
        given = {"inputs_embeds": embeds.to(device), "attention_mask": torch.ones(1, tokens, device=device).long()}
        found = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.logits.float().cpu()

    with torch.inference_mode():
        return median_ms(prefill, 5)


def _answer(model: Any, prompt: _Prompt, seed: int, cache: StaticCache | None, tokens: int) -> list[float]:
    """Seconds from the call to each token of the answer."""
    pixels, arrivals = prompt.pixels(seed), _Arrivals()
    chosen: dict[str, Any] = {}
    if cache is not None:
        cache.reset()
        chosen = {"past_key_values": cache, "compile_config": CompileConfig(mode="reduce-overhead", fullgraph=False)}
    began = time.perf_counter()
    model.generate(
        input_ids=prompt.ids,
        pixel_values=pixels.to(prompt.ids.device),
        attention_mask=torch.ones_like(prompt.ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        streamer=arrivals,
        **chosen,
    )
    return [at - began for at in arrivals.times[1:]]
