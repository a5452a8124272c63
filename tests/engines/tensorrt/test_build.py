"""From a bundle to engines with TensorRT for RTX, which needs no GPU for it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tensorrt_rtx

from llava_deploy.engines.engine_manifest import (
    ENGINE_MANIFEST,
    ENGINES,
    VISION_PLAN,
    EngineKey,
    read_engine_manifest,
    source_digest,
)
from llava_deploy.engines.errors import BackendError, BundleError, LlavaDeployError, OptionError
from llava_deploy.engines.manifest import TOKENIZER, describe_file, read_manifest
from llava_deploy.engines.tensorrt import builder
from llava_deploy.engines.tensorrt.builder import build_tensorrt
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions, resolve_limits
from llava_deploy.engines.tensorrt.progress import BuildProgress
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

VERSION = tensorrt_rtx.__version__
DECODER_PLAN = "decoder.plan"
NAME = f"tensorrt-rtx-{VERSION}-sm89"


def options(**changes: Any) -> TensorRtBuildOptions:
    return TensorRtBuildOptions("tensorrt-rtx", **{"capabilities": ("sm89",), "max_len": 64, **changes})


def copied(bundle: Path, place: Path) -> Path:
    return shutil.copytree(bundle, place / "bundle", ignore=shutil.ignore_patterns(ENGINES))


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A bundle of its own in int4 with zero points, without engines."""
    return copied(bundle_of("llava-1.5", "int4 asymmetric"), tmp_path)


@pytest.fixture(scope="module")
def built(bundle_of: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a bundle with engines; tests only read it, or copy it."""
    bundle = copied(bundle_of("llava-1.5", "int4 asymmetric"), tmp_path_factory.mktemp("built"))
    build_tensorrt(bundle, options())
    return bundle


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a build but TensorRT's part, which writes some bytes: for what happens around it."""

    def write(*arguments: Any) -> bool:
        arguments[-1].write_bytes(bytes(1000))
        return True

    monkeypatch.setattr(builder, "serialize", write)


@pytest.fixture
def unbuildable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets as far as TensorRT's parser has gone too far."""

    def refuse(*_: object) -> None:
        raise AssertionError("a build has begun")

    monkeypatch.setattr(builder, "parse_network", refuse)


def names(bundle: Path) -> list[str]:
    """Everything beside the engines, hidden or not."""
    return sorted(path.name for path in (bundle / ENGINES).iterdir()) if (bundle / ENGINES).exists() else []


def inode(bundle: Path) -> int:
    """Which file the decoder is, whatever its contents."""
    return (bundle / ENGINES / NAME / DECODER_PLAN).stat().st_ino


def test_the_manifest_says_what_the_engines_are(built: Path) -> None:
    directory = built / ENGINES / NAME
    manifest = read_manifest(built)
    limits = resolve_limits(options(), manifest)
    recipe = TensorRtRecipe(
        "1.7", "in-place", (2,), limits, ("sm89",), None, version_compatible=False, refittable=False
    )
    engine = read_engine_manifest(directory)
    assert engine.key == EngineKey("tensorrt-rtx", VERSION, "sm89", source_digest(manifest), None, recipe)
    assert engine.files == tuple(describe_file(directory, name) for name in (DECODER_PLAN, VISION_PLAN))
    assert engine.tools.keys() == {"llava-deploy", "onnx-ir"}
    assert sorted(path.name for path in directory.iterdir()) == sorted([DECODER_PLAN, VISION_PLAN, ENGINE_MANIFEST])
    assert names(built) == [NAME]


@pytest.mark.usefixtures("quick")
def test_a_whole_engine_is_kept_and_replaced_on_demand(built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    before = inode(bundle)
    assert build_tensorrt(bundle, options()) == bundle / ENGINES / NAME
    assert inode(bundle) == before
    build_tensorrt(bundle, options(), replace=True)
    assert inode(bundle) != before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("changes", [{"max_len": 32}, {"max_batch": 2}, {"workspace": 1 << 30}, {"release": "10.3"}])
def test_engines_for_something_else_are_built_anew(built: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    before = read_engine_manifest(bundle / ENGINES / NAME)
    build_tensorrt(bundle, options(**changes))
    after = read_engine_manifest(bundle / ENGINES / NAME)
    assert after.key != before.key
    assert after.files != before.files
    assert names(bundle) == [NAME]
    assert after.key.tensorrt is not None
    assert after.key.tensorrt.cache == ("growing" if "release" in changes else "in-place")


@pytest.mark.usefixtures("quick")
def test_an_engine_of_another_releases_operators_is_built_anew(built: Path, tmp_path: Path) -> None:
    """Both caches grow, but the towers differ."""
    bundle = shutil.copytree(built, tmp_path / "bundle")
    build_tensorrt(bundle, options(release="10.14"))
    before = inode(bundle)
    build_tensorrt(bundle, options(release="10.14"))
    assert inode(bundle) == before
    build_tensorrt(bundle, options(release="10.3"))
    assert inode(bundle) != before


@pytest.mark.usefixtures("quick")
def test_a_damaged_engine_is_built_anew(built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    plan = bundle / ENGINES / NAME / DECODER_PLAN
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    build_tensorrt(bundle, options())
    assert plan.read_bytes() != content


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("files", [[], [DECODER_PLAN], [VISION_PLAN]])
def test_an_engine_whose_manifest_lacks_a_plan_is_built_anew(built: Path, tmp_path: Path, files: list[str]) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    where = bundle / ENGINES / NAME / ENGINE_MANIFEST
    content = json.loads(where.read_text())
    content["files"] = [entry for entry in content["files"] if entry["path"] in files]
    where.write_text(json.dumps(content))
    build_tensorrt(bundle, options())
    assert len(read_engine_manifest(where.parent).files) == 2


def test_engines_for_several_gpus_have_a_place_of_their_own(bundle: Path) -> None:
    output = build_tensorrt(bundle, options(capabilities=("12.0", "sm_80", "80")))
    assert output.name == f"tensorrt-rtx-{VERSION}-sm80-sm120"
    assert read_engine_manifest(output).key.device == "sm80-sm120"


def test_progress_never_goes_back_and_ends_whole(bundle: Path) -> None:
    told: list[BuildProgress] = []
    build_tensorrt(bundle, options(), on_progress=told.append)
    done = [progress.done for progress in told]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, told[-1].total)
    assert list(dict.fromkeys(progress.what for progress in told)) == ["decoder", "vision"]
    assert told[0].phase == "Lowering the graph"


@pytest.mark.usefixtures("quick")
def test_a_float_bundle_writes_no_weight_but_the_plans(
    bundle_of: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowered graphs link to the bundle's data; only what a pass computes is written, and it goes again."""
    bundle = copied(bundle_of("llava-1.5", "fp16"), tmp_path)
    seen: dict[str, tuple[bool, int]] = {}
    parse = builder.parse_network

    def look(module: Any, path: Path, messages: Any) -> Any:
        data = path.with_name(f"{path.name}.data")
        written = sum(file.stat().st_size for file in path.parent.iterdir() if not file.is_symlink() and file != path)
        seen[path.name] = data.resolve() == (bundle / data.name).resolve(), written
        return parse(module, path, messages)

    monkeypatch.setattr(builder, "parse_network", look)
    build_tensorrt(bundle, options())
    assert seen == {"vision.onnx": (True, 0), "decoder.onnx": (True, 0)}


@pytest.mark.usefixtures("unbuildable")
@pytest.mark.parametrize(
    ("changes", "option", "reason"),
    [
        ({"max_len": 129}, "max_len", "want 1 to 128 (positions of the model), got 129"),
        ({"max_batch": 2, "opt_batch": 4}, "opt_batch", "want 1 to 2 (--max-batch), got 4"),
        ({"workspace": 0}, "workspace", "want 1 byte to 1,048,576 MiB, got 0 bytes"),
        ({"capabilities": ("ada",)}, "sm", "want compute capabilities such as sm89 or 8.9, got 'ada'"),
        ({"capabilities": ("sm89", "sm70")}, "sm", "not for sm70; use --backend tensorrt on such a GPU"),
        ({"capabilities": ()}, "sm", "want the compute capabilities to build for, such as sm89, for there is no GPU"),
        ({"refit": True}, "refit", "needs a GPU while it builds engines that can be refitted: no GPU can be used here"),
        ({"version_compatible": True}, "version_compatible", "has no lean runtime to put into its engines"),
        ({"timing_cache": Path("cache")}, "timing_cache", "measures no kernels while it builds; leave it out"),
        ({"release": "9.9"}, "trt_version", "want a release of TensorRT from 10.3 on"),
    ],
)
def test_options_that_cannot_be(bundle: Path, changes: dict[str, Any], option: str, reason: str) -> None:
    with pytest.raises(OptionError) as raised:
        build_tensorrt(bundle, options(**changes))
    assert raised.value.option == option
    assert reason in raised.value.reason
    assert names(bundle) == []


@pytest.mark.usefixtures("unbuildable")
def test_a_damaged_bundle_is_not_built(bundle: Path) -> None:
    (bundle / TOKENIZER).write_text("{}")
    with pytest.raises(BundleError, match="export the bundle again"):
        build_tensorrt(bundle, options())
    assert names(bundle) == []


@pytest.mark.usefixtures("unbuildable")
@pytest.mark.parametrize(("backend", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_without_the_module(bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=rf"install it with: pip install 'llava-deploy\[{extra}\]'"):
        build_tensorrt(bundle, TensorRtBuildOptions(backend))


@pytest.mark.usefixtures("unbuildable")
def test_a_release_that_is_too_old_or_asked_for_and_not_there(bundle: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.provide("tensorrt", "10.1.0")
    with pytest.raises(BackendError, match=r"want TensorRT 10\.3 or later, found TensorRT 10\.1\.0, which lacks"):
        build_tensorrt(bundle, TensorRtBuildOptions("tensorrt"))
    fake_gpu.provide("tensorrt", "10.3.0")
    with pytest.raises(OptionError, match=r"up to the one installed, TensorRT 10\.3\.0, got 10\.15") as raised:
        build_tensorrt(bundle, TensorRtBuildOptions("tensorrt", release="10.15"))
    assert raised.value.option == "trt_version"


def test_without_what_lowers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llava_deploy.engines.lowering")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(BackendError, match=r"needs onnx-ir, .* install it with: pip install 'llava-deploy\[build\]'"):
        build_tensorrt(bundle, options())
    assert names(bundle) == []


@pytest.mark.usefixtures("quick")
def test_engines_of_an_older_format_are_built_anew(built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    path = bundle / ENGINES / NAME / ENGINE_MANIFEST
    engine = json.loads(path.read_text())
    path.write_text(json.dumps({**engine, "format_version": 1}))
    build_tensorrt(bundle, options())
    assert read_engine_manifest(bundle / ENGINES / NAME).format_version == engine["format_version"]


@pytest.mark.usefixtures("unbuildable")
def test_too_little_memory_is_said_before_anything_begins(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_deploy.engines.tensorrt.memory.available_memory", lambda: 1_000_000)
    with pytest.raises(LlavaDeployError, match=r"is planned to take .* of memory, 1,000,000 are free; free some, "):
        build_tensorrt(bundle, options())
    assert names(bundle) == []


@pytest.mark.usefixtures("quick")
def test_too_little_memory_and_on_with_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_deploy.engines.tensorrt.memory.available_memory", lambda: 1_000_000)
    said: list[str] = []
    build_tensorrt(bundle, options(skip_memory_check=True), on_warning=said.append)
    (line,) = said
    assert line.endswith("bytes of memory, 1,000,000 are free; going on")
    assert names(bundle) == [NAME]
