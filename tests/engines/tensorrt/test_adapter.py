"""What differs between the two modules and their releases: with stand-ins for those that are not installed here."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import tensorrt_rtx

from llava_deploy.engines.errors import BackendError, OptionError
from llava_deploy.engines.tensorrt.adapter import (
    free_device_memory,
    network_flags,
    require_supported,
    resolve_capabilities,
    serialize,
    set_flags,
    set_targets,
)
from llava_deploy.engines.tensorrt.messages import Messages
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions
from llava_deploy.engines.tensorrt.timing import load_timing_cache, save_timing_cache
from llava_deploy.engines.tensorrt_module import TensorRtBackend, TensorRtModule
from llava_deploy.engines.tensorrt_recipe import EngineLimits, TensorRtRecipe

if TYPE_CHECKING:
    from fake_gpu import FakeGpu


LIMITS = EngineLimits(
    max_batch=1, max_len=64, max_seq=64, max_images=1, opt_batch=1, opt_seq=64, opt_total=64, opt_images=1
)


class Flag(enum.IntEnum):
    STRONGLY_TYPED = 2


class OldBuilder:
    """As 10.3 has it, and its plan in memory."""

    plan: bytes | None = b"a plan"

    def build_serialized_network(self, network: object, config: object) -> bytes | None:
        return self.plan


def full(version: str, **api: Any) -> TensorRtModule:
    """The full TensorRT, of which no more is there than a test asks for."""
    return TensorRtModule("tensorrt", SimpleNamespace(NetworkDefinitionCreationFlag=Flag, **api), version)


@pytest.fixture
def rtx() -> TensorRtModule:
    """The real module, beside the fake GPU too."""
    return TensorRtModule("tensorrt-rtx", tensorrt_rtx, tensorrt_rtx.__version__)


def test_every_network_is_strongly_typed_and_no_flag_is_deprecated(rtx: TensorRtModule) -> None:
    assert network_flags(full("10.3.0")) == 1 << 2
    assert network_flags(full("10.15.1.29")) == 1 << 2
    assert network_flags(full("11.4.0.106")) == 0
    assert network_flags(rtx) == 0
    assert network_flags(TensorRtModule("tensorrt-rtx", full("").api, "1.3.0.35")) == 1 << 2
    assert "DEPRECATED" in rtx.api.NetworkDefinitionCreationFlag.__doc__


def test_the_full_tensorrt_builds_for_the_gpu_that_it_is_on(fake_gpu: FakeGpu) -> None:
    fake_gpu.capability = (8, 7)
    assert resolve_capabilities(full("10.3.0"), ()) == ("sm87",)
    assert resolve_capabilities(full("10.3.0"), ("8.7",)) == ("sm87",)
    with pytest.raises(OptionError, match="for the GPU that it builds on, here sm87, got sm89; leave it out"):
        resolve_capabilities(full("10.3.0"), ("sm89",))


def test_for_rtx_the_gpu_is_taken_where_none_is_named(fake_gpu: FakeGpu, rtx: TensorRtModule) -> None:
    assert resolve_capabilities(rtx, ()) == ("sm89",)
    fake_gpu.capability = (9, 0)
    with pytest.raises(OptionError, match=r"builds for sm75, .*, not for sm90; use --backend tensorrt on such a GPU"):
        resolve_capabilities(rtx, ())


@pytest.mark.parametrize(
    ("missing", "words"),
    [("driver", "CUDA driver version is insufficient"), ("devices", "no CUDA-capable device is detected")],
)
def test_without_a_gpu(fake_gpu: FakeGpu, missing: str, words: str) -> None:
    setattr(fake_gpu, missing, 0)
    with pytest.raises(BackendError, match=rf"no GPU can be used here .{words}.*or with --backend tensorrt-rtx"):
        resolve_capabilities(full("11.4.0.106"), ())
    assert free_device_memory() is None


def test_without_cuda_python(fake_gpu: FakeGpu) -> None:
    fake_gpu.withhold("cuda.bindings.runtime")
    with pytest.raises(BackendError, match=r"cuda-python cannot be imported .*pip install 'llava-deploy\[rtx\]'"):
        resolve_capabilities(full("11.4.0.106"), ())
    assert free_device_memory() is None


def test_memory_that_is_free_on_the_gpu(fake_gpu: FakeGpu) -> None:
    assert free_device_memory() == 1 << 30


def test_for_rtx_refitting_needs_a_gpu_and_has_one(fake_gpu: FakeGpu, rtx: TensorRtModule) -> None:
    refit = TensorRtBuildOptions("tensorrt-rtx", refit=True)
    require_supported(rtx, refit)
    fake_gpu.devices = 0
    with pytest.raises(OptionError, match="needs a GPU"):
        require_supported(rtx, refit)


def test_the_full_tensorrt_can_do_all_of_it() -> None:
    asked = TensorRtBuildOptions("tensorrt", refit=True, version_compatible=True, timing_cache=Path("cache"))
    require_supported(full("10.3.0"), asked)


def test_targets_are_for_rtx_alone(rtx: TensorRtModule) -> None:
    taken: list[Any] = []
    config = SimpleNamespace(set_compute_capability=lambda *target: bool(taken.append(target)) or len(taken) < 2)
    set_targets(full("11.4.0.106"), config, ("sm89",))
    assert vars(config).keys() == {"set_compute_capability"}
    with pytest.raises(BackendError, match="refuses to build for sm89, sm120 in one engine"):
        set_targets(rtx, config, ("sm89", "sm120"))
    kinds = rtx.api.ComputeCapability
    assert (config.num_compute_capabilities, taken) == (2, [(kinds.SM89, 0), (kinds.SM120, 1)])


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_flags_that_a_recipe_asks_for(backend: TensorRtBackend) -> None:
    names = ["TF32", "REFIT", "VERSION_COMPATIBLE"]
    if backend == "tensorrt-rtx":
        names.append("REQUIRE_USER_ALLOCATION")
    flags = enum.Enum("Flags", names)  # type: ignore[misc]
    pools = SimpleNamespace(WORKSPACE="workspace")
    module = TensorRtModule(backend, SimpleNamespace(BuilderFlag=flags, MemoryPoolType=pools), "1.7.1")
    always = {"REQUIRE_USER_ALLOCATION"} & set(names)
    for asked, wanted in ((False, always), (True, {*always, "REFIT", "VERSION_COMPATIBLE"})):
        is_set, limits = {flags["TF32"]}, {}
        config = SimpleNamespace(
            set_flag=is_set.add, clear_flag=is_set.remove, set_memory_pool_limit=limits.__setitem__
        )
        workspace = 4096 if asked else None
        recipe = TensorRtRecipe(
            "1.7", "in-place", (2,), LIMITS, ("sm89",), workspace, version_compatible=asked, refittable=asked
        )
        set_flags(module, config, recipe)
        assert {flag.name for flag in is_set} == wanted
        assert limits == ({"workspace": 4096} if asked else {})


def test_a_release_that_cannot_stream_gives_its_plan_in_one_piece(tmp_path: Path) -> None:
    module, built = full("10.3.0", Builder=OldBuilder), OldBuilder()
    assert serialize(module, built, None, None, tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes() == b"a plan"
    built.plan = None
    assert not serialize(module, built, None, None, tmp_path / "none")


class Timing:
    """A config as the full TensorRT has it: a cache that it does not know makes an empty one, and a warning."""

    def __init__(self, messages: Messages, *, known: bytes = b"cache", takes: bool = True) -> None:
        self._messages, self._known, self._takes = messages, known, takes
        self.given: bytes | None = None

    def create_timing_cache(self, content: bytes) -> object:
        if content not in (b"", self._known):
            self._messages.warning("Failed to deserialize timing cache. Returning an empty timing cache.")
        self.given = content
        return self

    def set_timing_cache(self, cache: object, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return self._takes

    def get_timing_cache(self) -> Timing:
        return self

    def serialize(self) -> bytes:
        return b"measured"


def test_a_timing_cache_is_read_where_it_is_and_written_after_the_build(tmp_path: Path) -> None:
    messages, path = Messages(), tmp_path / "deep" / "cache"
    config = Timing(messages, known=b"measured")
    for given in (b"", b"measured"):
        cache = load_timing_cache(full("11.4.0.106"), config, path, messages)
        assert config.given == given
        save_timing_cache(config, cache, path)
        assert path.read_bytes() == b"measured"
    assert [file.name for file in path.parent.iterdir()] == ["cache"]
    assert load_timing_cache(full("11.4.0.106"), config, None, messages) is None
    save_timing_cache(config, None, None)


@pytest.mark.parametrize("takes", [True, False])
def test_a_timing_cache_of_another_version_or_gpu(tmp_path: Path, takes: bool) -> None:
    messages, path = Messages(), tmp_path / "cache"
    path.write_bytes(b"another" if takes else b"cache")
    with pytest.raises(
        OptionError, match=r"cache: want a timing cache of TensorRT 11\.4\.0\.106 and this GPU"
    ) as raised:
        load_timing_cache(full("11.4.0.106"), Timing(messages, takes=takes), path, messages)
    assert raised.value.option == "timing_cache"


def test_a_timing_cache_that_is_no_file(tmp_path: Path) -> None:
    messages = Messages()
    with pytest.raises(OptionError, match="cannot be read"):
        load_timing_cache(full("11.4.0.106"), Timing(messages), tmp_path, messages)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written"):
        save_timing_cache(Timing(messages), object(), tmp_path / "file" / "cache")
