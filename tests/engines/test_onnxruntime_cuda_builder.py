"""The engine for ONNX Runtime's CUDA provider: its files, whose weights they are, and what cannot be built."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import Result

from llava_deploy.engines.engine_manifest import ENGINES, read_engine_manifest
from llava_deploy.engines.errors import BackendError, BundleError, OptionError
from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, read_manifest
from llava_deploy.engines.onnxruntime_cuda import CUDA_SINCE, LAST_SLOTS, TOTAL_SLOTS, cuda_key
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest

FILES = {"vision.onnx", "vision.onnx.data", "decoder.onnx", "decoder.onnx.data"}


@pytest.fixture
def fp16(demo_bundle_fp16: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_bundle_fp16, tmp_path / "fp16")


@pytest.fixture(scope="module")
def int4(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("cuda") / "int4"
    checkpoint = round_to_nearest(open_checkpoint(demo_checkpoint), QuantizeOptions(64, False, "fp16"))
    export(checkpoint, bundle, "int4")
    return bundle


def operators(graph: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in onnx.load(graph, load_external_data=False).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def test_float_weights_are_the_bundles_own_files(fp16: Path) -> None:
    engine = build_onnxruntime_cuda(fp16)
    assert engine.relative_to(fp16).as_posix() == f"{ENGINES}/onnxruntime-cuda-{CUDA_SINCE}-cuda"
    manifest = read_engine_manifest(engine)
    assert manifest.key == cuda_key(read_manifest(fp16))
    assert {entry.path for entry in manifest.files} == FILES
    for name in FILES:
        assert (engine / name).samefile(fp16 / name) == name.endswith(".data")


def test_the_decoder_asks_for_lengths_and_not_for_masks(fp16: Path) -> None:
    graph = onnx.load(build_onnxruntime_cuda(fp16) / "decoder.onnx", load_external_data=False).graph
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    assert {name for name in inputs if not name.startswith("past.")} == {
        "inputs_embeds", "last_index", LAST_SLOTS, TOTAL_SLOTS
    }  # fmt: skip
    assert inputs[LAST_SLOTS].elem_type == inputs[TOTAL_SLOTS].elem_type == onnx.TensorProto.INT32
    assert [len(inputs[name].shape.dim) for name in (LAST_SLOTS, TOTAL_SLOTS)] == [1, 0]
    assert inputs["past.0.key"].elem_type == onnx.TensorProto.FLOAT16


def test_attention_is_lowered_and_floats_stay_float16(fp16: Path) -> None:
    layers = read_manifest(fp16).decoder.layers
    found = operators(build_onnxruntime_cuda(fp16) / "decoder.onnx")
    assert found["GroupQueryAttention"] == layers
    assert not {"Attention", "TensorScatter", "Slice"} & found.keys()
    assert found["Cast"] == 1  # the logits, which are float32


def test_weights_are_read_as_they_lie(fp16: Path) -> None:
    """Else a session that loads them folds the transposes into a copy."""
    engine = build_onnxruntime_cuda(fp16)
    for name in ("vision.onnx", "decoder.onnx"):
        graph = onnx.load(engine / name, load_external_data=False).graph
        weights = {value.name for value in graph.initializer}
        assert not [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]
        products = [node for node in graph.node if node.op_type == "FusedMatMul"]
        canonical = onnx.load(fp16 / name, load_external_data=False).graph.node
        assert len(products) == sum(node.op_type == "MatMul" for node in canonical)


def test_quantised_products_of_one_value_are_put_together(int4: Path) -> None:
    layers = read_manifest(int4).decoder.layers
    engine = build_onnxruntime_cuda(int4)
    found = operators(engine / "decoder.onnx")
    assert found["MatMulNBits"] == 4 * layers  # q, k, v; o; gate, up; down
    assert "DequantizeLinear" not in found
    assert not (engine / "decoder.onnx.data").samefile(int4 / "decoder.onnx.data")
    assert (engine / "vision.onnx.data").samefile(int4 / "vision.onnx.data")


def test_a_bundle_of_float32_is_refused(demo_bundle: Path) -> None:
    with pytest.raises(OptionError, match=r"wants a bundle of float16, found float32; export it with --precision fp16"):
        build_onnxruntime_cuda(demo_bundle)
    assert not (demo_bundle / cuda_key(read_manifest(demo_bundle)).directory).exists()


def test_heads_that_attention_has_no_kernel_for_are_refused(demo_checkpoint: Path, tmp_path: Path) -> None:
    """They would stay canonical, with the inputs of the canonical graph."""
    checkpoint = open_checkpoint(demo_checkpoint)
    old = checkpoint.config.decoder
    odd = replace(
        old,
        head_dim=old.head_dim // 4,
        num_attention_heads=4 * old.num_attention_heads,
        num_key_value_heads=4 * old.num_key_value_heads,
    )
    export(replace(checkpoint, config=replace(checkpoint.config, decoder=odd)), tmp_path / "odd", "fp16")
    with pytest.raises(OptionError, match=r"wants heads of a multiple of 16, found 8; run the bundle with another"):
        build_onnxruntime_cuda(tmp_path / "odd")
    assert not (tmp_path / "odd" / ENGINES).exists()


def test_weights_that_lead_out_of_the_bundle_are_refused(fp16: Path, tmp_path: Path) -> None:
    shutil.copy(fp16 / "vision.onnx.data", tmp_path)
    model = onnx.load(fp16 / "vision.onnx", load_external_data=False)
    for entry in [entry for weight in model.graph.initializer for entry in weight.external_data]:
        entry.value = f"../{entry.value}" if entry.key == "location" else entry.value
    (fp16 / "vision.onnx").write_bytes(model.SerializeToString())
    manifest = read_manifest(fp16)
    files = tuple(describe_file(fp16, entry.path) for entry in manifest.files)
    (fp16 / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    with pytest.raises(BundleError, match=r"weight .*: its file 'vision\.onnx\.data' is not beside the graph"):
        build_onnxruntime_cuda(fp16)


def test_an_engine_that_is_whole_is_kept_and_a_damaged_one_built_again(fp16: Path) -> None:
    graph = build_onnxruntime_cuda(fp16) / "decoder.onnx"
    content = graph.read_bytes()
    os.utime(graph, (1, 1))
    build_onnxruntime_cuda(fp16)
    assert graph.stat().st_mtime == 1
    build_onnxruntime_cuda(fp16, replace=True)
    assert graph.stat().st_mtime > 1
    graph.write_bytes(content[:-1] + b"?")
    build_onnxruntime_cuda(fp16)
    assert graph.read_bytes() == content


def test_a_damaged_bundle_is_not_built_from(fp16: Path) -> None:
    data = fp16 / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data.*export the bundle again"):
        build_onnxruntime_cuda(fp16)
    assert not (fp16 / ENGINES).exists()


def test_without_onnx_ir_it_says_what_to_install(fp16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    for name in [name for name in sys.modules if name.startswith("llava_deploy.engines.lowering")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendError, match=r"pip install 'llava-deploy\[build\]'"):
        build_onnxruntime_cuda(fp16)
    assert not list((fp16 / ENGINES).glob("*"))


def test_the_command_builds_it_and_refuses_the_options_of_others(fp16: Path, invoke: Callable[..., Result]) -> None:
    result = invoke("build", fp16, "--backend", "onnxruntime-cuda")
    assert result.exit_code == 0, result.output
    assert "ready for onnxruntime-cuda" in result.stderr
    for option in (("--max-len", "64"), ("--int8", "vision"), ("--accuracy-level", "4")):
        refused = invoke("build", fp16, "--backend", "onnxruntime-cuda", *option)
        assert refused.exit_code == 2
        assert f"{option[0]}" in refused.stderr
