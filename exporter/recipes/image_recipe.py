"""What a checkpoint says about preparing pictures: ``preprocessor_config.json`` becomes an :class:`ImageRecipe`.

Source: transformers, ``models/clip/image_processing_clip.py`` and ``models/llava/image_processing_llava.py``; LLaVA,
``llava/mm_utils.py`` for ``image_aspect_ratio``.
"""

from __future__ import annotations

from pathlib import Path

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.exporter.layouts.fields import Fields, read_json

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3
_FILTERS = range(6)  # Pillow's numbers
_CLIP_SIZE = 224
_MOST = 1e6  # of a mean or deviation; a NaN is no less either

_CLIP = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_LLAVA = ("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil")

# Where the class came from, how arrays are laid out, and what transformers itself fixes for these two classes.
_NO_EFFECT = frozenset(
    """
    _processor_class _valid_processor_keys auto_map data_format default_to_square device disable_grouping do_convert_rgb
    input_data_format processor_class return_tensors
    """.split()
)


def image_fields(directory: Path) -> Fields | None:
    """The image processor's settings in a directory: in a file of their own, or inside transformers 5's processor."""
    if (directory / PREPROCESSOR).is_file():
        return Fields.from_file(directory / PREPROCESSOR)
    path = directory / PROCESSOR
    values = read_json(path).get("image_processor") if path.is_file() else None
    return Fields(values, str(path), "image_processor.") if isinstance(values, dict) else None


def image_recipe(fields: Fields, image_size: int, aspect_pad: bool) -> ImageRecipe:
    """The recipe that an image processor's settings describe; absent fields have ``CLIPImageProcessor``'s defaults.

    Args:
        fields: the settings.
        image_size: side of the square that the tower takes, in pixels.
        aspect_pad: LLaVA's ``image_aspect_ratio: pad``.

    Raises:
        CheckpointError: another image processor, a step that the recipe cannot hold, or a result of another size.
    """
    is_llava = _is_llava(fields)
    pad = fields.get("do_pad", bool, False)
    if pad and not is_llava:
        raise fields.error("do_pad", "want false", "padding after the crop is not supported")
    fields.only("pad_size", (), "padding to a fixed size is not supported")
    fields.only("use_square_size", (False,), "it is not supported")
    resize = _resize(fields) if fields.get("do_resize", bool, True) else None
    crop = _crop(fields) if fields.get("do_center_crop", bool, True) else None
    resample = fields.get("resample", int, _BICUBIC)
    if resample not in _FILTERS:
        raise fields.error("resample", "want one of Pillow's filters 0 to 5", "correct the file")
    normalize = fields.get("do_normalize", bool, True)
    mean, std = _triple(fields, "image_mean", CLIP_MEAN), _triple(fields, "image_std", CLIP_STD)
    if normalize and 0.0 in std:
        raise fields.error("image_std", "want no zero", "correct the file")
    factor = fields.get("rescale_factor", float, 1 / 255)
    recipe = ImageRecipe(
        pad_to_square=pad or aspect_pad,
        pad_color=_color(mean),
        resize=resize,
        resample=resample,
        crop=crop,
        rescale_factor=factor if fields.get("do_rescale", bool, True) else None,
        mean=mean if normalize else None,
        std=std if normalize else None,
    )
    _require_size(fields, recipe, image_size)
    return recipe


def unused_keys(fields: Fields) -> tuple[str, ...]:
    """Settings that :func:`image_recipe` did not look at and that may mean something."""
    return fields.unused(_NO_EFFECT)


def clip_recipe_fields(image_size: int, where: str) -> Fields:
    """The settings of OpenAI's own CLIP towers."""
    return Fields({"size": image_size, "crop_size": image_size}, where)


def _is_llava(fields: Fields) -> bool:
    key = "image_processor_type" if fields.has("image_processor_type") else "feature_extractor_type"
    kind = fields.get(key, str, _CLIP[0])
    fields.peek("feature_extractor_type")
    if kind not in _CLIP and kind not in _LLAVA:
        raise fields.error(key, "want CLIPImageProcessor or LlavaImageProcessor", "this version has no other")
    return kind in _LLAVA


def _resize(fields: Fields) -> tuple[str, int] | tuple[str, int, int]:
    size = fields.peek("size")
    if isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if size is None or type(size) is int:
        size = {"shortest_edge": _CLIP_SIZE if size is None else size}
    if isinstance(size, dict):
        size = {name: value for name, value in size.items() if value is not None}
        whole = all(type(value) is int and value > 0 for value in size.values())
        if whole and size.keys() == {"shortest_edge"}:
            return ("shortest_edge", size["shortest_edge"])
        if whole and size.keys() == {"height", "width"}:
            return ("exact", size["height"], size["width"])
    raise fields.error("size", "want shortest_edge, or height and width", "other ways to resize are not supported")


def _crop(fields: Fields) -> tuple[int, int]:
    size = fields.peek("crop_size")
    if size is None or type(size) is int:
        side = _CLIP_SIZE if size is None else size
        size = {"height": side, "width": side}
    if isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if isinstance(size, dict):
        height, width = size.get("height"), size.get("width")
        if type(height) is int and type(width) is int and height > 0 and width > 0:
            return (height, width)
    raise fields.error("crop_size", "want height and width", "correct the file")


def _triple(fields: Fields, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = fields.get(key, list, list(default))
    if len(value) != 3 or any(type(part) not in (int, float) or not abs(part) <= _MOST for part in value):
        raise fields.error(key, "want three numbers", "pictures have three channels here")
    return (float(value[0]), float(value[1]), float(value[2]))


def _color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    # As LLaVA's process_images: int(), which cuts, not round().
    red, green, blue = (min(255, max(0, int(part * 255))) for part in mean)
    return (red, green, blue)


def _require_size(fields: Fields, recipe: ImageRecipe, image_size: int) -> None:
    want = (image_size, image_size)
    if recipe.crop is not None:
        got: tuple[int, ...] | None = recipe.crop
    elif recipe.resize is not None and recipe.resize[0] == "exact":
        got = recipe.resize[1:]  # type: ignore[assignment]
    elif recipe.resize is not None and recipe.pad_to_square:
        got = (recipe.resize[1], recipe.resize[1])
    else:
        got = None
    if got != want:
        raise CheckpointError(
            f"{fields.where}: want pictures of {image_size} x {image_size}, which the tower takes, found settings that "
            f"give {'pictures of any size' if got is None else ' x '.join(map(str, got))}; correct size and crop_size"
        )
