"""Picture and chat recipes from the files beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPImageProcessor

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.recipes.image_recipe import CLIP_MEAN, CLIP_STD, image_fields, image_recipe, unused_keys

SIZE = {"height": 336, "width": 336}
DEFAULT = ImageRecipe(
    pad_to_square=False,
    pad_color=(122, 116, 104),
    resize=("shortest_edge", 336),
    resample=3,
    crop=(336, 336),
    rescale_factor=1 / 255,
    mean=CLIP_MEAN,
    std=CLIP_STD,
)


def recipe(values: dict[str, Any], size: int = 336, *, pad: bool = False) -> ImageRecipe:
    return image_recipe(Fields(values, "preprocessor_config.json"), size, pad)


@pytest.mark.parametrize(
    "values",
    [
        {"size": 336, "crop_size": 336},
        {"size": {"shortest_edge": 336}, "crop_size": SIZE, "image_processor_type": "CLIPImageProcessorFast"},
        {"size": {"shortest_edge": 336, "longest_edge": None}, "crop_size": SIZE},
        {"size": 336, "crop_size": 336, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": {"shortest_edge": 336}, "crop_size": SIZE, "image_processor_type": "LlavaImageProcessor"},
    ],
)
def test_forms_of_the_same_settings(values: dict[str, Any]) -> None:
    assert recipe(values) == DEFAULT


def test_clips_defaults() -> None:
    theirs = CLIPImageProcessor()
    ours = recipe({}, 224)
    assert ours.resize == ("shortest_edge", theirs.size["shortest_edge"])
    assert ours.crop == (theirs.crop_size["height"], theirs.crop_size["width"])
    assert ours.resample == theirs.resample
    assert ours.rescale_factor == theirs.rescale_factor
    assert (list(ours.mean or ()), list(ours.std or ())) == (list(theirs.image_mean), list(theirs.image_std))


def test_saved_by_transformers(tmp_path: Path) -> None:
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=SIZE).save_pretrained(tmp_path)
    fields = image_fields(tmp_path)
    assert fields is not None
    assert image_recipe(fields, 336, False) == DEFAULT
    assert unused_keys(fields) == ()


def test_inside_the_processors_config(tmp_path: Path) -> None:
    inside = {"image_processor_type": "LlavaImageProcessor", "size": 336, "crop_size": 336, "do_pad": True}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inside, "patch_size": 14}))
    fields = image_fields(tmp_path)
    assert fields is not None
    assert image_recipe(fields, 336, False).pad_to_square


def test_steps_switched_off() -> None:
    off = {"do_resize": True, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    got = recipe({**off, "size": SIZE, "resample": 2})
    assert got.resize == ("exact", 336, 336)
    assert got.crop is None
    assert got.rescale_factor is None
    assert got.mean is None
    assert got.std is None
    assert got.resample == 2


def test_padding_makes_a_square_that_needs_no_crop() -> None:
    assert recipe({"size": 336, "do_center_crop": False}, pad=True).crop is None


def test_pad_color_is_cut_not_rounded() -> None:
    values = {"size": 336, "crop_size": 336, "image_mean": [0.5, 0.999, 0.0]}
    assert recipe(values, pad=True).pad_color == (127, 254, 0)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "feature_extractor_type"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"longest_edge": 336}}, "size"),
        ({"size": {"shortest_edge": 336, "longest_edge": 500}}, "size"),
        ({"size": "336"}, "size"),
        ({"size": {"shortest_edge": 0}}, "size"),
        ({"crop_size": {"shortest_edge": 336}}, "crop_size"),
        ({"resample": 9}, "resample"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"pad_size": SIZE}, "pad_size"),
        ({"do_resize": "no"}, "do_resize"),
    ],
)
def test_refused_by_name(values: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json, {key}: want"):
        recipe({"size": 336, "crop_size": 336, **values})


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"size": 224, "crop_size": 224}, "224 x 224"),
        ({"size": 336, "do_center_crop": False}, "any size"),
        ({"do_resize": False, "do_center_crop": False}, "any size"),
        ({"size": {"height": 336, "width": 300}, "do_center_crop": False}, "336 x 300"),
    ],
)
def test_pictures_of_another_size(values: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        recipe(values)


TEMPLATE = "{{ messages }}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        ("processor_config.json", json.dumps({"chat_template": TEMPLATE})),
        ("tokenizer_config.json", None),
    ],
)
def test_places_of_the_template(make_llava: Any, edit_json: Any, name: str, content: str | None) -> None:
    directory = make_llava().directory
    if content is None:
        named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}]
        edit_json(directory / name, lambda values: values.update(chat_template=named))
    else:
        (directory / name).write_text(content)
    assert open_checkpoint(directory).chat.template == TEMPLATE


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("\n{% for message in messages %}", r"line 2: .*endfor"),
        ("{{ messages[0]", "line 1: "),
        ("{% endif %}", "line 1: .*endif"),
        ("{{ messages | no_such_filter }}", "line 1: .*no_such_filter"),
        ("{% break %}", "SyntaxError: 'break' outside loop"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError: "),
    ],
)
def test_a_template_that_is_no_jinja(make_llava: Any, edit_json: Any, name: str, template: str, reason: str) -> None:
    directory = make_llava().directory
    if name == "chat_template.jinja":
        (directory / name).write_text(template)
    elif name == "chat_template.json":
        (directory / name).write_text(json.dumps({"chat_template": template}))
    else:
        edit_json(directory / name, lambda values: values.update(chat_template=template))
    wanted = rf"{name}, chat template: want Jinja, found .* \({reason}.*\); correct .* --conversation NAME"
    with pytest.raises(CheckpointError, match=wanted) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    assert open_checkpoint(directory, CheckpointOptions(conversation="llama_2")).chat.template is None


def test_a_template_with_what_transformers_adds_to_jinja(make_llava: Any) -> None:
    directory = make_llava().directory
    template = (
        "{% for m in messages %}{% if not m %}{% continue %}{% endif %}{% generation %}{{ m | tojson }}"
        "{% endgeneration %}{% endfor %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    assert open_checkpoint(directory).chat.template == template


def test_chat_of_llava_hf(make_llava: Any) -> None:
    saved = make_llava()
    chat = open_checkpoint(saved.directory).chat
    config = saved.model.config
    assert chat.tokenization == "added_token"
    assert (chat.placeholder, chat.image_token_id) == ("<image>", config.image_token_id)
    assert (chat.bos_token, chat.eos_token) == ("<s>", "</s>")
    assert chat.bos_token_id == config.text_config.bos_token_id
    assert chat.stop_token_ids == (config.text_config.eos_token_id,)
    assert chat.template is None
    assert chat.conversation == "vicuna_v1"
    assert chat.stop_strings == ()


def test_conversation_overrides_the_template(make_llava: Any) -> None:
    directory = make_llava().directory
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    chat = open_checkpoint(directory, CheckpointOptions(conversation="plain")).chat
    assert (chat.template, chat.conversation, chat.stop_strings) == (None, "plain", ("\n",))


@pytest.mark.parametrize(
    ("generation", "text", "ids"),
    [
        ({"eos_token_id": [5, 7, 5]}, {}, (5, 7)),
        ({"eos_token_id": 5}, {"eos_token_id": 9}, (5,)),
        ({}, {"eos_token_id": 9}, (9,)),
        (None, {"eos_token_id": [9, 8]}, (9, 8)),
        (None, {}, (2,)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_stop_tokens(make_llava: Any, edit_json: Any, generation: Any, text: dict[str, Any], ids: Any) -> None:
    directory = make_llava().directory

    def change(values: dict[str, Any]) -> None:
        del values["text_config"]["eos_token_id"]
        values["text_config"].update(text)

    edit_json(directory / "config.json", change)
    path = directory / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps(generation))
    assert open_checkpoint(directory).chat.stop_token_ids == ids


@pytest.mark.parametrize("value", [300, -1, "</s>", [1, "x"], True])
def test_stop_tokens_that_are_none(make_llava: Any, value: Any) -> None:
    directory = make_llava().directory
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json, eos_token_id"):
        open_checkpoint(directory)


def test_stop_strings(make_llava: Any) -> None:
    directory = make_llava().directory
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "stop_strings": ["###"]}))
    assert open_checkpoint(directory).chat.stop_strings == ("###",)


def test_sampling_settings_are_told_to_be_unused(make_llava: Any, edit_json: Any) -> None:
    directory = make_llava().directory
    assert open_checkpoint(directory).unused_keys == ()
    change = {"do_sample": True, "temperature": 0.9, "pad_token_id": 0}
    edit_json(directory / "generation_config.json", lambda values: values.update(change))
    assert open_checkpoint(directory).unused_keys == ("generation_config.do_sample", "generation_config.temperature")
