"""Checkpoint to bundle: both graphs, the embedding table, the tokenizer and the manifest, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from llava_deploy.engines.errors import InputError, LlavaDeployError
from llava_deploy.engines.manifest import (
    DECODER_GRAPH,
    EMBEDDING_TABLE,
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER,
    VISION_GRAPH,
    FileEntry,
    Manifest,
    ModelCard,
    QuantizationRecipe,
    SpliceRecipe,
    describe_file,
)
from llava_deploy.engines.names import DEFAULT_ACCURACY_LEVEL, AccuracyLevel, HeadPrecision, Precision
from llava_deploy.engines.staging import require_free_name, require_space_for, staged_directory, write_error
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD, LlavaConfig
from llava_deploy.exporter.graphs import Graphs, build_graphs
from llava_deploy.exporter.quantization.held import quantized_in_decoder
from llava_deploy.exporter.quantization.weight import QuantizedSource
from llava_deploy.exporter.sources.tensors import TensorSource
from llava_deploy.exporter.weights import SharedTable, attach_weights, write_embedding_table

TOOLS = ("llava-deploy", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


Recorder: TypeAlias = Callable[[Path, Manifest], tuple[FileEntry, ...]]
"""Writes more files of a bundle into its directory, and gives their entries."""


def no_goldens(_directory: Path, _manifest: Manifest) -> tuple[FileEntry, ...]:
    """Adds nothing."""
    return ()


@dataclass(frozen=True)
class ExportProgress:
    """How far an export is: ``done`` of ``total`` bytes of source weights."""

    done: int
    total: int


def export(
    checkpoint: Checkpoint,
    output: Path,
    precision: Precision,
    *,
    accuracy_level: AccuracyLevel = DEFAULT_ACCURACY_LEVEL,
    replace: bool = False,
    on_progress: Callable[[ExportProgress], None] = lambda _: None,
    record: Recorder = no_goldens,
) -> Manifest:
    """Write ``checkpoint`` as a bundle to the directory ``output``.

    Weights that the checkpoint holds quantised stay so in ``int4`` and ``int4-awq``, value for value; in the other
    precisions they are the floats that they stand for. See :mod:`llava_deploy.exporter.quantization` for how a float
    checkpoint becomes a quantised one.

    Equal checkpoints give equal bytes. The directory appears when everything in it is written and checked; an export
    that fails or is killed leaves nothing by that name. With ``replace`` an old bundle stays as it was until then.

    Args:
        checkpoint: as it is to be exported.
        output: the bundle's directory.
        precision: what the bundle is to be.
        accuracy_level: what ONNX Runtime is to multiply int4 weights in.
        replace: an old bundle of that name is replaced.
        on_progress: called with the bytes of weights that are written, and of how many.
        record: called when the graphs are there, with their directory and a manifest of them; what it adds is listed.
            :func:`~llava_deploy.exporter.goldens.record.record_goldens` adds goldens, and needs PyTorch.

    Raises:
        InputError: ``output`` exists and ``replace`` is false, or int4 is asked of a checkpoint that holds none.
        CheckpointError: a weight is NaN, infinite, or outside the range of the precision.
        LlavaDeployError: the disk is full, or ``output`` cannot be written.
    """
    require_free_name(output, replace=replace)
    kept = _kept(checkpoint, precision)
    graphs = build_graphs(checkpoint.config, precision, {name: source.format for name, source in kept.items()})
    recipe = quantization_recipe(kept, accuracy_level) if kept else None
    wanted = _bytes_wanted(checkpoint, graphs)  # now: what is written is no longer counted
    require_space_for(output, wanted)
    total = sum(source.nbytes for source in checkpoint.tensors.values())
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        on_progress(ExportProgress(done, total))

    try:
        with staged_directory(output, replace=replace) as staging:
            return _write(checkpoint, graphs, precision, recipe, staging, progress, record)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise write_error(output, error) from error
        raise LlavaDeployError(
            f"{output}: the disk is full, nothing was written; more than {wanted:,} bytes are wanted: "
            "free some space or choose another disk"
        ) from error


def _write(
    checkpoint: Checkpoint,
    graphs: Graphs,
    precision: Precision,
    recipe: QuantizationRecipe | None,
    directory: Path,
    progress: Callable[[int], None],
    record: Recorder,
) -> Manifest:
    dtype = np.dtype(graphs.decoder_shape.dtype)
    tensors = checkpoint.tensors
    table, written = write_embedding_table(directory / EMBEDDING_TABLE, tensors[EMBED_TOKENS], dtype, progress)
    (directory / TOKENIZER).write_bytes(checkpoint.tokenizer_json)
    files = [written, describe_file(directory, TOKENIZER)]
    for model, name in ((graphs.vision, VISION_GRAPH), (graphs.decoder, DECODER_GRAPH)):
        files += write_graph(model, tensors, directory / name, table, progress)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model=_card(checkpoint, precision),
        vision=graphs.vision_shape,
        decoder=graphs.decoder_shape,
        image=checkpoint.image,
        chat=checkpoint.chat,
        quantization=recipe,
        splice=SpliceRecipe(checkpoint.config.tokenizer_model_max_length),
        tools=tool_versions(),
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        left_out=(),
    )
    files += record(directory, manifest)
    manifest = dataclasses.replace(manifest, files=tuple(sorted(files, key=lambda entry: entry.path)))
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def write_graph(
    model: ir.Model,
    tensors: Mapping[str, TensorSource],
    path: Path,
    table: SharedTable,
    progress: Callable[[int], None],
) -> tuple[FileEntry, FileEntry]:
    """Write one graph and its weights, and have ONNX check it.

    Args:
        model: as :func:`~llava_deploy.exporter.graphs.build_graphs` makes it; refers to its weights afterwards.
        tensors: the weights by canonical names.
        path: of the ONNX file; the weights go beside it.
        table: where the embedding table's values are.
        progress: as for :func:`~llava_deploy.exporter.weights.attach_weights`.

    Returns:
        Both files, for the manifest.

    Raises:
        CheckpointError: a weight is NaN, infinite, or outside the range of the precision.
        OSError: a file cannot be written.
    """
    data = attach_weights(model, tensors, path.with_name(f"{path.name}.data"), table, progress)
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return data, describe_file(path.parent, path.name)


def tool_versions() -> dict[str, str]:
    """Of what has a say in the bytes of a bundle, for the manifest."""
    return {name: importlib.metadata.version(name) for name in TOOLS}


def _kept(checkpoint: Checkpoint, precision: Precision) -> dict[str, QuantizedSource]:
    """The decoder's weights that are to be stored as they are quantised."""
    if precision in ("fp32", "fp16"):
        return {}
    held = quantized_in_decoder(checkpoint)
    if not held:
        raise InputError(
            f"{checkpoint.directory}: none of its decoder's weights is quantised, which --precision {precision} wants; "
            "quantise the checkpoint first"
        )
    return held


def quantization_recipe(kept: Mapping[str, QuantizedSource], accuracy_level: AccuracyLevel) -> QuantizationRecipe:
    """What a manifest says of a decoder's quantised weights, one at least, by canonical names."""
    heads: dict[int, HeadPrecision] = {8: "int8", 4: "int4"}
    head = kept.get(LM_HEAD)
    others = [source for name, source in kept.items() if name != LM_HEAD]
    ((form, _),) = Counter(source.format for source in others or kept.values()).most_common(1)
    ((method, _),) = Counter(source.method for source in kept.values()).most_common(1)
    return QuantizationRecipe(
        method=method,
        group_size=form.group_size,
        symmetric=form.symmetric,
        lm_head="fp16" if head is None else heads[head.format.bits],
        weights=len(kept),
        accuracy_level=accuracy_level,
    )


def _card(checkpoint: Checkpoint, precision: Precision) -> ModelCard:
    config: LlavaConfig = checkpoint.config
    v, d = config.vision, config.decoder
    return ModelCard(
        name=checkpoint.name,
        layout=config.layout,
        vision=f"{v.model_type}, {v.num_hidden_layers} layers of {v.hidden_size}, {v.image_size} px in patches of "
        f"{v.patch_size}, features of layer {', '.join(map(str, config.feature_layers))} ({config.feature_select})",
        projector=f"{config.projector.kind}, {' > '.join(map(str, config.projector.sizes))}",
        decoder=f"{d.model_type}, {d.num_hidden_layers} layers of {d.hidden_size}, {d.num_attention_heads} heads over "
        f"{d.num_key_value_heads} of keys and values, vocabulary {d.vocab_size}",
        precision=precision,
        parameters=sum(math.prod(source.shape) for source in checkpoint.tensors.values()),
    )


def _bytes_wanted(checkpoint: Checkpoint, graphs: Graphs) -> int:
    itemsize = np.dtype(graphs.decoder_shape.dtype).itemsize
    floats = {EMBED_TOKENS: math.prod(checkpoint.tensors[EMBED_TOKENS].shape) * itemsize}
    for model in (graphs.vision, graphs.decoder):
        for name, value in model.graph.initializers.items():
            if value.const_value is None and value.dtype is not None and value.shape is not None:
                floats[name] = math.prod(value.shape.numpy()) * value.dtype.bitwidth // 8
    return sum(floats.values())
