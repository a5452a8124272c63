"""``initialize_vision_tokenizer``, branch by branch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from llava_deploy.exporter.reference import LlavaLlamaForCausalLM

MakeModel = Callable[..., LlavaLlamaForCausalLM]
WORDS = 64


@pytest.fixture
def tokenizer() -> Any:
    vocabulary = {f"w{index}": index for index in range(WORDS - 1)} | {"<unk>": WORDS - 1}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "<unk>")), unk_token="<unk>")


def arguments(**changes: Any) -> Any:
    fields = {
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "tune_mm_mlp_adapter": False,
        "pretrain_mm_mlp_adapter": None,
    }
    return SimpleNamespace(**fields | changes)


def weights(model: LlavaLlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding tables of the inputs and of the outputs."""
    embeddings: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    return embeddings[0].weight, embeddings[1].weight


def tables(model: LlavaLlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, outputs = weights(model)
    return inputs.detach().clone(), outputs.detach().clone()


def trains(model: LlavaLlamaForCausalLM) -> tuple[bool, bool]:
    inputs, outputs = weights(model)
    return inputs.requires_grad, outputs.requires_grad


def test_nothing_asked_nothing_changed(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    model.initialize_vision_tokenizer(arguments(tune_mm_mlp_adapter=True), tokenizer)
    assert len(tokenizer) == WORDS
    assert model.config.vocab_size == WORDS
    assert trains(model) == (True, True)


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"mm_use_im_patch_token": True}, ["<im_patch>"]),
        ({"mm_use_im_start_end": True}, ["<im_start>", "<im_end>"]),
        ({"mm_use_im_patch_token": True, "mm_use_im_start_end": True}, ["<im_patch>", "<im_start>", "<im_end>"]),
    ],
)
def test_tokens_and_rows_are_added_at_the_mean(
    make_model: MakeModel, tokenizer: Any, asked: dict[str, bool], tokens: list[str]
) -> None:
    model = make_model()
    before = tables(model)
    model.initialize_vision_tokenizer(arguments(**asked), tokenizer)
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(WORDS, WORDS + len(tokens)))
    assert all(tokenizer.added_tokens_decoder[WORDS + index].special for index in range(len(tokens)))
    assert model.config.vocab_size == WORDS + len(tokens)
    for old, new in zip(before, tables(model), strict=True):
        assert new.shape == (WORDS + len(tokens), old.shape[1])
        assert torch.equal(new[:WORDS], old)
        torch.testing.assert_close(new[WORDS:], old.mean(0, keepdim=True).expand(len(tokens), -1))
    assert trains(model) == (True, True)
    assert model(input_ids=torch.tensor([[1, WORDS]])).logits.shape == (1, 2, WORDS + len(tokens))


def test_tied_embeddings_stay_tied(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model(tie_word_embeddings=True)
    old = tables(model)[0]
    model.initialize_vision_tokenizer(arguments(mm_use_im_start_end=True), tokenizer)
    assert weights(model)[0] is weights(model)[1]
    torch.testing.assert_close(tables(model)[0][WORDS:], old.mean(0, keepdim=True).expand(2, -1))


def test_tokens_that_are_there_keep_their_rows(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    model.initialize_vision_tokenizer(arguments(mm_use_im_start_end=True), tokenizer)
    with torch.no_grad():
        weights(model)[0][-2:] = 7
    model.initialize_vision_tokenizer(arguments(mm_use_im_start_end=True), tokenizer)
    assert (tables(model)[0][-2:] == 7).all()


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ({"mm_use_im_start_end": True}, (True, False)),
        ({"mm_use_im_patch_token": True}, (False, False)),
        ({"mm_use_im_patch_token": True, "mm_use_im_start_end": True}, (True, False)),
    ],
)
def test_which_embeddings_train_with_the_adapter(
    make_model: MakeModel, tokenizer: Any, asked: dict[str, bool], want: tuple[bool, bool]
) -> None:
    model = make_model()
    model.get_input_embeddings().requires_grad_(False)
    model.initialize_vision_tokenizer(arguments(**asked, tune_mm_mlp_adapter=True), tokenizer)
    assert trains(model) == want


@pytest.mark.parametrize("num_rows", [WORDS + 2, 2], ids=["whole table", "two rows"])
def test_pretrained_rows(make_model: MakeModel, tokenizer: Any, tmp_path: Path, num_rows: int) -> None:
    model = make_model()
    before = tables(model)
    rows = torch.randn(num_rows, 48)
    torch.save({"model.embed_tokens.weight": rows}, tmp_path / "a.bin")
    model.initialize_vision_tokenizer(
        arguments(mm_use_im_start_end=True, pretrain_mm_mlp_adapter=str(tmp_path / "a.bin")), tokenizer
    )
    inputs, outputs = tables(model)
    assert torch.equal(inputs[-2:], rows[-2:])
    assert torch.equal(inputs[:-2], before[0])
    torch.testing.assert_close(outputs[-2:], before[1].mean(0, keepdim=True).expand(2, -1))


@pytest.mark.parametrize("shape", [(WORDS, 48), (3, 48), (1, 48), (2, 47), (2, 1), (WORDS + 3, 48)])
def test_pretrained_rows_of_another_shape(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path, shape: tuple[int, int]
) -> None:
    torch.save({"model.embed_tokens.weight": torch.zeros(shape)}, tmp_path / "a.bin")
    args = arguments(mm_use_im_start_end=True, pretrain_mm_mlp_adapter=str(tmp_path / "a.bin"))
    with pytest.raises(ValueError, match=rf"want shape \[66, 48\] or \[2, 48\].* got \[{shape[0]}, {shape[1]}\]"):
        make_model().initialize_vision_tokenizer(args, tokenizer)


def test_adapter_without_rows(make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    torch.save({"model.mm_projector.weight": torch.zeros(2)}, tmp_path / "a.bin")
    args = arguments(mm_use_im_start_end=True, pretrain_mm_mlp_adapter=str(tmp_path / "a.bin"))
    with pytest.raises(ValueError, match="got nothing"):
        make_model().initialize_vision_tokenizer(args, tokenizer)


def test_pretrained_rows_for_tokens_that_were_there(make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model()
    model.initialize_vision_tokenizer(arguments(mm_use_im_start_end=True), tokenizer)
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 48)}, tmp_path / "a.bin")
    args = arguments(mm_use_im_start_end=True, pretrain_mm_mlp_adapter=str(tmp_path / "a.bin"))
    with pytest.raises(ValueError, match="for 0"):
        model.initialize_vision_tokenizer(args, tokenizer)
