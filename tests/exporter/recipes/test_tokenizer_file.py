"""Tokenizers as one file: added tokens and BOS as transformers' own tokenizers have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.recipes.tokenizer_file import open_tokenizer, placeholder_of

MODEL = Path(__file__).parent / "data" / "sentencepiece_bpe.model"
TEXTS = ["", "What is <image> this?</s>", "<extra>x"]


@pytest.fixture
def directory(tmp_path: Path, save_companions: Any) -> Path:
    save_companions(tmp_path / "tokenizer", 24)
    return tmp_path / "tokenizer"


def write(directory: Path, name: str, values: Any) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(values))


def test_tokenizer_json_as_it_is(directory: Path) -> None:
    found = open_tokenizer(directory)
    assert found.data == (directory / "tokenizer.json").read_bytes()
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    assert found.id_of("<s>") == 256
    assert found.id_of("nothing") is None


@pytest.mark.parametrize("said", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_tokenizer_json_says_what_texts_begin_with(directory: Path, edit_json: Any, said: dict[str, bool]) -> None:
    """As transformers, which reads the two flags only where there is no tokenizer.json."""
    edit_json(directory / "tokenizer_config.json", lambda values: values.update(said))
    found = open_tokenizer(directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    for text in TEXTS:
        assert Tokenizer.from_buffer(found.data).encode(text).ids == theirs(text).input_ids


def test_added_tokens_beside(directory: Path, edit_json: Any) -> None:
    entry = {"content": "<extra>", "special": True, "normalized": False}
    edit_json(directory / "tokenizer_config.json", lambda values: values.update(added_tokens_decoder={"259": entry}))
    found = open_tokenizer(directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    assert found.id_of("<extra>") == theirs.convert_tokens_to_ids("<extra>") == 259
    assert Tokenizer.from_buffer(found.data).encode(TEXTS[2]).ids == theirs(TEXTS[2]).input_ids


def test_added_tokens_that_do_not_fit(directory: Path) -> None:
    write(directory, "added_tokens.json", {"<extra>": 300})
    with pytest.raises(CheckpointError, match=r"want id 300 .*'<extra>', found 259"):
        open_tokenizer(directory)


def test_truncation_and_padding_are_switched_off(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert len(Tokenizer.from_buffer(open_tokenizer(directory).data).encode("abcdef").ids) == 7


@pytest.mark.parametrize(
    ("settings", "front", "back"),
    [({}, True, False), ({"add_bos_token": False}, False, False), ({"add_eos_token": True}, True, True)],
)
@pytest.mark.parametrize("legacy", [None, True, False])
def test_tokenizer_model(tmp_path: Path, settings: dict[str, Any], front: bool, back: bool, legacy: Any) -> None:
    write(tmp_path, "tokenizer_config.json", {**settings, "legacy": legacy, "tokenizer_class": "LlamaTokenizer"})
    shutil.copy(MODEL, tmp_path / "tokenizer.model")
    found = open_tokenizer(tmp_path)
    tokens = Tokenizer.from_buffer(found.data).encode("a</s>b").tokens
    after = "b" if legacy is False else "▁b"
    assert tokens == ["<s>"] * front + ["▁a", "</s>", after] + ["</s>"] * back
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")


def test_special_tokens_map(directory: Path, edit_json: Any) -> None:
    edit_json(directory / "tokenizer_config.json", lambda values: [values.pop(f"{n}_token") for n in ("bos", "eos")])
    write(directory, "special_tokens_map.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    found = open_tokenizer(directory)
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    ("name", "values", "want"),
    [
        ("processor_config.json", {"image_token": "<pic>"}, "<pic>"),
        ("tokenizer_config.json", {"image_token": "<pic>"}, "<pic>"),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<pic>"}}, "<pic>"),
        ("tokenizer_config.json", {"image_token": {"content": "<pic>"}}, "<pic>"),
        ("tokenizer_config.json", {}, "<image>"),
    ],
)
def test_placeholder(tmp_path: Path, name: str, values: Any, want: str) -> None:
    write(tmp_path, name, values)
    assert placeholder_of(tmp_path) == want
