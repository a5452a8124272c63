"""A decoder built in parts with TensorRT for RTX: what is there, what is kept, and what an end in the middle leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, read_engine_manifest
from llava_deploy.engines.errors import BackendError, BundleError, LlavaDeployError, OptionError
from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, read_manifest
from llava_deploy.engines.planner import parts as planner
from llava_deploy.engines.tensorrt import builder, checks
from llava_deploy.engines.tensorrt.builder import build_tensorrt
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions
from llava_deploy.engines.tensorrt.progress import BuildProgress

PLANS = ["decoder-1-of-2.plan", "decoder-2-of-2.plan", "vision.plan"]
BundleOf = Callable[[str, str], Path]


def options(**changes: Any) -> TensorRtBuildOptions:
    return TensorRtBuildOptions("tensorrt-rtx", **{"capabilities": ("sm89",), "max_len": 64, "parts": 2, **changes})


def copied(bundle: Path, place: Path) -> Path:
    return shutil.copytree(bundle, place / "bundle", ignore=shutil.ignore_patterns(ENGINES))


def engines(bundle: Path) -> list[str]:
    """Everything beside the engines, hidden or not."""
    return sorted(path.name for path in (bundle / ENGINES).iterdir()) if (bundle / ENGINES).exists() else []


@pytest.fixture(scope="module")
def built(bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in int4 with zero points, and its engines in two parts; tests copy it."""
    bundle = copied(bundle_of("llava-1.5", "int4 asymmetric"), tmp_path_factory.mktemp("built"))
    build_tensorrt(bundle, options())
    return bundle


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a build but TensorRT's part, which writes some bytes."""
    monkeypatch.setattr(builder, "serialize", lambda *arguments: bool(arguments[-1].write_bytes(bytes(1000))))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("release", [None, "10.3"])
@pytest.mark.parametrize(
    ("family", "stored"),
    [
        ("all biases, linear rope", "int4 asymmetric"),
        ("llava-1.5", "int4-awq, int8 head"),
        ("one key head, tied embeddings", "int4 act-order"),
    ],
)
def test_parts_are_read_as_written(
    family: str, stored: str, release: str | None, bundle_of: BundleOf, tmp_path: Path
) -> None:
    """Held against the contract of a part, its layers and its quantised weights, by the build itself."""
    build_tensorrt(copied(bundle_of(family, stored), tmp_path), options(release=release))


def test_parts_are_built_in_halves_and_in_int4(built: Path, bundle_of: BundleOf, tmp_path: Path) -> None:
    fp16 = copied(bundle_of("llava-1.5", "fp16"), tmp_path)
    build_tensorrt(fp16, options())
    for bundle in (fp16, built):
        (directory,) = (bundle / ENGINES).iterdir()
        manifest = read_engine_manifest(directory)
        assert sorted(path.name for path in directory.iterdir()) == sorted([*PLANS, ENGINE_MANIFEST])
        assert manifest.files == tuple(describe_file(directory, name) for name in PLANS)
        assert manifest.key.tensorrt is not None
        assert manifest.key.tensorrt.parts == (1, 1)


def test_a_layer_of_another_part_is_seen(bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = checks.expected_decoder
    monkeypatch.setattr(builder, "expected_decoder", lambda layers, *rest: expected(range(1), *rest))
    with pytest.raises(BackendError, match=r"graph 'decoder, layers 1 to 1': .* 'past\.1\.key' to 'present\.1\.key'"):
        build_tensorrt(copied(bundle_of("llava-1.5", "fp16"), tmp_path), options())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", PLANS[:2])
def test_a_part_that_is_altered_missing_or_not_listed_is_built_anew(built: Path, tmp_path: Path, name: str) -> None:
    for damage in ("altered", "missing", "not listed"):
        bundle = shutil.copytree(built, tmp_path / damage)
        (directory,) = (bundle / ENGINES).iterdir()
        plan, where = directory / name, directory / ENGINE_MANIFEST
        before = (directory / "vision.plan").stat().st_ino
        build_tensorrt(bundle, options())
        assert (directory / "vision.plan").stat().st_ino == before  # kept, as it was whole
        if damage == "altered":
            plan.write_bytes(plan.read_bytes()[:-1] + b" ")
        elif damage == "missing":
            plan.unlink()
        else:
            content = json.loads(where.read_text())
            content["files"] = [entry for entry in content["files"] if entry["path"] != name]
            where.write_text(json.dumps(content))
        build_tensorrt(bundle, options())
        assert plan.read_bytes() == bytes(1000)
        assert [entry.path for entry in read_engine_manifest(directory).files] == PLANS


@pytest.mark.usefixtures("quick")
def test_another_number_of_parts_is_another_engine_and_the_same_by_default_is_not(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    (directory,) = (bundle / ENGINES).iterdir()
    kept = read_engine_manifest(directory)
    monkeypatch.setattr(planner, "LARGEST_PART", 40_000)  # half of its decoder
    build_tensorrt(bundle, options(parts=None))
    assert read_engine_manifest(directory) == kept
    monkeypatch.undo()
    monkeypatch.setattr(builder, "serialize", lambda *arguments: bool(arguments[-1].write_bytes(bytes(1000))))
    build_tensorrt(bundle, options(parts=None))
    assert sorted(path.name for path in directory.iterdir()) == ["decoder.plan", ENGINE_MANIFEST, "vision.plan"]


@pytest.mark.parametrize("parts", [0, 3, -1])
def test_a_number_of_parts_that_cannot_be(bundle_of: BundleOf, tmp_path: Path, parts: int) -> None:
    bundle = copied(bundle_of("llava-1.5", "fp16"), tmp_path)
    with pytest.raises(OptionError) as raised:
        build_tensorrt(bundle, options(parts=parts))
    assert (raised.value.option, raised.value.reason) == ("parts", f"want 1 to 2 (layers of the decoder), got {parts}")
    assert engines(bundle) == []


def test_a_manifest_that_counts_other_weights_is_refused(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = copied(bundle_of("llava-1.5", "int4 symmetric"), tmp_path)
    content = json.loads((bundle / MANIFEST_NAME).read_text())
    content["quantization"]["weights"] += 1
    (bundle / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"want 15 quantised weights, as its manifest says, found 14; export"):
        build_tensorrt(bundle, options())


@pytest.mark.usefixtures("quick")
def test_one_part_is_done_with_before_the_next(
    bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a graph is parsed, lowered files are its own alone, and links lead to the bundle's weights."""
    bundle = copied(bundle_of("llava-1.5", "int4 asymmetric"), tmp_path)
    seen, parse = [], builder.parse_network

    def look(module: Any, path: Path, messages: Any) -> Any:
        staging = path.parent.parent
        assert path.with_name(f"{path.name}.data").resolve() == (bundle / f"{path.name}.data").resolve()
        computed = path.with_name(f"{path.name}.computed").stat().st_size
        seen.append((sorted(entry.name for entry in staging.iterdir()), computed))
        return parse(module, path, messages)

    told: list[BuildProgress] = []
    monkeypatch.setattr(builder, "parse_network", look)
    build_tensorrt(bundle, options(), on_progress=told.append)
    assert [names for names, _ in seen] == [[*PLANS[:i], "lowered"] for i in range(3)]
    first, second, tower = (size for _, size in seen)
    assert first == second > tower
    assert list(dict.fromkeys(each.what for each in told)) == [
        *("decoder, layers 0 to 0", "decoder, layers 1 to 1"), "vision",
    ]  # fmt: skip
    done = [each.done for each in told]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, told[-1].total)


SCRIPT = """
import signal, sys
from pathlib import Path
from llava_deploy.engines.tensorrt.builder import build_tensorrt
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions
signal.signal(signal.SIGINT, signal.default_int_handler)
options = TensorRtBuildOptions("tensorrt-rtx", capabilities=("sm89",), max_len=64, parts=2)
build_tensorrt(Path(sys.argv[1]), options, on_progress=lambda p: print(p.what, "|", p.phase, flush=True))
"""


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_second_part(
    bundle_of: BundleOf, tmp_path: Path, child_environment: dict[str, str], how: signal.Signals
) -> None:
    bundle = copied(bundle_of("llava-1.5", "int4 asymmetric"), tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(bundle)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("decoder, layers 1 to 1 | Parsing"):
                break
        time.sleep(0.1)  # in the parser, or about to be
        os.kill(process.pid, how)
        process.communicate(timeout=60)
    assert process.returncode == -how
    left = engines(bundle)
    assert all(name.startswith(".") for name in left)
    assert how != signal.SIGINT or left == []
    output = build_tensorrt(bundle, options())  # sweeps
    assert engines(bundle) == [output.name]


def test_the_disk_wants_room_for_one_parts_computed_weights(
    bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copied(bundle_of("llava-1.5", "int4 asymmetric"), tmp_path)
    manifest, wanted = read_manifest(bundle), []
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for parts in (1, 2):
        with pytest.raises(LlavaDeployError) as raised:
            build_tensorrt(bundle, options(parts=parts))
        wanted.append(int(str(raised.value).split("wants ")[1].split(" bytes")[0].replace(",", "")))
    engine = sum(entry.size for entry in manifest.files if ".onnx" in entry.path)
    decoder = manifest.entry("decoder.onnx.data").size
    assert wanted[0] - engine == pytest.approx(decoder, rel=0.1)
    assert 0.5 * decoder < wanted[1] - engine < wanted[0] - engine  # the output layer is most of it
