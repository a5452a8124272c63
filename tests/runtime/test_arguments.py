"""What a caller of the runtime can hand in by mistake, and what stays in memory of what was right."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_deploy.engines.errors import BackendError, InputError, OptionError
from llava_deploy.engines.names import FEATURES_KEPT
from llava_deploy.runtime import Llava, SamplingOptions
from llava_deploy.runtime.context import FeatureCache
from llava_deploy.runtime.sampling import Sampler

PICTURE = Image.new("RGB", (8, 8))


@pytest.fixture(scope="module")
def llava(demo_bundle: Path) -> Llava:
    return Llava.load(demo_bundle, threads=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "hello"}, "prompts: want a list of texts, got str; put a single one into a list"),
        ({"prompts": (text for text in ["hello"])}, "prompts: want a list of texts, got generator"),
        ({"images": PICTURE}, "images: want a list of lists of pictures, one list a prompt, got Image"),
        ({"images": [PICTURE]}, "images of prompt 0: want a list of pictures, got Image"),
        ({"images": ["photo.jpg"]}, "images of prompt 0: want a list of pictures, got str"),
        ({"images": [np.zeros((8, 8, 3), np.uint8)]}, "images of prompt 0: want a list of pictures, got ndarray"),
        ({"images": [None]}, "images of prompt 0: want a list of pictures, got NoneType"),
        ({"stop": "###"}, "stop: want a list of texts, got '###'"),
        ({"stop": None}, "stop: want a list of texts, got None"),
        ({"sampling": None}, "sampling: want SamplingOptions, got NoneType"),
        ({"max_new_tokens": 0}, "max_new_tokens: want 1 or more, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: want 1 or more, got 1.5"),
        ({"max_new_tokens": "3"}, "max_new_tokens: want 1 or more, got '3'"),
        ({"max_new_tokens": None}, "max_new_tokens: want 1 or more, got None"),
    ],
)
def test_refused_by_name(llava: Llava, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        llava.generate(**{"prompts": ["<image> hello"], "images": [[PICTURE]], **arguments})
    assert str(caught.value).startswith(message)


def test_a_stream_takes_a_list_of_pictures(llava: Llava) -> None:
    with pytest.raises(InputError, match="want a list of pictures, got Image"):
        llava.stream("<image> hello", PICTURE)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 2**31, 10_000])
def test_threads(demo_bundle: Path, threads: Any) -> None:
    with pytest.raises(InputError, match="threads: want 1 to 1024"):
        Llava.load(demo_bundle, threads=threads)


@pytest.mark.parametrize("max_len", [1.5, "8", True])
def test_max_len_is_a_whole_number(demo_bundle: Path, max_len: Any) -> None:
    with pytest.raises(InputError, match="max_len: want 1 to"):
        Llava.load(demo_bundle, max_len=max_len)


def test_backend_errors_are_one_line(llava: Llava) -> None:
    llava.decoder.begin(1)
    wrong = np.zeros((1, 1, llava.manifest.decoder.hidden_size + 1), np.float32)
    with pytest.raises(BackendError, match="ONNX Runtime failed in the decoder: ") as caught:
        llava.decoder.step(wrong, np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert "\n" not in str(caught.value)


def test_an_option_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(OptionError("top_k", "want 1 or more")))
    assert (str(error), error.option, error.exit_code) == ("top_k: want 1 or more", "top_k", 2)


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e308])
def test_extreme_temperatures_warn_nobody(temperature: float) -> None:
    logits = np.array([[1.0, 30.0, -5.0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = Sampler(SamplingOptions(temperature=temperature, seed=1), [[]]).choose(logits)
    assert chosen[0] == 1 or temperature > 1


def test_features_that_are_kept_keep_nothing_else() -> None:
    """What a hundred pictures at once came out as goes, but for the last ones."""
    cache = FeatureCache()
    encoded = np.zeros((100, 4, 8), np.float32)
    for index, features in enumerate(encoded):
        cache.put(bytes([index]), features)
    kept = [cache.get(bytes([index])) for index in range(100)]
    assert [index for index, features in enumerate(kept) if features is not None] == [*range(100 - FEATURES_KEPT, 100)]
    assert all(not np.shares_memory(features, encoded) for features in kept if features is not None)
