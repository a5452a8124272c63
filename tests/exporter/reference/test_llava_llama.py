from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from llava_deploy.engines.errors import PromptError
from llava_deploy.exporter.reference import LlavaLlamaForCausalLM

MakeModel = Callable[..., LlavaLlamaForCausalLM]
IDS = torch.tensor([[1, 5, -200, 7, 8, 9], [1, -200, 4, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[-100, -100, -100, 7, 8, 9], [-100, -100, 4, 3, -100, -100]])


def test_loss_is_of_the_spliced_labels(make_model: MakeModel) -> None:
    model, images = make_model(), torch.randn(2, 3, 16, 16)
    out = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, images=images)
    assert out.logits.shape == (2, 9, 64)
    # Row 0 becomes 1 5 p p p p 7 8 9, row 1 becomes 1 p p p p 4 3 with two of padding; a logit predicts the next one.
    predicted = torch.cat([out.logits[0, 5:8], out.logits[1, 4:6]])
    want = functional.cross_entropy(predicted, torch.tensor([7, 8, 9, 4, 3]))
    torch.testing.assert_close(out.loss, want)


def test_training_steps_lower_the_loss_and_reach_all_parts(make_model: MakeModel) -> None:
    model = make_model().train()
    model.get_vision_tower().requires_grad_(True)  # type: ignore[union-attr]
    images = torch.randn(2, 3, 16, 16)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, images=images).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    untouched = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # The features are taken before the last of the three layers.
    assert untouched
    assert all("encoder.layers.2." in name or "post_layernorm" in name for name in untouched)


def test_text_only_training(make_model: MakeModel) -> None:
    ids = torch.tensor([[1, 5, 6, 7]])
    assert make_model()(input_ids=ids, labels=ids).loss.requires_grad


def test_inputs_embeds_are_taken_as_they_are(make_model: MakeModel) -> None:
    model, images = make_model(), torch.randn(2, 3, 16, 16)
    prepared = model.prepare_inputs_labels_for_multimodal(IDS, None, MASK, None, None, images)
    got = model(inputs_embeds=prepared[4], attention_mask=prepared[2]).logits
    torch.testing.assert_close(got, model(input_ids=IDS, attention_mask=MASK, images=images).logits)


def test_neither_ids_nor_embeddings(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        make_model()(images=torch.zeros(1, 3, 16, 16))


def greedy(model: LlavaLlamaForCausalLM, ids: torch.Tensor, images: torch.Tensor | None, steps: int) -> list[int]:
    """Continue one row without a cache, a whole pass for each token."""
    new: list[int] = []
    for _ in range(steps):
        logits = model(input_ids=torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1), images=images).logits
        new.append(int(logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_whole_passes_row_by_row(make_model: MakeModel, side: str) -> None:
    model, images = make_model(tokenizer_padding_side=side), torch.randn(2, 3, 16, 16)
    got = model.generate(IDS, images=images, attention_mask=MASK, max_new_tokens=10, do_sample=False)
    want = [greedy(model, IDS[:1], images[:1], 10), greedy(model, IDS[1:, :4], images[1:], 10)]
    assert got.tolist() == want
    assert want[0] != want[1]


def test_generate_without_images_or_mask(make_model: MakeModel) -> None:
    model, ids = make_model(), torch.tensor([[1, 5, 6]])
    got = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert got.tolist() == [greedy(model, ids, None, 6)]


def test_generate_without_images_equals_rows_alone(make_model: MakeModel) -> None:
    model = make_model()
    ids, mask = torch.tensor([[1, 5, 6, 7], [1, 9, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    got = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert got.tolist() == [greedy(model, ids[:1], None, 6), greedy(model, ids[1:, :2], None, 6)]


def test_generate_with_an_image_token_and_no_image(make_model: MakeModel) -> None:
    with pytest.raises(PromptError, match="row 0: 1 image tokens"):
        make_model().generate(IDS[:1], max_new_tokens=2)


def test_decode_with_images_and_a_past_equals_one_pass(make_model: MakeModel) -> None:
    """The original's generation loop: the images come along at every step."""
    model, images = make_model(), torch.randn(1, 3, 16, 16)
    ids, following = IDS[:1], [11, 12, 13]
    step: Any = model(input_ids=ids, attention_mask=MASK[:1], images=images, use_cache=True)
    logits = [step.logits[:, -1]]
    for token in following:
        step = model(
            input_ids=torch.tensor([[token]]),
            attention_mask=MASK[:1],
            past_key_values=step.past_key_values,
            images=images,
            use_cache=True,
        )
        logits.append(step.logits[:, -1])
    whole = model(input_ids=torch.cat([ids, torch.tensor([following])], 1), images=images).logits
    torch.testing.assert_close(torch.stack(logits, 1), whole[:, -4:], rtol=1e-4, atol=1e-5)
