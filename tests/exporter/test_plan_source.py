"""What the planner says of a checkpoint, beside what an export of it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.names import HeadPrecision, Precision
from llava_deploy.engines.planner.model import PlannedModel, planned_bundle
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.plan_source import planned_checkpoint
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions

OURS = ("vision_tower.", "projector.", "language_model.", "lm_head.")
SMALL = 4096  # bytes: constants of the graphs' own


def sizes(planned: PlannedModel) -> dict[str, tuple[tuple[int, ...], int]]:
    tensors = (*planned.vision_weights.tensors, *planned.decoder_weights.tensors)
    return {t.name: (t.shape, t.bits) for t in tensors if t.name.startswith(OURS) and t.shape}


@pytest.mark.parametrize(
    ("precision", "symmetric", "head"),
    [
        ("fp32", False, "fp16"),
        ("fp16", False, "fp16"),
        ("int4", False, "fp16"),
        ("int4", True, "int8"),
        ("int4", False, "int4"),
    ],
)
def test_a_checkpoint_is_planned_as_the_bundle_that_it_becomes(
    demo_checkpoint: Path, tmp_path: Path, precision: Precision, symmetric: bool, head: HeadPrecision
) -> None:
    checkpoint, options = open_checkpoint(demo_checkpoint), QuantizeOptions(64, symmetric, head)
    planned = planned_checkpoint(checkpoint, precision, options)
    made = round_to_nearest(checkpoint, options) if precision == "int4" else checkpoint
    manifest = export(made, tmp_path / "bundle", precision)
    bundle = planned_bundle(tmp_path / "bundle", manifest)

    assert sizes(bundle) == sizes(planned)
    assert (bundle.vision, bundle.decoder, bundle.is_tied) == (planned.vision, planned.decoder, planned.is_tied)
    for name in ("tower_heads", "tower_layers", "tower_sizes", "intermediate_size", "query_size"):
        assert getattr(bundle, name) == getattr(planned, name), name
    written = sum(entry.size for entry in manifest.files if entry.path.endswith((".data", ".npy")))
    padding = 4096 * len(sizes(planned))
    assert planned.bundle_bytes <= written <= planned.bundle_bytes + padding + SMALL


def test_what_an_export_reads_is_counted_as_it_is_stored(demo_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(demo_checkpoint)
    source = planned_checkpoint(checkpoint, "fp16", QuantizeOptions(128, False, "fp16")).source
    assert source is not None
    assert source.nbytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert (source.largest.values, source.largest.bits) == (640 * 256, 16)
    assert not source.is_converted
    assert source.rounded == ()


def test_a_bundle_says_the_same_when_it_is_opened_again(demo_bundle_fp16: Path) -> None:
    planned = planned_bundle(demo_bundle_fp16, read_manifest(demo_bundle_fp16))
    assert planned.source is None
    assert planned.tower_heads == 4


def sparse_7b(directory: Path, demo: Path) -> None:
    """LLaVA-1.5-7B's layout with a header of all tensors and nothing but a hole after it."""
    directory.mkdir()
    config = json.loads((demo / "config.json").read_text(encoding="utf-8"))
    text = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32064, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    config["text_config"] |= text
    config["vision_config"] |= vision
    config.pop("image_seq_length")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((demo / name).read_bytes())
    recipe = json.loads((demo / "preprocessor_config.json").read_text(encoding="utf-8"))
    recipe |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (directory / "preprocessor_config.json").write_text(json.dumps(recipe), encoding="utf-8")
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(directory)).state_dict()
    header, at = {}, 0
    for name, tensor in state.items():
        end = at + 2 * tensor.numel()
        header[name], at = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, end]}, end
    content = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + at)


def test_7b_is_planned_from_headers_without_torch(
    demo_checkpoint: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    sparse_7b(tmp_path / "7b", demo_checkpoint)
    script = """
import sys, time
from pathlib import Path
from llava_deploy.engines.planner.boards import find_board
from llava_deploy.engines.planner.plan import plan, resolve_sizes
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.plan_source import planned_checkpoint
from llava_deploy.exporter.quantization.request import QuantizeOptions
model = planned_checkpoint(open_checkpoint(Path(sys.argv[1])), "int4", QuantizeOptions(128, False, "fp16"))
plan(model, find_board("orin-nano-8gb"), resolve_sizes(model, 1, None, None), None)
print("torch" in sys.modules, time.process_time(), model.source.nbytes)
"""
    run = [sys.executable, "-c", script, str(tmp_path / "7b")]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120, env=child_environment)
    assert done.stderr == ""
    has_torch, seconds, nbytes = done.stdout.split()
    assert has_torch == "False"
    assert int(nbytes) > 14e9 - 1e9
    assert float(seconds) < 4  # of the processor: 2 on a machine of its own, and room for one that is shared
