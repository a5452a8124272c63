"""Which files of a directory hold its weights: safetensors by choice, one file or shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.layouts.fields import read_json
from llava_deploy.exporter.sources.tensors import StoredTensor, open_file

# transformers' order (modeling_utils.py): safetensors before pickles, one file before shards.
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def find_file(directory: Path, names: tuple[str, ...]) -> Path | None:
    """The first of ``names``, or of ``names`` with an index, that is in the directory."""
    for name in names:
        for candidate in (directory / name, directory / f"{name}.index.json"):
            if candidate.exists():
                return candidate
    return None


def open_weights(directory: Path) -> Mapping[str, StoredTensor]:
    """Every tensor in a directory's weight files, by the files' own names.

    Raises:
        CheckpointError: no weights, a shard missing or damaged, an index that is not one or names a file that is not
            there or is outside the directory, a tensor that stands twice or not where the index says.
    """
    path = find_file(directory, MODEL_FILES)
    if path is None:
        found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
        raise CheckpointError(
            f"{directory}: want {' or '.join(MODEL_FILES)}, or one of them with .index.json; "
            f"found {', '.join(found[:20]) or 'nothing'}; fetch the checkpoint's weight files"
        )
    return _open_shards(path) if path.suffix == ".json" else open_file(path)


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise CheckpointError(f"{index}, weight_map: want tensor names with their files; fetch the file again")
    tensors: dict[str, StoredTensor] = {}
    found_in: dict[str, str] = {}
    for name in sorted(set(places.values())):
        if PurePosixPath(name).name != name or "\\" in name or name in (".", ".."):
            raise CheckpointError(f"{index}, weight_map: file {name!r} leaves the directory; do not use it")
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(
                f"{index}: names the shard {name!r}, which is not in {index.parent}; fetch the checkpoint's files again"
            )
        for key, source in open_file(shard).items():
            if key in tensors:
                raise CheckpointError(
                    f"{source.origin}: tensor {key!r} stands in {tensors[key].origin} too; fetch the files again"
                )
            tensors[key], found_in[key] = source, name
    for key, name in places.items():
        if found_in.get(key) != name:
            raise CheckpointError(
                f"{index}: names {name!r} as the place of tensor {key!r}, which is not in it; fetch the files again"
            )
    return tensors
