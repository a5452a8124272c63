"""Values of the right type that no bundle has: a manifest is not covered by its own hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.errors import BundleError, ContractError
from llava_deploy.engines.manifest import MANIFEST_NAME, ImageRecipe, read_manifest

RECIPE: dict[str, Any] = {
    "pad_to_square": False, "pad_color": (0, 0, 0), "resize": ("shortest_edge", 8), "resample": 3, "crop": (8, 8),
    "rescale_factor": 1.0, "mean": None, "std": None,
}  # fmt: skip


@pytest.mark.parametrize("value", [-1, 0, 2**31, 10**30])
@pytest.mark.parametrize("name", ["image_height", "patches", "hidden_size"])
def test_sizes_of_the_vision_graph(name: str, value: int) -> None:
    sizes = {"image_height": 8, "image_width": 8, "patches": 4, "hidden_size": 4, name: value}
    with pytest.raises(ContractError, match=f"graph 'vision', {name}: want 1 to"):
        VisionShape("float32", **sizes)


@pytest.mark.parametrize("value", [-1, 0, 2**31])
@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim", "vocab_size", "max_positions"])
def test_sizes_of_the_decoder_graph(name: str, value: int) -> None:
    sizes = {"hidden_size": 4, "layers": 1, "kv_heads": 1, "head_dim": 4, "vocab_size": 9, "max_positions": 8}
    with pytest.raises(ContractError, match=f"graph 'decoder', {name}: want 1 to"):
        DecoderShape("float16", **{**sizes, name: value})


@pytest.mark.parametrize("dtype", ["", "x", "\0", "int64", "float64", "\ud800"])
def test_dtypes(dtype: str) -> None:
    with pytest.raises(ContractError, match="want float32 or float16"):
        VisionShape(dtype, 8, 8, 4, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resize", ("shortest_edge", 0)),
        ("resize", ("longest_edge", 8)),
        ("resize", ("shortest_edge", 8, 8)),
        ("crop", (8, -1)),
        ("crop", (10**12, 8)),
        ("resample", 6),
        ("pad_color", (0, 0, 256)),
        ("std", (1.0, 0.0, 1.0)),
    ],
)
def test_image_recipes(name: str, value: Any) -> None:
    with pytest.raises(ContractError, match=f"image recipe: .*{name}"):
        ImageRecipe(**{**RECIPE, name: value})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("vision", "image_height"), -1),
        (("decoder", "dtype"), "int8"),
        (("image", "crop", 0), 10**12),
        (("image", "rescale_factor"), float("nan")),
        (("image", "rescale_factor"), float("inf")),
    ],
)
def test_a_manifest_with_them_is_refused(demo_bundle: Path, tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    data = json.loads((demo_bundle / MANIFEST_NAME).read_text())
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=f"{MANIFEST_NAME}: .*export the bundle again"):
        read_manifest(tmp_path)


INT4: dict[str, Any] = {
    "method": "rtn", "group_size": 32, "symmetric": False, "lm_head": "fp16", "weights": 14, "accuracy_level": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy_level": True}, r"quantization\.accuracy_level: want .*, found True"),
        ({"accuracy_level": 4.0}, r"quantization\.accuracy_level: want .*, found 4\.0"),
        ({"method": "x"}, r"quantization\.method: want .*, found 'x'"),
        ({"more": 1}, r"manifest\.quantization: missing \[\], unknown \['more'\]"),
        ({"group_size": 0}, "want group_size of 1 to"),
        ({"weights": -1}, "want weights of 1 to"),
        ({"weights": 10**30}, "want weights of 1 to"),
    ],
)
def test_a_recipe_of_quantization(demo_bundle: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    data = json.loads((demo_bundle / MANIFEST_NAME).read_text())
    data["model"]["precision"] = "int4"
    data["quantization"] = INT4
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))
    read_manifest(tmp_path)
    data["quantization"] = INT4 | change
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=said):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("precision", "recipe"), [("fp32", INT4), ("fp16", INT4), ("int4", None), ("int4-awq", None)])
def test_a_recipe_of_quantization_that_does_not_fit(
    demo_bundle: Path, tmp_path: Path, precision: str, recipe: dict[str, Any] | None
) -> None:
    data = json.loads((demo_bundle / MANIFEST_NAME).read_text())
    data["model"]["precision"], data["quantization"] = precision, recipe
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=f"precision {precision} and (none|one) of the recipes"):
        read_manifest(tmp_path)
