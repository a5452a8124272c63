"""What the doctor found, as tables; every verdict is a word, colour only adds to it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llava_deploy.engines.host_memory import HostMemory
from llava_deploy.runtime.doctor.bundles import BundleBackend, BundleReport
from llava_deploy.runtime.doctor.diagnosis import Diagnosis
from llava_deploy.runtime.doctor.findings import Level
from llava_deploy.runtime.doctor.gpu import Gpu
from llava_deploy.runtime.doctor.packages import Library
from llava_deploy.runtime.terminal import facts, size

_STYLES: dict[Level, str] = {"fault": "bold red", "warning": "yellow", "hint": "cyan", "ok": "green"}


def diagnosis_tables(diagnosis: Diagnosis) -> Group:
    """The machine, the backends, each bundle, and the findings at the end, where they are read."""
    parts: list[RenderableType] = [_machine(diagnosis), "", _backends(diagnosis)]
    for report in diagnosis.bundles:
        parts += [_bundle(report), ""]
    return Group(*parts, _findings(diagnosis))


def _machine(diagnosis: Diagnosis) -> Table:
    host, memory, graphics, packages = diagnosis.host, diagnosis.memory, diagnosis.graphics, diagnosis.packages
    container = "" if host.container is None else f", in a container ({host.container})"
    rows = [("system", f"{host.system or 'unknown'}, {host.kernel}, {host.libc or 'no glibc'}{container}")]
    if host.board is not None:
        jetson = [f"L4T {host.l4t}" if host.l4t else "", f"JetPack {host.jetpack}" if host.jetpack else ""]
        rows.append(("board", ", ".join(each for each in (host.board, *jetson) if each)))
    cores = f"{host.cores} core{'' if host.cores == 1 else 's'}, {host.processors} processors for this process"
    rows.append(("processor", ", ".join((host.processor or "unknown", cores, *host.extensions))))
    rows.append(("memory", _memory(memory)))
    if memory.swap_total:
        rows.append(("swap", f"{size(memory.swap_total)}, {size(memory.swap or 0)} free"))
    if diagnosis.disk is not None:
        rows.append(("disk", f"{size(diagnosis.disk)} free"))
    rows += [("GPU" if len(graphics.gpus) == 1 else f"GPU {at}", _gpu(gpu)) for at, gpu in enumerate(graphics.gpus)]
    if not graphics.gpus:
        rows.append(("GPU", "none by NVIDIA" if not graphics.cards else f"{graphics.cards} by NVIDIA, not in use"))
    if graphics.driver is not None or graphics.cuda is not None:
        cuda = "" if graphics.cuda is None else f", CUDA {graphics.cuda}"
        rows.append(("driver", f"{graphics.driver or 'version unknown'}{cuda}"))
    power = _power(diagnosis)
    if power:
        rows.append(("power", power))
    rows.append(("Python", packages.python))
    rows.append(("ONNX Runtime", f"{_library(packages.onnxruntime)}{_providers(diagnosis)}"))
    rows.append(("TensorRT", _library(packages.tensorrt["tensorrt"])))
    rows.append(("TensorRT for RTX", _library(packages.tensorrt["tensorrt-rtx"])))
    rows.append(("cuda-python", _library(packages.cuda_python)))
    others = [f"{name} {version or '-'}" for name, version in packages.versions.items()]
    rows.append(("others", f"{', '.join(others)} (torch is not needed)"))
    return facts("This machine", rows)


def _memory(memory: HostMemory) -> str:
    if memory.total is None:
        return "unknown"
    available = "" if memory.available is None else f", {size(memory.available)} available"
    limit = "" if memory.limit is None else f", limited to {size(memory.limit)}"
    return f"{size(memory.total)}{available}{limit}"


def _gpu(gpu: Gpu) -> str:
    words = [gpu.name, gpu.capability or "capability unknown"]
    if gpu.is_unified:
        words.append("shares the host's memory")
    elif gpu.total is not None:
        words.append(f"{size(gpu.total)}, {size(gpu.free)} free" if gpu.free is not None else size(gpu.total))
    if gpu.power_limit is not None:
        words.append(f"{gpu.power_limit:.0f} W")
    if gpu.celsius is not None:
        words.append(f"{gpu.celsius} °C")
    if gpu.mig:
        words.append("MIG")
    return ", ".join(words)


def _power(diagnosis: Diagnosis) -> str:
    power = diagnosis.power
    words = [] if power.mode is None else [f"mode {power.mode}"]
    if power.clocks is not None:
        low, high = (round(clock / 1e6) for clock in power.clocks)
        words.append(f"GPU clock fixed at {high} MHz" if low == high else f"GPU clock {low} to {high} MHz")
    if power.hottest is not None:
        words.append(f"hottest {power.hottest[1]}, {power.hottest[0]:.0f} °C")
    return ", ".join(words)


def _library(library: Library) -> str:
    if not library.installed:
        return "-"
    packages = ", ".join(f"{name} {version}" for name, version in library.packages.items())
    cuda = "" if library.cuda is None else f", for CUDA {library.cuda}"
    if library.version is None:
        return f"{packages or 'there'}{cuda}, cannot be loaded"
    return f"{library.version}{cuda}" if not packages else f"{library.version} ({packages}){cuda}"


def _providers(diagnosis: Diagnosis) -> str:
    providers = diagnosis.packages.providers
    words = [
        f"{name.removesuffix('ExecutionProvider')}{', not loading' if bad else ''}" for name, bad in providers.items()
    ]
    return f"; providers: {'; '.join(words)}" if words else ""


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    table.columns[0].no_wrap = True
    return table


def _backends(diagnosis: Diagnosis) -> Table:
    table = _table("Backends", "backend", "runs", "with, or why not", "to have it")
    for verdict in diagnosis.backends:
        runs = Text("yes", "green") if verdict.runs else Text("no", "yellow")
        table.add_row(verdict.backend, runs, Text(verdict.how), Text("; ".join(verdict.missing)))
    return table


def _bundle(report: BundleReport) -> RenderableType:
    title = f"Bundle {report.directory}"
    if report.trouble:
        return facts(title, [("cannot be used", report.trouble)])
    goldens = "goldens for the self-test" if report.goldens else "no goldens"
    table = _table(
        escape(f"{title}: {report.model}, {size(report.size)}, {goldens}"),
        "backend",
        "state",
        "with, or why not",
        "fits",
    )
    styles = {"runs": "green", "build first": "cyan", "cannot": "yellow"}
    for backend in report.backends:
        state = Text(backend.state, styles[backend.state])
        table.add_row(backend.backend, state, Text(backend.how), Text(_fits(backend)))
    return Group(table, facts("Next", [("", command) for command in report.next]))


def _fits(backend: BundleBackend) -> str:
    if backend.fits is None:
        return ""
    if backend.fits:
        return "yes"
    return f"up to {backend.largest_len} tokens" if backend.largest_len else "no"


def _findings(diagnosis: Diagnosis) -> Table:
    table = _table("Findings", "", "what", "what to do")
    for finding in diagnosis.findings:
        table.add_row(Text(finding.level, _STYLES[finding.level]), Text(finding.found), Text(finding.advice))
    return table
