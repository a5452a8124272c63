"""Plans are held against their manifest before TensorRT sees them."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tensorrt_rtx

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST
from llava_deploy.engines.errors import BackendError, BundleError
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.tensorrt_module import TensorRtModule, import_tensorrt
from llava_deploy.engines.tensorrt_recipe import EngineLimits, TensorRtRecipe
from llava_deploy.runtime.tensorrt.cuda import Device, DeviceMemoryError
from llava_deploy.runtime.tensorrt.engine import Engine, Replay, Runtime
from llava_deploy.runtime.tensorrt.plans import fits_version, open_plans

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

RECIPE = TensorRtRecipe("1.7", "in-place", (4,), EngineLimits(1, 1, 1, 1, 1, 1, 1, 1), ("sm89",), None, False, False)


@pytest.fixture
def directory(fake_gpu: FakeGpu, demo_bundle: Path, tmp_path: Path) -> Path:
    return fake_gpu.write_engine(demo_bundle, tmp_path / "bundle" / "engines" / "it")


@pytest.fixture
def refused(fake_gpu: FakeGpu) -> Callable[[Path, type[Exception], str], None]:
    """Assert that an engine is refused in these words, with the build command, and that TensorRT never saw it."""

    def refused(directory: Path, kind: type[Exception], words: str) -> None:
        with pytest.raises(kind, match=words) as caught:
            open_plans(directory, ["vision.plan"], import_tensorrt("tensorrt-rtx"), Device())
        assert "llava-deploy build" in str(caught.value)
        assert f"{directory.parent.parent} --backend tensorrt-rtx" in str(caught.value)
        assert fake_gpu.calls["deserialize_cuda_engine"] == 0
        assert set(fake_gpu.live()) <= {"Stream"}  # the error's traceback has the device

    return refused


def test_another_version(fake_gpu: FakeGpu, directory: Path, refused: Any) -> None:
    fake_gpu.provide("tensorrt_rtx", "1.8.0.10")
    refused(directory, BackendError, r"built with TensorRT for RTX 1\.7\.1\.116, and 1\.8\.0\.10 is installed")


def test_another_gpu(fake_gpu: FakeGpu, directory: Path, refused: Any) -> None:
    fake_gpu.capability = (12, 0)
    refused(directory, BackendError, r"built for sm89, and the GPU is sm120 \(Fake GPU\)")


def test_another_backend(fake_gpu: FakeGpu, demo_bundle: Path, tmp_path: Path, refused: Any) -> None:
    directory = fake_gpu.write_engine(
        demo_bundle, tmp_path / "b" / "engines" / "full", backend="tensorrt", version="11.4.0.106"
    )
    refused(directory, BackendError, "was built for tensorrt;")


def test_altered_on_disk(directory: Path, refused: Any) -> None:
    plan = directory / "vision.plan"
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + b" ")
    refused(directory, BundleError, r"vision\.plan: want .* found .* the file was altered")
    plan.write_bytes(content + b" ")
    refused(directory, BundleError, "the file was altered")
    plan.write_bytes(b"")
    refused(directory, BundleError, r"vision\.plan: cannot be read")
    plan.unlink()
    refused(directory, BundleError, r"vision\.plan: cannot be read")


def test_a_plan_that_its_manifest_does_not_have(directory: Path, refused: Any) -> None:
    manifest = json.loads((directory / ENGINE_MANIFEST).read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "vision.plan"]
    (directory / ENGINE_MANIFEST).write_text(json.dumps(manifest))
    refused(directory, BundleError, r"want vision\.plan in its manifest, found \['decoder\.plan'\]")


@pytest.mark.parametrize(
    ("built", "compatible", "installed", "fits"),
    [
        ("10.3.0", False, "10.3.0", True),
        ("10.3.0", False, "10.4.0", False),
        ("10.3.0", True, "10.4.0", True),
        ("10.4.0", True, "10.3.0", False),
        ("10.3.0", True, "11.4.0.106", False),
        ("10.3.0.26", True, "10.3.0.30", True),
        ("nonsense", True, "10.3.0", False),
    ],
)
def test_versions(built: str, compatible: bool, installed: str, fits: bool) -> None:
    recipe = TensorRtRecipe("1.7", "in-place", (4,), RECIPE.limits, ("sm89",), None, compatible, False)
    assert fits_version(built, recipe, installed) is fits


def test_a_version_compatible_engine_may_bring_its_own_runtime(
    fake_gpu: FakeGpu, demo_bundle: Path, tmp_path: Path
) -> None:
    fake_gpu.provide("tensorrt", "11.4.0.106")
    for compatible in (False, True):
        directory = fake_gpu.write_engine(
            demo_bundle, tmp_path / str(compatible), backend="tensorrt", version="11.4.0.106",
            version_compatible=compatible,
        )  # fmt: skip
        (engine,) = open_plans(directory, ["vision.plan"], import_tensorrt("tensorrt"), Device())
        assert engine._runtime.handle.engine_host_code_allowed is compatible


def test_what_tensorrt_says_is_passed_on(fake_gpu: FakeGpu, directory: Path) -> None:
    module = import_tensorrt("tensorrt-rtx")
    fake_gpu.fail("deserialize_cuda_engine")
    with pytest.raises(DeviceMemoryError, match=r"cannot be deserialised: .*OutOfMemory.* bytes are free"):
        open_plans(directory, ["vision.plan"], module, Device())
    (engine,) = open_plans(directory, ["vision.plan"], module, Device())
    context = engine.context(0, Replay.NEVER)
    with pytest.raises(
        BackendError, match=r"vision\.plan: tensorrt-rtx 1\.7.* refuses shape \[9, 3\] for pixel_values"
    ):
        context.reshape("pixel_values", (9, 3))
    with pytest.raises(BackendError, match=r"does not take optimisation profile 3: .*profile 3 does not exist"):
        engine.context(3, Replay.NEVER)
    with pytest.raises(BackendError, match=r"refuses the address of pixel_values: .*aligned"):
        context.bind("pixel_values", 1)
    with pytest.raises(BackendError, match=r"cannot run: .*no shape or address for"):
        context.run()


def test_contexts_of_both_engines_share_memory_and_kernels(fake_gpu: FakeGpu, directory: Path) -> None:
    engines = open_plans(directory, ["vision.plan", "decoder.plan"], import_tensorrt("tensorrt-rtx"), Device())
    assert len(fake_gpu.memory.device) == 0
    contexts = [engines[0].context(0, Replay.NEVER), engines[1].context(0, Replay.NEVER)]
    contexts.append(engines[1].context(1, Replay.BY_TENSORRT))
    (size,) = (block.nbytes for block in fake_gpu.memory.device.values())
    assert size == max(engines[1]._engine.get_device_memory_size_for_profile_v2(i) for i in range(2))
    assert len({context._context._scratch for context in contexts}) == 1
    assert all(context._context._managed for context in contexts)
    modes = [context._context._config.cuda_graph_strategy.name for context in contexts]
    assert modes == ["DISABLED", "DISABLED", "WHOLE_GRAPH_CAPTURE"]
    assert len({id(context._context._config._cache) for context in contexts}) == 1  # kernels are compiled once


def test_what_tensorrt_says_of_one_engine_to_the_logger_of_the_process_is_passed_on(
    fake_gpu: FakeGpu, directory: Path
) -> None:
    """It keeps the first logger: there is one for both engines."""
    module = import_tensorrt("tensorrt-rtx")
    vision, decoder = open_plans(directory, ["vision.plan", "decoder.plan"], module, Device())
    vision._engine._logger.log(module.api.ILogger.ERROR, "Error Code 2: OutOfMemory")
    assert isinstance(decoder.failure("cannot run"), DeviceMemoryError)


def test_the_real_module_reads_a_mapped_file(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """As far as it goes without a GPU: it takes the buffer, and its reason to refuse comes back in our error."""
    (tmp_path / "plan").write_bytes(b"not a plan" * 100)
    module, device = TensorRtModule("tensorrt-rtx", tensorrt_rtx, tensorrt_rtx.__version__), Device()
    with (
        (tmp_path / "plan").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        pytest.raises(BackendError, match=r"a plan: tensorrt-rtx 1\.\S+ cannot be deserialised: .*Serialization"),
    ):
        Engine("a plan", plan, Runtime(module, device, RECIPE))


def test_inputs_and_outputs_are_the_contracts(fake_gpu: FakeGpu, directory: Path, demo_bundle: Path) -> None:
    """An engine of another model, whose shapes would be bound as if it were this one."""
    manifest = read_manifest(demo_bundle)
    vision, decoder = open_plans(directory, ["vision.plan", "decoder.plan"], import_tensorrt("tensorrt-rtx"), Device())
    vision.require(manifest.vision.spec())
    decoder.require(manifest.decoder.spec())
    with pytest.raises(BackendError, match=r"not of this model: its inputs and outputs differ in .*pixel_values"):
        vision.require(manifest.decoder.spec())
    with pytest.raises(BackendError, match=r"differ in past\.\d\.key, .*present\.\d\.value$"):
        decoder.require(replace(manifest.decoder, layers=manifest.decoder.layers + 1).spec())
    with pytest.raises(BackendError, match=r"want float16\['batch', 'seq', \d+\] for inputs_embeds, found FLOAT"):
        decoder.require(replace(manifest.decoder, dtype="float16").spec())
    with pytest.raises(BackendError, match=r"want float32\['batch', 9\] for logits, found FLOAT\[-1, "):
        decoder.require(replace(manifest.decoder, vocab_size=9).spec())
