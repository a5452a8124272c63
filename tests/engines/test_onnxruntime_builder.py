from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from llava_deploy.engines import engine_manifest, onnxruntime_builder
from llava_deploy.engines.contract import GraphSpec
from llava_deploy.engines.engine_manifest import (
    ENGINE_MANIFEST,
    ENGINES,
    EngineKey,
    read_engine_manifest,
    source_digest,
)
from llava_deploy.engines.errors import BackendError, BundleError
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.manifest import (
    DECODER_GRAPH,
    MANIFEST_NAME,
    TOKENIZER,
    VISION_GRAPH,
    FileEntry,
    read_manifest,
)
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.demo.scenes import Split, examples
from llava_deploy.runtime import Llava
from llava_deploy.runtime.backend_choice import OnnxRuntimeChoice, choose_onnxruntime
from llava_deploy.runtime.bundle import open_bundle

VERSION = onnxruntime.__version__
NAME = f"onnxruntime-{VERSION}-cpu"
QUESTIONS = 16


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own, without engines."""
    return shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))


@pytest.fixture(scope="module")
def built(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its engine; tests only read it, or copy it."""
    place = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(demo_bundle, place, ignore=shutil.ignore_patterns(ENGINES))
    build_onnxruntime(place)
    return place


def choice(bundle: Path) -> OnnxRuntimeChoice:
    return choose_onnxruntime(open_bundle(bundle), VERSION, None, Integrity.FULL)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def run(model: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs; a decoder's caches are written in place, as the runtime has it."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    arrays = {name: array.copy() for name, array in feed.items()}  # an OrtValue does not own an array's memory
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for wanted in session.get_inputs():  # an engine may want fewer than the canonical graph
        binding.bind_ortvalue_input(wanted.name, values[wanted.name])
    names = [output.name for output in session.get_outputs()]
    for name in names:
        if name.startswith("present."):
            binding.bind_ortvalue_output(name, values[name.replace("present.", "past.")])
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)
    return {name: value.numpy().copy() for name, value in zip(names, binding.get_outputs(), strict=True)}


def random_feed(spec: GraphSpec, sizes: dict[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random numbers for every float input; the decoder's others as in a second piece of a prompt, rows ragged."""
    batch, seq, total = (sizes.get(name, 1) for name in ("batch", "seq", "total"))
    begin = np.array([total - seq, 1], np.int64)[:batch]
    positions = begin[:, None] + np.arange(seq)
    feed: dict[str, np.ndarray] = {
        "position_ids": positions,
        "write_indices": begin,
        "attention_mask": np.arange(total) <= positions[:, None, :, None],
        "last_index": np.array([seq - 1, 0], np.int64)[:batch],
    }
    for tensor in spec.inputs:
        if tensor.name not in feed:
            shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
            feed[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    feed = {tensor.name: feed[tensor.name] for tensor in spec.inputs}
    spec.check(feed)
    return feed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("graph", [VISION_GRAPH, DECODER_GRAPH])
def test_same_numbers_as_the_canonical_graph(built: Path, graph: str, seed: int) -> None:
    manifest = read_manifest(built)
    spec = manifest.vision.spec() if graph == VISION_GRAPH else manifest.decoder.spec()
    sizes = {"images": 1 + seed, "batch": 2, "seq": 1 + 2 * seed, "total": 9, "max_len": 16}
    feed = random_feed(spec, sizes, np.random.default_rng(seed))
    before, after = run(built / graph, feed), run(built / ENGINES / NAME / graph, feed)
    assert list(before) == list(after) == [tensor.name for tensor in spec.outputs]
    for name, want in before.items():
        assert after[name].dtype == want.dtype
        scale = float(np.abs(want).max())
        np.testing.assert_allclose(after[name], want, rtol=0, atol=1e-5 * max(1.0, scale), err_msg=name)


def test_the_engine_answers_as_the_canonical_graphs_do(built: Path, bundle: Path) -> None:
    def answers(directory: Path, size: int) -> list[list[int]]:
        llava = Llava.load(directory, threads=1)
        drawn = [*islice(examples(Split.HELD_OUT, 3), QUESTIONS)]
        found = []
        for at in range(0, QUESTIONS, size):
            some = drawn[at : at + size]
            prompts = [f"USER: <image>\n{example.question} ASSISTANT:" for example in some]
            given = llava.generate(prompts, images=[[example.picture] for example in some], max_new_tokens=24)
            found += [list(answer.token_ids) for answer in given]
        return found

    for size in (1, 4):
        assert answers(built, size) == answers(bundle, size)


def test_the_runtime_takes_the_engine_and_says_so(built: Path) -> None:
    chosen = choice(built)
    assert chosen.vision == built / ENGINES / NAME / VISION_GRAPH
    assert chosen.decoder == built / ENGINES / NAME / DECODER_GRAPH
    assert chosen.reason == f"ONNX Runtime {VERSION} on the CPU, engine {NAME}"


def test_without_an_engine_the_canonical_graphs_run(bundle: Path) -> None:
    chosen = choice(bundle)
    assert (chosen.vision, chosen.decoder) == (bundle / VISION_GRAPH, bundle / DECODER_GRAPH)
    assert "canonical graphs; llava-deploy build makes it start sooner" in chosen.reason


def test_the_engines_manifest_lists_every_file(built: Path) -> None:
    directory = built / ENGINES / NAME
    engine = read_engine_manifest(directory)
    assert engine.key == EngineKey("onnxruntime", VERSION, "cpu", source_digest(read_manifest(built)), None, None)
    assert {f.path: f.sha256 for f in engine.files} == {
        name: digest for name, digest in digests(directory).items() if name != ENGINE_MANIFEST
    }
    assert sorted(path.name for path in (built / ENGINES).iterdir()) == [NAME]


def test_the_canonical_files_are_left_as_they_were(demo_bundle: Path, built: Path) -> None:
    for entry in read_manifest(demo_bundle).files:
        assert (built / entry.path).read_bytes() == (demo_bundle / entry.path).read_bytes()


def test_a_whole_engine_is_kept_and_replaced_on_demand(built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    before = inode(bundle)
    assert build_onnxruntime(bundle) == bundle / ENGINES / NAME
    assert inode(bundle) == before
    build_onnxruntime(bundle, replace=True)
    assert inode(bundle) != before


def inode(bundle: Path) -> int:
    """Which file the decoder is, whatever its contents."""
    return (bundle / ENGINES / NAME / DECODER_GRAPH).stat().st_ino


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (f"{DECODER_GRAPH}.data", alter),
        (VISION_GRAPH, lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (DECODER_GRAPH, Path.unlink),
        (ENGINE_MANIFEST, Path.unlink),
        (ENGINE_MANIFEST, lambda path: path.write_text("{")),
    ],
)
def test_a_damaged_engine_is_refused_and_then_rebuilt(built: Path, tmp_path: Path, name: str, damage: Any) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    damage(bundle / ENGINES / NAME / name)
    with pytest.raises(BundleError, match="build it again with: llava-deploy build"):
        choice(bundle)
    build_onnxruntime(bundle)
    assert choice(bundle).reason.endswith(f"engine {NAME}")


def test_an_engine_of_another_version_is_not_used(built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    (bundle / ENGINES / NAME).rename(bundle / ENGINES / "onnxruntime-0.9-cpu")
    chosen = choice(bundle)
    assert chosen.decoder == bundle / DECODER_GRAPH
    assert "canonical graphs" in chosen.reason
    build_onnxruntime(bundle)
    assert sorted(path.name for path in (bundle / ENGINES).iterdir()) == ["onnxruntime-0.9-cpu", NAME]


def test_an_engine_of_other_weights_is_not_used_and_is_rebuilt(built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    path = bundle / ENGINES / NAME / ENGINE_MANIFEST
    engine = json.loads(path.read_text())
    engine["key"]["source"] = "0" * 64
    path.write_text(json.dumps(engine))
    chosen = choice(bundle)
    assert chosen.vision == bundle / VISION_GRAPH
    assert chosen.reason.endswith(f"canonical graphs: {NAME} was built from others; build it again")
    build_onnxruntime(bundle)
    assert choice(bundle).reason.endswith(f"engine {NAME}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(format_version=1), "want format_version 3, found 1"),
        (lambda e: e["key"].update(backend="openvino"), "engine.key.backend: want"),
        (lambda e: e.pop("files"), "engine: missing ['files'], unknown []"),
        (lambda e: e["files"][0].update(path="../../vision.onnx"), "leads out of the bundle"),
    ],
)
def test_an_engine_manifest_that_does_not_fit(built: Path, tmp_path: Path, edit: Any, message: str) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    path = bundle / ENGINES / NAME / ENGINE_MANIFEST
    engine = json.loads(path.read_text())
    edit(engine)
    path.write_text(json.dumps(engine))
    with pytest.raises(BundleError) as raised:
        choice(bundle)
    assert message in str(raised.value)


def test_a_damaged_bundle_is_not_built(bundle: Path) -> None:
    alter(bundle / TOKENIZER)
    with pytest.raises(BundleError, match=r"tokenizer\.json: want sha256 .* export the bundle again"):
        build_onnxruntime(bundle)
    assert not (bundle / ENGINES).exists()


def no_operator(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "MatMul").op_type = "NoSuchOperator"


@pytest.mark.parametrize("graph", [VISION_GRAPH, DECODER_GRAPH])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (no_operator, BackendError, rf": ONNX Runtime {VERSION} cannot build it: "),
        (None, BundleError, r": cannot be read as ONNX \(.*\); export the bundle again"),
    ],
)
def test_a_broken_graph_leaves_nothing(
    bundle: Path, graph: str, change: Callable[[ir.Model], None] | None, error: type[Exception], message: str
) -> None:
    broken = b"not a graph"
    if change is not None:
        model = ir.load(bundle / graph)
        change(model)
        broken = ir.to_proto(model).SerializeToString()
    (bundle / graph).write_bytes(broken)
    path = bundle / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    (entry,) = (file for file in manifest["files"] if file["path"] == graph)
    entry.update(size=len(broken), sha256=hashlib.sha256(broken).hexdigest())
    path.write_text(json.dumps(manifest))
    with pytest.raises(error, match=graph + message):
        build_onnxruntime(bundle)
    assert not (bundle / ENGINES).exists() or list((bundle / ENGINES).iterdir()) == []


def test_without_onnx_runtime(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"install it with: pip install 'llava-deploy\[cpu\]'"):
        onnxruntime_builder.build_onnxruntime(bundle)


def test_without_what_lowers(bundle: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llava_deploy.engines.lowering")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(BackendError, match=r"needs onnx-ir, .* install it with: pip install 'llava-deploy\[build\]'"):
        build_onnxruntime(bundle)
    assert not (bundle / ENGINES).exists()
    assert build_onnxruntime(built) == built / ENGINES / NAME


def test_an_engine_of_another_lowering_is_not_used_and_is_rebuilt(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(engine_manifest, "LOWERING_VERSION", engine_manifest.LOWERING_VERSION - 1)
        build_onnxruntime(bundle)
    before = inode(bundle)
    assert choice(bundle).decoder == bundle / DECODER_GRAPH
    build_onnxruntime(bundle)
    assert inode(bundle) != before
    assert choice(bundle).decoder == bundle / ENGINES / NAME / DECODER_GRAPH


def test_the_tokenizer_is_no_part_of_what_an_engine_is_built_from(built: Path, tmp_path: Path) -> None:
    manifest = read_manifest(built)
    before = source_digest(manifest)
    files = {file.path: file for file in manifest.files}
    assert before == source_digest(type(manifest)(**{**vars(manifest), "files": tuple(reversed(manifest.files))}))
    without = tuple(file for path, file in files.items() if path != TOKENIZER)
    assert before == source_digest(type(manifest)(**{**vars(manifest), "files": without}))
    fewer = tuple(file for path, file in files.items() if path != f"{DECODER_GRAPH}.data")
    assert before != source_digest(type(manifest)(**{**vars(manifest), "files": fewer}))
    left_out = tuple(file for path, file in files.items() if path not in {f.path for f in fewer})
    packed = type(manifest)(**{**vars(manifest), "files": fewer, "left_out": left_out})
    assert before == source_digest(packed), "an archive without the graphs has the same engines"
    goldens = FileEntry("goldens/one-picture/logits.npy", 1, "a" * 64)
    assert before == source_digest(type(manifest)(**{**vars(manifest), "files": (*manifest.files, goldens)}))
