"""Builds that do not come to an end: stopped, killed, out of disk, or refused by TensorRT."""

from __future__ import annotations

import builtins
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.errors import BackendError, LlavaDeployError
from llava_deploy.engines.lowering import tensorrt as lowering
from llava_deploy.engines.tensorrt import adapter, builder
from llava_deploy.engines.tensorrt.builder import build_tensorrt
from llava_deploy.engines.tensorrt.messages import Messages
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions
from llava_deploy.engines.tensorrt.progress import BuildProgress

OPTIONS = TensorRtBuildOptions("tensorrt-rtx", capabilities=("sm89",), max_len=64)


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A bundle of its own in int4 with zero points, without engines."""
    source = bundle_of("llava-1.5", "int4 asymmetric")
    return shutil.copytree(source, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))


def names(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / ENGINES).iterdir()) if (bundle / ENGINES).exists() else []


def in_tensorrt(progress: BuildProgress) -> bool:
    """Whether TensorRT itself is at work, on the second graph."""
    return progress.what == "vision" and progress.phase not in ("Lowering the graph", "Parsing the graph")


def test_an_interrupted_build_stops_and_leaves_nothing(bundle: Path) -> None:
    def interrupt(progress: BuildProgress) -> None:
        if in_tensorrt(progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tensorrt(bundle, OPTIONS, on_progress=interrupt)
    assert names(bundle) == []


SCRIPT = """
import signal, sys
from pathlib import Path
from llava_deploy.engines.tensorrt.builder import build_tensorrt
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
def tell(progress):
    print(progress.what, progress.phase, flush=True)
options = TensorRtBuildOptions("tensorrt-rtx", capabilities=("sm89",), max_len=64)
build_tensorrt(Path(sys.argv[1]), options, on_progress=tell)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_build_leaves_nothing_that_looks_like_engines(
    bundle: Path, child_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(bundle)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment
    ) as (process):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("decoder Parsing"):
                break
        time.sleep(0.3)  # now it is with TensorRT, or about to be
        os.kill(process.pid, how)
        process.communicate(timeout=60)
    assert process.returncode == -how
    left = names(bundle)
    assert all(name.startswith(".") for name in left)
    assert how != signal.SIGINT or left == []

    monkeypatch.setattr(builder, "serialize", lambda *arguments: bool(arguments[-1].write_bytes(b"plan")))
    output = build_tensorrt(bundle, OPTIONS)  # sweeps
    assert names(bundle) == [output.name]


def test_a_disk_that_fills_up_while_the_plan_is_written(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To /dev/full, which takes nothing: the error goes around TensorRT, which would not pass it on."""
    opened = Path.open

    def full(path: Path, *arguments: Any, **named: Any) -> Any:
        return builtins.open("/dev/full", "wb") if path.suffix == ".plan" else opened(path, *arguments, **named)  # noqa: PTH123

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(LlavaDeployError, match="the disk is full, nothing was written; free some space"):
        build_tensorrt(bundle, OPTIONS)
    assert names(bundle) == []


def test_a_plan_that_is_lost_on_its_way(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when there is no memory for the copy that Python is given: TensorRT says that all is well."""
    make = adapter._make_writer

    def losing(*arguments: Any) -> Any:
        writer = make(*arguments)
        type(writer).write = lambda *_: 0
        return writer

    monkeypatch.setattr(adapter, "_make_writer", losing)
    with pytest.raises(BackendError, match=r"decoder\.plan: .* has built a plan that did not arrive"):
        build_tensorrt(bundle, OPTIONS)
    assert names(bundle) == []


def test_no_room_for_engines(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(LlavaDeployError, match=r"the disk is full: the engine wants .* bytes, 1,000 are free"):
        build_tensorrt(bundle, OPTIONS)
    assert names(bundle) == []


def test_a_workspace_that_is_too_small(bundle: Path) -> None:
    with pytest.raises(BackendError) as raised:
        build_tensorrt(bundle, dataclasses.replace(OPTIONS, workspace=1))
    message = str(raised.value)
    assert message.startswith("decoder.onnx: TensorRT for RTX ")
    assert "within workspace limit" in message
    assert message.endswith("; raise --workspace, or leave it out")
    assert "driver" not in message
    assert names(bundle) == []


def test_a_workspace_that_is_too_small_in_other_words(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT has them for the growing cache's softmax, and for several GPUs at once."""
    monkeypatch.setattr(Messages, "cause", lambda _: "Error Code 2: OutOfMemory (Requested size was 9184256 bytes.)")
    with pytest.raises(BackendError, match=r"OutOfMemory .*; raise --workspace, or leave it out$"):
        build_tensorrt(bundle, dataclasses.replace(OPTIONS, workspace=1))


class Edit(ir.passes.InPlacePass):
    """Anything, done to a graph."""

    def __init__(self, edit: Callable[[ir.Graph], None]) -> None:
        self._edit = edit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self._edit(model.graph)
        return ir.passes.PassResult(model, modified=True)


def nodes(graph: ir.Graph, op_type: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == op_type]


def unknown_operator(graph: ir.Graph) -> None:
    nodes(graph, "Sigmoid")[1].op_type = "Softsign2"


def circular_cache(graph: ir.Graph) -> None:
    nodes(graph, "TensorScatter")[2].attributes["mode"] = ir.AttrString("mode", "circular")


def unused_input(graph: ir.Graph) -> None:
    """Not in the contract, and taken by an input of Attention that TensorRT ignores without a word."""
    lengths = ir.Value(name="lengths", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(lengths)
    for node in nodes(graph, "Attention"):
        node.resize_inputs(7)
        node.replace_input_with(6, lengths)


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (unknown_operator, ["node ", ", Softsign2 of language_model.layers.1.mlp: ", "Plugin not found"]),
        (
            circular_cache,
            [
                ", TensorScatter of language_model.layers.1.self_attn: ",
                "Only linear mode is supported",
                "(TensorScatter: from TensorRT 10.15, for RTX 1.7 on (",
                "or lower for an older one with --trt-version",
            ],
        ),
        (unused_input, ["has read another network than was written", "input 'lengths' is used by no layer"]),
    ],
)
def test_a_graph_that_tensorrt_cannot_read(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[ir.Graph], None], wanted: list[str]
) -> None:
    passes = lowering.decoder_passes
    monkeypatch.setattr(lowering, "decoder_passes", lambda *arguments: [*passes(*arguments), Edit(edit)])
    with pytest.raises(BackendError) as raised:
        build_tensorrt(bundle, OPTIONS)
    for text in wanted:
        assert text in str(raised.value)
    assert names(bundle) == []


def test_weights_of_a_type_that_tensorrt_does_not_have(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "decoder_passes", lambda *_: [])
    with pytest.raises(BackendError, match=r"no weights such as language_model\.layers\.0\.\S+\.weight, by its type"):
        build_tensorrt(bundle, OPTIONS)


def test_a_warning_that_means_another_result_ends_the_build(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = builder.serialize

    def warned(module: Any, made: Any, network: Any, config: Any, path: Path) -> bool:
        made.logger.log(module.api.ILogger.WARNING, "Unused Input: write_indices")
        return build(module, made, network, config, path)

    monkeypatch.setattr(builder, "serialize", warned)
    with pytest.raises(BackendError, match=r"decoder\.onnx: .*an input is not used: Unused Input: write_indices"):
        build_tensorrt(bundle, OPTIONS)
    assert names(bundle) == []
