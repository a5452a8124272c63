"""Values that no model has, wherever a checkpoint's files hold them: refused by name before anything is built."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.layouts.fields import Fields, read_json
from llava_deploy.exporter.sources.lora import open_adapter

HUGE = 10**400
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("key", "value", "want"),
    [
        ("head_dim", HUGE, "want int of at most"),
        ("max_position_embeddings", 10**9, "want at most 16,777,216"),
        ("num_hidden_layers", 10**6, "want at most 1,024"),
        ("rms_norm_eps", HUGE, "want float of at most"),
        ("rms_norm_eps", -1.0, "want 0 or more"),
        ("rope_theta", 0.0, "want a number above 0"),
        ("rope_parameters", {"rope_theta": -5.0}, r"rope_parameters\.rope_theta: want a number above 0"),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}, r"rope_parameters\.factor: want a number above 0"),
        ("rope_parameters", {**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor: want a number above 1"),
        ("rope_parameters", {**LLAMA3, "low_freq_factor": 0.0}, "low_freq_factor: want a number above 0"),
        ("rope_parameters", {**LLAMA3, "original_max_position_embeddings": 0}, "want at least 1"),
    ],
)
def test_decoder_numbers(make_llava: Any, edit_json: Any, key: str, value: Any, want: str) -> None:
    directory = make_llava().directory
    edit_json(directory / "config.json", lambda values: values["text_config"].update({key: value}))
    with pytest.raises(CheckpointError, match=want) as caught:
        open_checkpoint(directory)
    assert key in str(caught.value)


@pytest.mark.parametrize("value", [HUGE, 1e308, float("nan"), float("inf"), "0.5"])
@pytest.mark.parametrize("key", ["image_mean", "image_std"])
def test_picture_numbers(make_llava: Any, edit_json: Any, key: str, value: Any) -> None:
    directory = make_llava().directory
    edit_json(directory / "preprocessor_config.json", lambda values: values.update({key: [0.5, value, 0.5]}))
    with pytest.raises(CheckpointError, match=f"{key}: want three numbers"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("name", "data", "want"),
    [
        ("chat_template.jinja", b"\xff\xe9", "want text in UTF-8"),
        ("added_tokens.json", b'{"a": "b"}', "want an id for 'a', found 'b'"),
        ("added_tokens.json", b'{"a": null}', "want an id for 'a', found None"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "want ids with their tokens"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {}}}', "want ids with their tokens"),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}', "surrogates not allowed"),
        ("generation_config.json", b'{"eos_token_id": %s}' % (b"9" * 5000), "want JSON"),
    ],
)
def test_files_beside_the_config(make_llava: Any, name: str, data: bytes, want: str) -> None:
    directory = make_llava().directory
    (directory / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=want) as caught:
        open_checkpoint(directory)
    assert name in str(caught.value)


def test_a_pipe_is_no_config(tmp_path: Path) -> None:
    """Opening it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="want a JSON file, found something else"):
        read_json(tmp_path / "config.json")


def test_numbers_with_a_lower_end() -> None:
    fields = Fields({"a": 2, "b": 0}, "file")
    assert fields.number("a", 1.0, above=0) == 2.0
    assert fields.number("absent", 1.5, above=0) == 1.5
    with pytest.raises(CheckpointError, match="file, b: want a number above 0, found 0"):
        fields.number("b", 1.0, above=0)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("patterns", [{"(": 8}, {"q_proj": "8"}, {"q_proj": 0}, {"q_proj": None}])
def test_patterns_of_an_adapter(tmp_path: Path, key: str, patterns: dict[str, Any]) -> None:
    config: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, key: patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=key):
        open_adapter(tmp_path)


def test_a_damaged_config_is_refused_at_once(make_llava: Any, edit_json: Callable[..., None]) -> None:
    """A size that no tensor has is found before anything of that size is made."""
    directory = make_llava().directory
    edit_json(directory / "config.json", lambda values: values["text_config"].update(head_dim=10**9))
    with pytest.raises(CheckpointError, match="want shape"):
        open_checkpoint(directory)
