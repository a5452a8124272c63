"""Pictures to pixels as the original does it: LLaVA's ``expand2square``, then transformers' ``CLIPImageProcessor``."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from PIL import Image

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


def reference_processor(recipe: ImageRecipe) -> transformers.CLIPImageProcessor:
    """transformers' processor, set up as the recipe says."""
    # Only what the recipe holds is passed: the processor takes no None for a step that is switched off.
    fields: dict[str, Any] = {"resample": recipe.resample}
    if recipe.resize is not None:
        kind, *sizes = recipe.resize
        fields["size"] = {kind: sizes[0]} if kind == "shortest_edge" else {"height": sizes[0], "width": sizes[1]}
    if recipe.crop is not None:
        fields["crop_size"] = {"height": recipe.crop[0], "width": recipe.crop[1]}
    if recipe.rescale_factor is not None:
        fields["rescale_factor"] = recipe.rescale_factor
    if recipe.mean is not None and recipe.std is not None:
        fields |= {"image_mean": list(recipe.mean), "image_std": list(recipe.std)}
    # transformers 5 gives the Pillow one a name of its own; the other one asks for torchvision first.
    pillow = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    processor: transformers.CLIPImageProcessor = getattr(transformers, pillow)(
        do_resize="size" in fields,
        do_center_crop="crop_size" in fields,
        do_rescale="rescale_factor" in fields,
        do_normalize="image_mean" in fields,
        **fields,
    )
    return processor
