"""What a bundle could do on a machine: with which backends now, with which after a build, and what to type next.

Nothing is loaded: engines are judged by their manifests, which are held against what the machine has.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from llava_deploy.engines.engine_manifest import read_engine_manifest, source_digest
from llava_deploy.engines.errors import BundleError, LlavaDeployError
from llava_deploy.engines.fitting import Fit, Room
from llava_deploy.engines.goldens import has_goldens
from llava_deploy.engines.host_memory import HostMemory
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.engines.names import Backend
from llava_deploy.engines.onnxruntime_cuda import cuda_key, cuda_refusal
from llava_deploy.engines.tensorrt_module import SPOKEN, TensorRtBackend, TensorRtModule
from llava_deploy.runtime.backend_choice import SPOKEN_BACKENDS, GpuBackend, choose_onnxruntime
from llava_deploy.runtime.bundle import Bundle, open_bundle
from llava_deploy.runtime.doctor.findings import Finding
from llava_deploy.runtime.doctor.gpu import Gpu, Graphics
from llava_deploy.runtime.doctor.packages import Packages
from llava_deploy.runtime.doctor.verdicts import BackendVerdict
from llava_deploy.runtime.printable import as_argument
from llava_deploy.runtime.tensorrt.plans import misfit
from llava_deploy.runtime.tensorrt_choice import engine_directories

State = Literal["runs", "build first", "cannot"]

Planner = Callable[[Path, Room], Mapping[Backend, Fit]]
"""Says of a bundle whether it fits, with each backend."""


@dataclass(frozen=True)
class BundleBackend:
    """A bundle with one backend.

    Attributes:
        state: it runs as it is, once it was built here, or not.
        how: with which engine or graphs, or why not.
        fits: whether memory will do, by the planner; ``None`` where it cannot tell.
        largest_len: tokens of context that would fit.
        next: the command that makes it run, or run better; empty where there is none.
    """

    backend: Backend
    state: State
    how: str
    fits: bool | None
    largest_len: int | None
    next: str


@dataclass(frozen=True)
class BundleReport:
    """What a bundle could do here.

    Attributes:
        directory: of the bundle.
        trouble: why it is none, or cannot be used; the rest is empty then.
        model: its name and precision.
        size: bytes of its files.
        goldens: it carries answers of PyTorch to be tested with.
        backends: in the order of :data:`~llava_deploy.engines.names.Backend`.
        next: commands to type now, the best first.
    """

    directory: str
    trouble: str
    model: str
    size: int
    goldens: bool
    backends: tuple[BundleBackend, ...]
    next: tuple[str, ...]

    @property
    def runs(self) -> bool:
        """Whether it does, as it is, in the memory that there is."""
        return any(backend.state == "runs" and backend.largest_len != 0 for backend in self.backends)


@dataclass(frozen=True)
class Here:
    """The machine, as far as a bundle is concerned."""

    packages: Packages
    graphics: Graphics
    verdicts: tuple[BackendVerdict, ...]
    room: Room

    @classmethod
    def of(
        cls, memory: HostMemory, graphics: Graphics, packages: Packages, verdicts: tuple[BackendVerdict, ...]
    ) -> Here:
        """Put together what was found."""
        gpu = graphics.first
        release = re.match(r"\d+\.\d+", packages.tensorrt["tensorrt"].version or "")
        room = Room(
            host=memory.available,
            device=None if gpu is None else gpu.free,
            capability=None if gpu is None else gpu.capability,
            is_unified=gpu is not None and gpu.is_unified,
            tensorrt=release[0] if release else None,
        )
        return cls(packages, graphics, verdicts, room)

    def verdict(self, backend: Backend) -> BackendVerdict:
        """On one backend."""
        return next(verdict for verdict in self.verdicts if verdict.backend == backend)


def look_at_bundle(directory: Path, here: Here, planner: Planner) -> BundleReport:
    """What a bundle could do; what is wrong with it is said, not raised."""
    try:
        bundle = open_bundle(directory)
    except LlavaDeployError as error:
        return BundleReport(str(directory), str(error), "", 0, goldens=False, backends=(), next=())
    card = bundle.manifest.model
    fits: Mapping[Backend, Fit] = {}
    if _has_graphs(bundle):
        with contextlib.suppress(LlavaDeployError):  # graphs of another maker: whether they fit is not known
            fits = planner(directory, here.room)
    backends = tuple(_with(backend, bundle, here, fits.get(backend)) for backend in get_args(Backend))
    goldens = has_goldens(bundle.manifest)
    return BundleReport(
        str(directory),
        "",
        f"{card.name} in {card.precision}",
        sum(entry.size for entry in bundle.manifest.files),
        goldens,
        backends,
        _next(directory, backends, goldens=goldens),
    )


def _quoted(directory: Path) -> str:
    return as_argument(directory)


def _next(directory: Path, backends: tuple[BundleBackend, ...], *, goldens: bool) -> tuple[str, ...]:
    states, commands = {backend.state for backend in backends}, []
    if goldens and states != {"cannot"}:
        commands.append(f"llava-deploy selftest {_quoted(directory)}" + ("" if "runs" in states else " --build"))
    if "runs" in states:
        commands.append(f"llava-deploy chat {_quoted(directory)} --image PICTURE")
    builds = [each.next for each in reversed(backends) if each.next]  # a GPU first
    if not goldens:
        builds.append(f"llava-deploy record CHECKPOINT {_quoted(directory)}")
    return tuple(dict.fromkeys((*commands, *builds)))


def _with(backend: Backend, bundle: Bundle, here: Here, fit: Fit | None) -> BundleBackend:
    if backend == "onnxruntime":
        state, how, command = _with_onnxruntime(bundle, here)
    elif backend == "onnxruntime-cuda":
        state, how, command = _with_cuda(bundle, here)
    else:
        state, how, command = _with_tensorrt(backend, bundle, here)
    if fit is None or state == "cannot":
        return BundleBackend(backend, state, how, None, None, command)
    if state == "build first" and fit.build is False:
        how += "; a build takes more memory than there is: build it on another machine of this kind"
    return BundleBackend(backend, state, how, fit.run, fit.largest_len, command)


def _with_onnxruntime(bundle: Bundle, here: Here) -> tuple[State, str, str]:
    verdict = here.verdict("onnxruntime")
    if not verdict.runs:
        return "cannot", verdict.how, verdict.missing[0] if verdict.missing else ""
    try:
        choice = choose_onnxruntime(bundle, here.packages.onnxruntime.version or "", None, Integrity.QUICK)
    except LlavaDeployError as error:
        return "cannot", str(error), ""
    built = choice.decoder.parent != bundle.directory
    command = f"llava-deploy build {_quoted(bundle.directory)} --backend onnxruntime"
    return "runs", choice.reason.partition("; ")[0], "" if built or not here.packages.can_build else command


def _with_cuda(bundle: Bundle, here: Here) -> tuple[State, str, str]:
    """With ONNX Runtime on the GPU: one engine is for every release and every GPU."""
    verdict, gpu = here.verdict("onnxruntime-cuda"), here.graphics.first
    key = cuda_key(bundle.manifest)
    directory = bundle.directory / key.directory
    if not verdict.runs or gpu is None:
        return _not_here("onnxruntime-cuda", verdict, has_engine=directory.is_dir())
    refusal = cuda_refusal(bundle.manifest)
    if refusal is not None:
        return "cannot", refusal, ""
    if not directory.is_dir():
        return _to_be_built("onnxruntime-cuda", bundle, here, "no engine")
    try:
        engine = read_engine_manifest(directory, remedy="build it again")
        check_files(directory, engine.files, Integrity.QUICK, remedy="build it again")
    except BundleError as error:
        return _to_be_built("onnxruntime-cuda", bundle, here, str(error))
    if engine.key != key:
        how = f"engine {directory.name} was built from other graphs than the bundle holds"
        return _to_be_built("onnxruntime-cuda", bundle, here, how)
    version = here.packages.onnxruntime.version
    return "runs", f"ONNX Runtime {version} on {gpu.name}, engine {directory.name}", ""


def _with_tensorrt(backend: TensorRtBackend, bundle: Bundle, here: Here) -> tuple[State, str, str]:
    verdict, gpu = here.verdict(backend), here.graphics.first
    directories = engine_directories(bundle, backend)
    if not verdict.runs or gpu is None:
        return _not_here(backend, verdict, has_engine=bool(directories))
    module = TensorRtModule(backend, None, here.packages.tensorrt[backend].version or "")
    reasons = []
    for directory in directories:
        reason = _misfit(directory, bundle, module, gpu)
        if reason is None:
            return "runs", f"{SPOKEN[backend]} {module.version} on {gpu.name}, engine {directory.name}", ""
        reasons.append(reason)
    return _to_be_built(backend, bundle, here, "; ".join(reasons) or "no engine")


def _not_here(backend: GpuBackend, verdict: BackendVerdict, *, has_engine: bool) -> tuple[State, str, str]:
    words = f"{verdict.how}; it has an engine of {SPOKEN_BACKENDS[backend]}" if has_engine else verdict.how
    return "cannot", words, verdict.missing[0] if has_engine and verdict.missing else ""


def _to_be_built(backend: GpuBackend, bundle: Bundle, here: Here, how: str) -> tuple[State, str, str]:
    """No engine runs here, for the reason ``how``."""
    if not _has_graphs(bundle):
        return "cannot", f"{how}, and its graphs, to build one from, were left out", ""
    if not here.packages.can_build:
        return "cannot", f"{how}, and none can be built here without onnx-ir", "pip install 'llava-deploy[build]'"
    return "build first", how, f"llava-deploy build {_quoted(bundle.directory)} --backend {backend}"


def _misfit(directory: Path, bundle: Bundle, module: TensorRtModule, gpu: Gpu) -> str | None:
    """Why an engine does not run here."""
    try:
        key = read_engine_manifest(directory, remedy="build it again").key
    except BundleError as error:
        return str(error)
    if key.source != source_digest(bundle.manifest):
        return f"engine {directory.name} was built from other graphs than the bundle holds"
    reason = misfit(key, module, gpu)
    return None if reason is None else f"engine {directory.name} was built {reason}"


def _has_graphs(bundle: Bundle) -> bool:
    listed = {entry.path for entry in bundle.manifest.files}
    return {VISION_GRAPH, DECODER_GRAPH} <= listed


def bundle_findings(reports: Iterable[BundleReport]) -> Iterator[Finding]:
    """What is wrong with the bundles that were named."""
    for report in reports:
        running = [backend for backend in report.backends if backend.state == "runs"]
        if report.trouble:
            yield Finding("fault", report.trouble)
        elif not running:
            advice = report.next[0] if report.next else "see what each backend lacks"
            yield Finding("fault", f"{report.directory}: nothing here runs it as it is", advice)
        elif all(backend.fits is False for backend in running):
            most = max((backend.largest_len for backend in running if backend.largest_len is not None), default=0)
            shorter = f"llava-deploy chat {_quoted(Path(report.directory))} --max-len {most}"
            advice = shorter if most else "stop what else runs"
            words = f"no more than {most} tokens of context" if most else "not even one token of context"
            yield Finding("warning", f"{report.directory}: the memory that is free has room for {words}", advice)
