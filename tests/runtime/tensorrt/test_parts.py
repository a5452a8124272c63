"""A decoder in several plans on the fake GPU: the tokens of ONNX Runtime, and plans that do not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES
from llava_deploy.engines.errors import BackendError, BundleError
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt_module import TensorRtBackend
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.runtime import Llava
from llava_deploy.runtime.tensorrt.cuda import DeviceMemoryError

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

FORMS: dict[str, tuple[TensorRtBackend, str]] = {
    "in-place": ("tensorrt", "11.4.0.106"),
    "replayed by TensorRT": ("tensorrt-rtx", "1.7.1.116"),
    "growing": ("tensorrt", "10.3.0.26"),
}
PARTS = [(4,), (3, 1), (1, 2, 1)]
MAX_LEN = 200


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own, without engines."""
    return shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))


@pytest.fixture(scope="module")
def asked() -> tuple[list[str], list[list[Any]]]:
    scenes = [*islice(examples(Split.HELD_OUT, seed=7), 3)]
    prompts = [f"USER: <image>\n{scene.question} ASSISTANT:" for scene in scenes]
    return [*prompts, "hello"], [*([scene.picture] for scene in scenes), []]


@pytest.fixture(scope="module")
def wanted(demo_bundle: Path, asked: tuple[list[str], list[list[Any]]]) -> list[tuple[int, ...]]:
    """ONNX Runtime's tokens."""
    llava = Llava.load(demo_bundle, backend="onnxruntime", threads=1, max_len=MAX_LEN)
    return [answer.token_ids for answer in llava.generate(*asked, max_new_tokens=30)]


def load(bundle: Path, gpu: FakeGpu, form: str, parts: tuple[int, ...]) -> Llava:
    backend, version = FORMS[form]
    gpu.provide(backend.replace("-", "_"), version)
    cache: CacheForm = "growing" if form == "growing" else "in-place"
    gpu.write_engine(bundle, backend=backend, version=version, cache=cache, parts=parts)
    return Llava.load(bundle, backend=backend, max_len=MAX_LEN)


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: f"in {len(parts)}")
@pytest.mark.parametrize("form", FORMS)
def test_the_same_tokens_in_any_number_of_parts(
    bundle: Path, fake_gpu: FakeGpu, form: str, parts: tuple[int, ...], asked: Any, wanted: list[tuple[int, ...]]
) -> None:
    """Rows of one batch, and each alone, over the end of a bucket of slots."""
    llava = load(bundle, fake_gpu, form, parts)
    prompts, images = asked
    assert [answer.token_ids for answer in llava.generate(prompts, images, max_new_tokens=30)] == wanted
    for prompt, pictures, tokens in zip(prompts, images, wanted, strict=True):
        assert llava.generate([prompt], [pictures], max_new_tokens=30)[0].token_ids == tokens
    assert len(fake_gpu.engines) == 1 + len(parts)
    del llava
    assert fake_gpu.live() == {}


@pytest.mark.parametrize("at", [2, 4])
def test_a_request_that_fails_between_the_parts_fails_alone(
    bundle: Path, fake_gpu: FakeGpu, at: int, wanted: list[tuple[int, ...]]
) -> None:
    """At the second part of the prompt, and of the first token after it."""
    llava = load(bundle, fake_gpu, "in-place", (2, 2))
    fake_gpu.fail("execute_async_v3", at)
    with pytest.raises(DeviceMemoryError, match=r"decoder-2-of-2\.plan: .* cannot run"):
        llava.generate(["hello"], max_new_tokens=30)
    assert llava.generate(["hello"], max_new_tokens=30)[0].token_ids == wanted[3]


def test_hidden_states_want_their_memory(bundle: Path, fake_gpu: FakeGpu) -> None:
    llava = load(bundle, fake_gpu, "in-place", (2, 2))
    failures = []
    for at in range(1, 9):
        fake_gpu.fail("cudaMalloc", at)
        try:
            llava.generate(["hello there"], max_new_tokens=2)
        except DeviceMemoryError as error:
            failures.append(str(error))
        llava.decoder.clear()
    (said,) = (words for words in failures if words.startswith("hidden states between the parts of the decoder: want "))
    assert "fewer prompts at once" in said


@pytest.fixture
def engine(bundle: Path, fake_gpu: FakeGpu) -> Path:
    """Of three parts, for TensorRT for RTX."""
    return fake_gpu.write_engine(bundle, parts=(1, 2, 1))


@pytest.mark.parametrize("name", [f"decoder-{i}-of-3.plan" for i in (1, 2, 3)])
def test_a_part_that_was_altered_or_is_missing_is_refused(
    bundle: Path, engine: Path, fake_gpu: FakeGpu, name: str
) -> None:
    plan = engine / name
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + b" ")
    with pytest.raises(BundleError, match=rf"{name}: .* the file was altered; build it again with: llava-deploy build"):
        Llava.load(bundle, backend="tensorrt-rtx")
    plan.unlink()
    with pytest.raises(BundleError, match=f"{name}: cannot be read"):
        Llava.load(bundle, backend="tensorrt-rtx")
    assert fake_gpu.calls["deserialize_cuda_engine"] <= 6  # of those before it
    plan.write_bytes(content)
    manifest = json.loads((engine / ENGINE_MANIFEST).read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != name]
    (engine / ENGINE_MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"want {name} in its manifest, found \["):
        Llava.load(bundle, backend="tensorrt-rtx")


def rewritten(engine: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((engine / ENGINE_MANIFEST).read_text())
    change(manifest)
    (engine / ENGINE_MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (
            [1, 1, 2],
            r"decoder-2-of-3\.plan: not of this model: its inputs and outputs differ in hidden_states\.2, hidd",
        ),
        ([1, 2, 2], "want engines of 4 layers, found 3 where its manifest has parts of 1, 2, 2 layers"),
    ],
)
def test_parts_of_another_cut_are_refused(bundle: Path, engine: Path, parts: list[int], problem: str) -> None:
    rewritten(engine, lambda manifest: manifest["key"]["tensorrt"].update(parts=parts))
    with pytest.raises(BackendError, match=problem):
        Llava.load(bundle, backend="tensorrt-rtx")


def test_a_manifest_of_no_parts_is_refused(bundle: Path, engine: Path) -> None:
    for parts in ([], [4, 0]):
        rewritten(engine, lambda manifest, parts=parts: manifest["key"]["tensorrt"].update(parts=parts))
        with pytest.raises(BundleError, match="want parts of one layer at least"):
            Llava.load(bundle, backend="tensorrt-rtx")


def test_one_block_of_activations_is_shared_and_hidden_states_take_turns(bundle: Path, fake_gpu: FakeGpu) -> None:
    """What three parts take more than one are two buffers of hidden states, for the longest piece of a prompt."""
    taken = []
    for parts in ((4,), (2, 2), (1, 1, 1, 1)):
        fake_gpu.write_engine(bundle, bundle / ENGINES / "tensorrt-rtx-1.7.1.116-sm89", parts=parts)
        llava = Llava.load(bundle, backend="tensorrt-rtx", max_len=MAX_LEN)
        answer = llava.generate(["hello"], max_new_tokens=3)[0]
        assert np.isfinite(answer.timings.prefill)
        taken.append(fake_gpu.memory.used)
        hidden, seq = llava.manifest.decoder.hidden_size, llava.decoder.max_seq
        del llava, answer
        assert fake_gpu.live() == {}
        shutil.rmtree(bundle / ENGINES)
    assert [size - taken[0] for size in taken] == [0, 4 * hidden * seq, 2 * 4 * hidden * seq]
