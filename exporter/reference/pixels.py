"""Pictures to pixels as the original does it: LLaVA's ``expand2square``, then transformers' ``CLIPImageProcessor``."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessor

from llava_deploy.engines.manifest import ImageRecipe


def reference_pixels(image: Image.Image, recipe: ImageRecipe) -> np.ndarray:
    """An RGB picture to float32 ``[1, 3, height, width]`` (LLaVA, ``llava/mm_utils.py``, ``process_images``)."""
    if recipe.pad_to_square:
        image = expand_to_square(image, recipe.pad_color)
    return np.asarray(reference_processor(recipe)(image, return_tensors="np")["pixel_values"], np.float32)


def expand_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of ``color`` (LLaVA, ``llava/mm_utils.py``, ``expand2square``)."""
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def reference_processor(recipe: ImageRecipe) -> CLIPImageProcessor:
    """transformers' processor, set up as the recipe says."""
    size: dict[str, Any] | None = None
    if recipe.resize is not None:
        kind, *sizes = recipe.resize
        size = {kind: sizes[0]} if kind == "shortest_edge" else {"height": sizes[0], "width": sizes[1]}
    crop = None if recipe.crop is None else {"height": recipe.crop[0], "width": recipe.crop[1]}
    return CLIPImageProcessor(
        do_resize=size is not None,
        **({} if size is None else {"size": size}),
        resample=recipe.resample,
        do_center_crop=crop is not None,
        **({} if crop is None else {"crop_size": crop}),
        do_rescale=recipe.rescale_factor is not None,
        **({} if recipe.rescale_factor is None else {"rescale_factor": recipe.rescale_factor}),
        do_normalize=recipe.mean is not None,
        image_mean=recipe.mean,
        image_std=recipe.std,
    )
