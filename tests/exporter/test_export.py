"""Bundles: what is in them, that equal checkpoints give equal bytes, and that a broken export leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from llava_deploy.engines.contract import TensorSpec
from llava_deploy.engines.errors import CheckpointError, InputError, LlavaDeployError
from llava_deploy.engines.manifest import MANIFEST_NAME, read_manifest
from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint
from llava_deploy.exporter.export import ExportProgress, export

EXPORT_SCRIPT = """
import sys
from pathlib import Path
from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.exporter import export as module
from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint
if "--unchecked" in sys.argv:
    module._require_space = lambda *_: None
try:
    module.export(open_checkpoint(Path(sys.argv[1]), CheckpointOptions()), Path(sys.argv[2]), "fp32")
except LlavaDeployError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def altered(checkpoint: Path, into: Path, name: str, change: np.ndarray) -> Path:
    """A copy of the checkpoint with other values at the start of one tensor."""
    shutil.copytree(checkpoint, into)
    (file,) = into.glob("*.safetensors")
    tensors = load_file(file)
    values = tensors[name].astype(np.float32).reshape(-1)
    values[: len(change)] = change
    tensors[name] = values.reshape(tensors[name].shape)
    save_file(tensors, file, metadata={"format": "pt"})
    return into


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_same_checkpoint_same_bytes(demo_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    for name in ("a", "b"):
        export(open_checkpoint(demo_checkpoint, CheckpointOptions()), tmp_path / name, precision)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_graphs_are_the_specs(demo_bundle: Path, tmp_path: Path) -> None:
    """The files say what the contract says, name by name, and nothing but standard operators is in them."""
    bundle = shutil.copytree(
        demo_bundle, tmp_path / "bundle"
    )  # onnx's checker takes no files that others have links to
    manifest = read_manifest(bundle)
    for name, spec in (("vision", manifest.vision.spec()), ("decoder", manifest.decoder.spec())):
        path = bundle / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path, load_external_data=False)
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 24)]
        assert all(node.domain == "" for node in graph.graph.node)
        for found, wanted in ((graph.graph.input, spec.inputs), (graph.graph.output, spec.outputs)):
            assert tuple(as_spec(value) for value in found) == wanted


def as_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return TensorSpec(value.name, dtype, tuple(d.dim_param or d.dim_value for d in kind.shape.dim))


def test_large_tensors_start_at_pages_and_none_is_written_twice(demo_bundle: Path) -> None:
    taken: dict[str, list[tuple[int, int]]] = {}
    for name in ("vision", "decoder"):
        for tensor in onnx.load(demo_bundle / f"{name}.onnx", load_external_data=False).graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if not where:
                assert tensor.ByteSize() < 2048
                continue
            offset, length = int(where["offset"]), int(where["length"])
            if where["location"] != "embed_tokens.npy":
                assert offset % (4096 if length >= 4096 else 64) == 0
            taken.setdefault(where["location"], []).append((offset, offset + length))
    for spans in taken.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_progress_counts_every_source_byte_once(demo_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo_checkpoint, CheckpointOptions())
    seen: list[ExportProgress] = []
    export(checkpoint, tmp_path / "bundle", "fp32", on_progress=seen.append)
    assert seen[-1].done == seen[-1].total == sum(source.nbytes for source in checkpoint.tensors.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_a_number(demo_checkpoint: Path, tmp_path: Path, value: float) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    broken = altered(demo_checkpoint, tmp_path / "checkpoint", name, np.array([1.0, value], np.float32))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight.*NaN or infinite"):
        export(open_checkpoint(broken, CheckpointOptions()), tmp_path / "bundle", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_weight_too_large_for_fp16(demo_checkpoint: Path, tmp_path: Path) -> None:
    name = "language_model.model.norm.weight"
    large = altered(demo_checkpoint, tmp_path / "checkpoint", name, np.array([70000.0], np.float32))
    checkpoint = open_checkpoint(large, CheckpointOptions())
    with pytest.raises(CheckpointError, match=r"norm\.weight.*70000.*float16.*--precision fp32"):
        export(checkpoint, tmp_path / "bundle", "fp16")
    export(checkpoint, tmp_path / "bundle", "fp32")


def test_output_that_exists(demo_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo_checkpoint, CheckpointOptions())
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "keep.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(checkpoint, output, "fp32")
    assert (output / "keep.txt").read_text() == "mine"
    with pytest.raises(InputError, match="not a bundle"):
        export(checkpoint, output, "fp32", replace=True)
    assert (output / "keep.txt").read_text() == "mine"


def test_replacing_a_bundle(demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(demo_bundle, output)
    (output / MANIFEST_NAME).write_text("{}")
    export(open_checkpoint(demo_checkpoint, CheckpointOptions()), output, "fp32", replace=True)
    read_manifest(output)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_killed_while_exporting(demo_checkpoint: Path, tmp_path: Path) -> None:
    """Nothing has the bundle's name unless it is whole; the next export clears what is left of the killed one."""
    output = tmp_path / "bundle"
    for delay in (0.0, 0.02, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, "-c", EXPORT_SCRIPT, str(demo_checkpoint), str(output)])
        while process.poll() is None and not list(tmp_path.glob(".bundle.partial-*")):
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            read_manifest(output)
            shutil.rmtree(output)
    export(open_checkpoint(demo_checkpoint, CheckpointOptions()), output, "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("flag", ["", "--unchecked"])
def test_disk_full(demo_checkpoint: Path, tmp_path: Path, flag: str) -> None:
    """On a disk of one megabyte: refused before the first byte, and, unchecked, when a write fails."""
    small = tmp_path / "small"
    small.mkdir()
    command = (
        f"mount -t tmpfs -o size=1m tmpfs {small} && {sys.executable} -c '{EXPORT_SCRIPT}' "
        f"{demo_checkpoint} {small / 'bundle'} {flag}; code=$?; ls -A {small}; exit $code"
    )
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    result = subprocess.run([*unshare, "sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    message, *left = result.stdout.splitlines()
    assert "the disk is full" in message
    assert "free some space" in message
    assert left == []


def test_a_disk_that_fills_up_says_how_much_is_wanted(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:  # by then the vision graph is written
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx.checker, "check_model", full)
    with pytest.raises(LlavaDeployError, match=r"disk is full, nothing was written; more than 12,\d{3},\d{3} bytes"):
        export(open_checkpoint(demo_checkpoint, CheckpointOptions()), tmp_path / "b", "fp32")
    assert list(tmp_path.iterdir()) == []
