"""Verify passes on what the export wrote, and names the stage where something was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.errors import BackendError, InputError, OptionError
from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, read_manifest
from llava_deploy.engines.names import Int8Part
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.engines.processor import has_int8_products
from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.verify import VerifyOptions, VerifyReport, verify, verify_loaded
from llava_deploy.runtime import Llava
from llava_deploy.runtime.stages import StageResult

needs_products = pytest.mark.skipif(not has_int8_products(), reason="no exact products of 8-bit integers here")
EXAMPLE = next(iter(examples(Split.HELD_OUT, seed=2)))
PROMPT = f"USER: <image>\n{EXAMPLE.question} ASSISTANT:"


def run(checkpoint: Path, bundle: Path, seen: Callable[[StageResult], None] = lambda _: None) -> VerifyReport:
    opened = open_checkpoint(checkpoint, CheckpointOptions())
    return verify(opened, bundle, prompt=PROMPT, picture=EXAMPLE.picture, max_new_tokens=8, on_stage=seen)


def scale(bundle: Path, graph: str, name: str, factor: float) -> None:
    """Multiply one initializer in the external data, and have the manifest agree."""
    for tensor in onnx.load(bundle / graph, load_external_data=False).graph.initializer:
        if tensor.name == name:
            where = {entry.key: entry.value for entry in tensor.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            values = np.memmap(bundle / where["location"], dtype, "r+", int(where["offset"]), tuple(tensor.dims))
            values *= dtype.type(factor)
            values.flush()
    sign(bundle)


def sign(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    files = tuple(describe_file(bundle, entry.path) for entry in manifest.files)
    (bundle / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json())


def test_the_demo_bundle_passes(demo_checkpoint: Path, demo_bundle: Path) -> None:
    seen: list[StageResult] = []
    report = run(demo_checkpoint, demo_bundle, seen.append)
    assert report.ok, report.to_dict()
    assert report.stages == tuple(seen)
    kinds = list(dict.fromkeys(stage.kind for stage in report.stages))
    assert kinds == ["pixels", "tower", "projector", "splice", "decoder", "logits", "tokens"]
    manifest = read_manifest(demo_bundle)
    assert sum(stage.kind == "decoder" for stage in report.stages) == manifest.decoder.layers
    json.dumps(report.to_dict())


def test_a_stop_string_that_pytorch_does_not_know(demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path) -> None:
    """The runtime ends its answer there; PyTorch's goes on, and what both said is compared."""
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    stop = EXAMPLE.answer[3:5]
    chat = replace(manifest.chat, stop_strings=(stop,))
    (tmp_path / "bundle" / MANIFEST_NAME).write_text(replace(manifest, chat=chat).to_json())
    report = run(demo_checkpoint, tmp_path / "bundle")
    assert report.ok, report.stages[-1]


def test_a_checkpoint_of_other_sizes(demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    other = replace(manifest.decoder, layers=manifest.decoder.layers - 1)
    (tmp_path / "bundle" / MANIFEST_NAME).write_text(replace(manifest, decoder=other).to_json())
    with pytest.raises(InputError, match="made from a model of other sizes"):
        run(demo_checkpoint, tmp_path / "bundle")


def test_fp16_passes_within_its_own_tolerance(demo_checkpoint: Path, tmp_path: Path) -> None:
    export(open_checkpoint(demo_checkpoint, CheckpointOptions()), tmp_path / "bundle", "fp16")
    report = run(demo_checkpoint, tmp_path / "bundle")
    assert report.ok, report.to_dict()
    assert max(stage.error for stage in report.stages if stage.kind == "decoder") > 1e-5


@pytest.mark.parametrize(
    ("graph", "tensor", "stage"),
    [
        ("vision.onnx", "vision_tower.embeddings.patch_embedding.weight", "tower hidden_states.0"),
        ("vision.onnx", "vision_tower.encoder.layers.1.mlp.fc1.weight", "tower hidden_states.2"),
        ("vision.onnx", "projector.1.weight", "projector"),
        ("decoder.onnx", "language_model.layers.0.self_attn.v_proj.weight", "decoder hidden_states.1"),
        ("decoder.onnx", "language_model.layers.2.mlp.down_proj.weight", "decoder hidden_states.3"),
        ("decoder.onnx", "language_model.norm.weight", "logits"),
        ("decoder.onnx", "lm_head.weight", "logits"),
    ],
)
def test_a_weight_off_by_a_percent(
    demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path, graph: str, tensor: str, stage: str
) -> None:
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    scale(tmp_path / "bundle", graph, tensor, 1.01)
    report = run(demo_checkpoint, tmp_path / "bundle")
    assert report.first_failure == stage


def test_embeddings_off_by_a_percent(demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    table = np.load(tmp_path / "bundle" / "embed_tokens.npy", mmap_mode="r+")
    table *= table.dtype.type(1.01)
    table.flush()
    sign(tmp_path / "bundle")
    assert run(demo_checkpoint, tmp_path / "bundle").first_failure == "splice"


def test_a_preprocessing_constant_off(demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path) -> None:
    """The manifest says another mean than the checkpoint."""
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.image.mean is not None
    image = replace(manifest.image, mean=(manifest.image.mean[0] + 0.02, *manifest.image.mean[1:]))
    (tmp_path / "bundle" / MANIFEST_NAME).write_text(replace(manifest, image=image).to_json())
    assert run(demo_checkpoint, tmp_path / "bundle").first_failure == "pixels"


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_of_another_decoder(demo_checkpoint: Path, tmp_path: Path, symmetric: bool) -> None:
    """Same sizes, same tower, same embeddings: only the linear layers tell."""
    opened = open_checkpoint(demo_checkpoint, CheckpointOptions())
    export(round_to_nearest(opened, QuantizeOptions(128, symmetric, "fp16")), tmp_path / "bundle", "int4")
    assert run(demo_checkpoint, tmp_path / "bundle").ok
    shutil.copytree(demo_checkpoint, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    for name, values in tensors.items():
        if "language_model" in name and name.endswith("_proj.weight"):
            tensors[name] = np.ascontiguousarray(values[::-1])
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    report = run(tmp_path / "other", tmp_path / "bundle")
    assert report.first_failure == "decoder weights"


class Off:
    """A session whose results are off by a percent: a decoder's where it writes at most ``longest`` tokens."""

    def __init__(self, session: Any, longest: int) -> None:
        self._session, self._longest = session, longest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        return 1.01 * self._session.encode(pixel_values)

    def step(self, inputs_embeds: np.ndarray, *arguments: Any) -> np.ndarray:
        logits = self._session.step(inputs_embeds, *arguments)
        return 1.01 * logits if inputs_embeds.shape[1] <= self._longest else logits


@pytest.mark.parametrize(
    ("wrong", "longest", "stage"),
    [
        ("vision", 0, "features of what is loaded"),
        ("decoder", 1000, "logits of what is loaded"),
        ("decoder", 1, "logits of what is loaded, decode"),
    ],
)
def test_a_backend_that_computes_otherwise_than_the_graphs(
    demo_checkpoint: Path, demo_bundle: Path, wrong: str, longest: int, stage: str
) -> None:
    """The graphs are right: what is loaded is named, and whether in prompts or token by token."""
    llava = Llava.load(demo_bundle)
    if wrong == "vision":
        llava.encoder.vision = Off(llava.encoder.vision, longest)
    else:
        llava.decoder = Off(llava.decoder, longest)
    opened = open_checkpoint(demo_checkpoint, CheckpointOptions())
    report = verify_loaded(opened, llava, VerifyOptions(PROMPT, EXAMPLE.picture, max_new_tokens=8))
    assert report.first_failure == stage


@needs_products
@pytest.mark.parametrize("part", ["vision", "prefill"])
def test_an_engine_in_8_bit_integers_passes_and_a_wrong_graph_beside_it_does_not(
    demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path, part: Int8Part
) -> None:
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    build_onnxruntime(bundle, int8=[part])
    report = run(demo_checkpoint, bundle)
    assert f"int8: {part}" in report.backend
    assert report.ok, report.to_dict()
    close = {stage.name for stage in report.stages if stage.tolerance < 1e-3}
    assert {"projector", "decoder hidden_states.1", "logits"} < close
    assert ("features of what is loaded" in close) == (part == "prefill")
    assert "logits of what is loaded" not in close


def test_the_backend_is_the_one_that_was_asked_for(demo_checkpoint: Path, demo_bundle: Path) -> None:
    opened = open_checkpoint(demo_checkpoint, CheckpointOptions())
    with pytest.raises(BackendError, match="TensorRT"):
        verify(opened, demo_bundle, prompt=PROMPT, picture=EXAMPLE.picture, backend="tensorrt-rtx")


def test_pytorch_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match="device: want a device that PyTorch has, got 'cuda'"):
        VerifyOptions(PROMPT, EXAMPLE.picture, device="cuda")
