"""Where the vision tower of an original-layout checkpoint is: inside it, or in a directory of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.config import VisionConfig
from llava_deploy.exporter.layouts import clip
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.recipes.image_recipe import clip_recipe_fields, image_fields

# What the config.json of OpenAI's own towers says, by the name that mm_vision_tower gives them: hidden_size,
# intermediate_size, layers, heads, image_size, patch_size. Their weights are never fetched.
_OPENAI = {
    "openai/clip-vit-large-patch14-336": (1024, 4096, 24, 16, 336, 14),
    "openai/clip-vit-large-patch14": (1024, 4096, 24, 16, 224, 14),
    "openai/clip-vit-base-patch16": (768, 3072, 12, 12, 224, 16),
    "openai/clip-vit-base-patch32": (768, 3072, 12, 12, 224, 32),
}
_NEXT_STEP = "pass the directory of a local copy with --vision-tower DIR (nothing is downloaded)"


@dataclass(frozen=True)
class TowerSource:
    """A tower's config, its directory if it has one, and its picture settings if they are known."""

    vision: VisionConfig
    directory: Path | None
    config_fields: Fields
    image: Fields | None


def find_tower(fields: Fields, option: Path | None, homes: tuple[Path, ...], *, is_inside: bool) -> TowerSource:
    """Find what an original-layout config says about its tower.

    ``--vision-tower`` comes first, then ``mm_vision_config`` where the weights are inside, then the directory that
    ``mm_vision_tower`` names, then, where the weights are inside, what is known of OpenAI's towers by name.

    Args:
        fields: ``config.json``.
        option: ``--vision-tower``.
        homes: directories that a relative ``mm_vision_tower`` may start from.
        is_inside: the tower's weights are in the checkpoint itself.

    Raises:
        CheckpointError: no such directory, or it holds no CLIP vision tower.
    """
    named = fields.optional("mm_vision_tower", str)
    fields.peek("vision_tower")  # what LLaVA's config called the field at first
    if option is not None:
        if not (option / "config.json").is_file():
            raise CheckpointError(f"--vision-tower {option}: want a directory with config.json, found none")
        fields.peek("mm_vision_config")
        return _from_directory(option)
    if is_inside and fields.has("mm_vision_config"):
        inside = fields.child("mm_vision_config")
        return TowerSource(clip.vision_config(inside), None, inside, None)
    if named is None:
        raise fields.error("mm_vision_tower", "want the vision tower's directory", _NEXT_STEP)
    for home in homes:
        if (home / named / "config.json").is_file():  # an absolute path stays itself
            return _from_directory(home / named)
    if is_inside and named in _OPENAI:
        return _known(named)
    raise fields.error("mm_vision_tower", "want the directory of a CLIP vision tower with config.json", _NEXT_STEP)


def _from_directory(directory: Path) -> TowerSource:
    whole = Fields.from_file(directory / "config.json")
    part = clip.tower_fields(whole)
    return TowerSource(clip.vision_config(part), directory, part, image_fields(directory))


def _known(name: str) -> TowerSource:
    hidden, intermediate, layers, heads, image, patch = _OPENAI[name]
    values = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }
    fields = Fields(values, name)
    return TowerSource(clip.vision_config(fields), None, fields, clip_recipe_fields(image, name))
