"""The repetition penalty sees the prompt that transformers sees, pictures included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.runtime import Llava, SamplingOptions
from llava_deploy.runtime.sampling import penalise

PROMPT = "What is <image> this?"
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 40, 3), np.uint8))
PENALTY = 1.4
HEAD = "language_model.lm_head.weight"


def prompt_ids(directory: Path, patches: int, prompt: str = PROMPT) -> torch.Tensor:
    """As LlavaProcessor makes them: the placeholder stands once for each feature row."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return tokenizer(prompt.replace("<image>", "<image>" * patches), return_tensors="pt").input_ids


def generated(directory: Path, patches: int, penalty: float, count: int) -> tuple[int, ...]:
    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    pixels = CLIPImageProcessor.from_pretrained(directory)(PICTURE, return_tensors="pt")["pixel_values"]
    ids = prompt_ids(directory, patches)
    found = model.generate(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        max_new_tokens=count, repetition_penalty=penalty,
    )  # fmt: skip
    return tuple(found[0, ids.shape[1] :].tolist())


def test_the_placeholder_counts_as_seen(make_llava: Any, edit_tensors: Any, tmp_path: Path) -> None:
    """A model that would answer with the placeholder, if the penalty did not keep it from it."""
    directory = make_llava().directory
    patches = open_checkpoint(directory).config.vision.patches
    (best,) = generated(directory, patches, 1.0, 1)
    placeholder = open_checkpoint(directory).config.image_token_id

    def prefer(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD][placeholder] = 1.05 * tensors[HEAD][best]

    edit_tensors(directory / "model.safetensors", prefer)
    assert generated(directory, patches, 1.0, 1) == (placeholder,)
    checkpoint = open_checkpoint(directory)
    export(checkpoint, tmp_path / "bundle", "fp32")
    llava = Llava.load(tmp_path / "bundle", threads=1)
    assert llava.generate([PROMPT], [[PICTURE]], max_new_tokens=1)[0].token_ids == (placeholder,)
    sampling = SamplingOptions(repetition_penalty=PENALTY)
    answer = llava.generate([PROMPT], [[PICTURE]], max_new_tokens=24, sampling=sampling)[0]
    assert answer.token_ids == generated(directory, patches, PENALTY, 24)
    assert answer.token_ids[0] != placeholder


@pytest.mark.parametrize("prompt", [PROMPT, "<image><image>", "no picture"])
def test_scores_as_transformers_penalises_them(make_llava: Any, tmp_path: Path, prompt: str) -> None:
    directory = make_llava().directory
    export(open_checkpoint(directory), tmp_path / "bundle", "fp32")
    llava = Llava.load(tmp_path / "bundle", threads=1)
    manifest = llava.manifest
    batch = llava.encoder.encode([prompt], [[PICTURE] * prompt.count("<image>")], llava.max_len)
    logits = np.random.default_rng(4).standard_normal(manifest.decoder.vocab_size).astype(np.float32)
    ids = prompt_ids(directory, manifest.vision.patches, prompt)
    wanted = RepetitionPenaltyLogitsProcessor(PENALTY)(ids, torch.from_numpy(logits[None]))[0].numpy()
    penalise(logits, np.unique(batch.seen_ids[0]), PENALTY)
    np.testing.assert_allclose(logits, wanted, rtol=1e-6)
