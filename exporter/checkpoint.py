"""A LLaVA checkpoint on disk, whichever layout it has: its config, its tensors under canonical names, its recipes.

Opening one reads configs, tokenizer and tensor headers; values are read when a tensor's ``read`` is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.engines.manifest import ChatRecipe, ImageRecipe
from llava_deploy.exporter.config import PROJECTOR, LlavaConfig
from llava_deploy.exporter.halves import resolved_feature_layers
from llava_deploy.exporter.layouts import clip, llama, llava, llava_hf
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.quantization.formats.assemble import assemble
from llava_deploy.exporter.quantization.formats.config import take_packing
from llava_deploy.exporter.quantization.formats.tinychat import open_tinychat, tinychat_name
from llava_deploy.exporter.recipes import image_recipe
from llava_deploy.exporter.recipes.chat_recipe import chat_recipe, require_conversation, unused_generation_keys
from llava_deploy.exporter.recipes.tokenizer_file import open_tokenizer
from llava_deploy.exporter.sources.collect import Collector, Naming
from llava_deploy.exporter.sources.given_paths import require_directory, require_file
from llava_deploy.exporter.sources.lora import Adapter, non_lora_name, open_adapter
from llava_deploy.exporter.sources.tensors import TensorSource, open_file
from llava_deploy.exporter.sources.tower_source import find_tower
from llava_deploy.exporter.sources.weight_files import open_weights
from llava_deploy.exporter.weights import expected_tensors

CONFIG = "config.json"


@dataclass(frozen=True)
class CheckpointOptions:
    """What the command line says about a checkpoint beside its directory.

    Attributes:
        vision_tower: directory of the tower of an original-layout checkpoint.
        projector: projector-only file (``mm_projector.bin`` or safetensors) to lay over the checkpoint.
        lora: directory of a LoRA adapter to merge.
        conversation: built-in conversation format to use instead of the checkpoint's chat template.
        quantized: TinyChat's file of the quantised language model (llm-awq) to lay over the checkpoint.
    """

    vision_tower: Path | None = None
    projector: Path | None = None
    lora: Path | None = None
    conversation: str | None = None
    quantized: Path | None = None


NO_OPTIONS = CheckpointOptions()


@dataclass(frozen=True)
class Checkpoint:
    """Everything that an export uses.

    Attributes:
        tensors: exactly the tensors that :func:`~llava_deploy.exporter.weights.expected_tensors` names.
        left_out: name in the file to the rule by which that tensor is not used.
        unused_keys: config keys that hold something and say nothing that this version knows of.
    """

    directory: Path
    name: str
    config: LlavaConfig
    tensors: Mapping[str, TensorSource]
    image: ImageRecipe
    chat: ChatRecipe
    tokenizer_json: bytes
    left_out: Mapping[str, str]
    unused_keys: tuple[str, ...]


@dataclass(frozen=True)
class _Opened:
    """What differs from layout to layout; ``text`` is the decoder's part of the config."""

    config: LlavaConfig
    collector: Collector
    adapter: Adapter | None
    naming: Naming
    image: Fields | None
    text: Fields
    unused_keys: tuple[str, ...]


def open_checkpoint(directory: Path, options: CheckpointOptions = NO_OPTIONS) -> Checkpoint:
    """Open a checkpoint of any layout.

    Raises:
        CheckpointError: no checkpoint, damaged files, a config that cannot be honoured, or a tensor that is missing, of
            another shape, or left over.
    """
    conversation = require_conversation(options.conversation)
    require_directory("--vision-tower", options.vision_tower)
    require_file("--projector", options.projector)
    require_directory("--lora", options.lora)
    require_file("--quantized", options.quantized)
    opened = _open(directory, options)
    collector = opened.collector
    config = collector.settle_tie(opened.config, opened.adapter)
    if opened.adapter is not None:
        collector.merge(opened.adapter, opened.naming)
    last_layer = max(resolved_feature_layers(config))
    tensors = collector.settle(config, last_layer, expected_tensors(config), str(directory))
    if opened.image is None:
        raise CheckpointError(
            f"{directory}: want {image_recipe.PREPROCESSOR}, or {image_recipe.PROCESSOR} with image_processor, found "
            "neither; fetch the checkpoint's other files as well"
        )
    image = image_recipe.image_recipe(opened.image, config.vision.image_size, config.image_aspect_ratio == "pad")
    config = replace(config, image_aspect_ratio="pad" if image.pad_to_square else None)
    tokenizer = open_tokenizer(directory)
    return Checkpoint(
        directory=directory,
        name=directory.resolve().name,
        config=config,
        tensors=MappingProxyType(tensors),
        image=image,
        chat=chat_recipe(directory, config, opened.text, tokenizer, conversation),
        tokenizer_json=tokenizer.data,
        left_out=MappingProxyType(dict(sorted(collector.left_out.items()))),
        unused_keys=tuple(
            sorted(
                {
                    *opened.unused_keys,
                    *image_recipe.unused_keys(opened.image),
                    *unused_generation_keys(directory),
                }
            )
        ),
    )


def _open(directory: Path, options: CheckpointOptions) -> _Opened:
    fields = Fields.from_file(directory / CONFIG)
    kind = fields.require("model_type", str)
    if kind == llama.MODEL_TYPE:
        return _open_original(directory, _laid_over(fields, options), options)
    if kind in llava.MODEL_TYPES and any(fields.has(key) for key in llava.TOWER_KEYS):
        return _open_original(directory, fields, options)
    if kind == llava_hf.MODEL_TYPE:
        return _open_hf(directory, fields, options)
    if kind in llava.MODEL_TYPES:
        raise fields.error(llava.TOWER_KEYS[0], "want the vision tower of this LLaVA", "was the file written whole?")
    known = ", ".join(map(repr, dict.fromkeys((llava_hf.MODEL_TYPE, *llava.MODEL_TYPES))))
    raise fields.error(
        "model_type",
        f"want {known}, or {llama.MODEL_TYPE!r} with --projector FILE or --lora DIR",
        "this version reads no other models",
    )


def _laid_over(base: Fields, options: CheckpointOptions) -> Fields:
    """The config of a plain Llama with a LLaVA's projector or adapter: theirs, as LLaVA's ``builder.py`` takes it."""
    for home in _homes(options):
        if not (home / CONFIG).is_file():
            continue
        over = Fields.from_file(home / CONFIG)
        if any(over.has(key) for key in llava.TOWER_KEYS):
            return Fields({**base.values, **over.values}, f"{over.where} over {base.where}")
    step = "a language model takes no pictures: pass --projector FILE or --lora DIR, with its config.json beside it"
    raise base.error(llava.TOWER_KEYS[0], "want a LLaVA", step)


def _homes(options: CheckpointOptions) -> tuple[Path, ...]:
    """Directories of what is laid over a checkpoint, which may say more about it."""
    lora = () if options.lora is None else (options.lora,)
    return lora if options.projector is None else (*lora, options.projector.parent)


def _open_hf(directory: Path, fields: Fields, options: CheckpointOptions) -> _Opened:
    if options.vision_tower is not None:
        raise CheckpointError(
            f"--vision-tower {options.vision_tower}: {directory} has the llava-hf layout, with its tower inside; "
            "leave the option out"
        )
    taken = take_packing(fields)
    fields = taken.fields
    config = llava_hf.parse(fields)
    collector = Collector()
    collector.add(assemble(open_weights(directory), taken.packing, fields.where), llava_hf.canonical_name)
    return _Opened(
        config=config,
        collector=collector,
        adapter=_lay_over(collector, options, llava_hf.canonical_name),
        naming=llava_hf.canonical_name,
        image=image_recipe.image_fields(directory),
        text=fields.child("text_config"),
        unused_keys=(*fields.unused(llava_hf.NO_EFFECT), *taken.unused),
    )


def _open_original(directory: Path, fields: Fields, options: CheckpointOptions) -> _Opened:
    taken = take_packing(fields)
    fields = taken.fields
    collector = Collector()
    collector.add(assemble(open_weights(directory), taken.packing, fields.where), llava.canonical_name)
    is_inside = any(name.startswith("vision_tower.") for name in collector.found)
    tower = find_tower(fields, options.vision_tower, (directory, *_homes(options)), is_inside=is_inside)
    if tower.directory is not None and not is_inside:
        collector.add_tower(open_weights(tower.directory), clip.tower_name)
    return _Opened(
        config=llava.parse(fields, tower.vision),
        collector=collector,
        adapter=_lay_over(collector, options, llava.canonical_name),
        naming=llava.canonical_name,
        image=tower.image if tower.image is not None else image_recipe.image_fields(directory),
        text=fields,
        unused_keys=(*fields.unused(llava.NO_EFFECT), *taken.unused, *tower.config_fields.unused(clip.NO_EFFECT)),
    )


def _lay_over(collector: Collector, options: CheckpointOptions, naming: Naming) -> Adapter | None:
    """Add what a quantised file, a projector file and an adapter bring whole; the adapter's deltas come last."""
    if options.quantized is not None:
        collector.lay_over(open_tinychat(options.quantized), tinychat_name)
    if options.projector is not None:
        collector.lay_over(open_file(options.projector), lambda key: _projector_name(key, naming))
    if options.lora is None:
        return None
    adapter = open_adapter(options.lora)
    collector.lay_over(adapter.whole, naming)
    return adapter


def _projector_name(key: str, naming: Naming) -> str | None:
    key = non_lora_name(key)
    name = llava.projector_name(key) or naming(key)
    return name if name is not None and name.startswith(PROJECTOR) else None
