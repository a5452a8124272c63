"""What there is to say about NVIDIA's GPUs and the driver, each with what to do.

Sources: CUDA's driver API, ``CUresult`` (34 stub library, 100 no device, 802 system not ready, 803 driver mismatch);
NVIDIA Container Toolkit, "Specialized Configurations", for ``--gpus`` and ``NVIDIA_DRIVER_CAPABILITIES``; NVIDIA, "CUDA
Compatibility", for the drivers that CUDA's versions want.
"""

from __future__ import annotations

from collections.abc import Iterator

from llava_deploy.engines.onnxruntime_cuda import CUDA_PROVIDER
from llava_deploy.runtime.backend_choice import GPU_BACKENDS, SPOKEN_BACKENDS, GpuBackend
from llava_deploy.runtime.doctor.backends import install_gpu_backend, recommended
from llava_deploy.runtime.doctor.findings import Finding, gigabytes
from llava_deploy.runtime.doctor.gpu import Gpu, Graphics
from llava_deploy.runtime.doctor.host import Host
from llava_deploy.runtime.doctor.packages import Packages
from llava_deploy.runtime.doctor.verdicts import BackendVerdict, cuda_major

_CROWDED = 0.2
"""Share of a GPU's memory that others may use without its being said."""

_NO_DEVICE = 100
_WORDS = {
    34: ("CUDA's library is a stub, for linking only", "take the stubs' directory off LD_LIBRARY_PATH"),
    802: ("the GPU's system services do not run", "see systemctl status nvidia-fabricmanager"),
    803: ("the driver's kernel module and libraries are of different versions", "start the machine again"),
    999: ("CUDA does not start", "start the machine again; if that does not help, install the driver again"),
}


def gpu_findings(host: Host, graphics: Graphics, environment_hides: str | None) -> Iterator[Finding]:
    """About driver and devices.

    Args:
        host: the machine around.
        graphics: what was found.
        environment_hides: the value of ``CUDA_VISIBLE_DEVICES``; ``None`` where it is not set.
    """
    if graphics.smi_trouble:
        yield Finding("warning", f"no use of nvidia-smi: {graphics.smi_trouble}", "see dmesg for what the driver says")
    if graphics.first is None:
        yield from _why_none(host, graphics, environment_hides)
    else:
        cuda = "" if graphics.cuda is None else f" (CUDA {graphics.cuda})"
        driver = f"driver {graphics.driver}" if graphics.driver else "its driver"
        yield Finding("ok", f"{graphics.first.name}, {graphics.first.capability}, {driver}{cuda}")
    if graphics.denied:
        yield Finding(
            "fault",
            f"this user may not use {', '.join(graphics.denied)}",
            "sudo usermod -aG video,render $USER, and log in again",
        )
    for gpu in graphics.gpus:
        yield from _device_findings(host, gpu)


def _why_none(host: Host, graphics: Graphics, environment_hides: str | None) -> Iterator[Finding]:
    expects = bool(graphics.cards) or graphics.driver is not None or bool(graphics.nodes) or host.is_jetson
    if environment_hides is not None and graphics.code == _NO_DEVICE:
        found = f"CUDA_VISIBLE_DEVICES is {environment_hides!r}, which shows no GPU"
        yield Finding("warning", found, "unset CUDA_VISIBLE_DEVICES")
    elif graphics.code in _WORDS:
        found, advice = _WORDS[graphics.code]
        yield Finding("fault", f"{found}: {graphics.trouble}", advice)
    elif graphics.nouveau and graphics.driver is None:
        yield Finding(
            "warning",
            "the NVIDIA card is run by nouveau instead of NVIDIA's driver: it has no CUDA",
            "sudo ubuntu-drivers install, or your distribution's nvidia-driver, and start again",
        )
    elif graphics.library and not graphics.nodes and (host.container is not None or expects):
        where = f"container ({host.container}) without its GPU" if host.container else "the driver is not loaded"
        advice = "start it with --gpus all (podman: --device nvidia.com/gpu=all)" if host.container else _LOAD
        yield Finding("fault", f"CUDA's library is there, but no device node in /dev: {where}", advice)
    elif graphics.nodes and not graphics.library:
        advice = "install the driver's libraries: libnvidia-compute of the kernel module's version"
        if host.container:
            advice = "start it with -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        yield Finding("fault", f"the driver is loaded, but CUDA's library is not there: {graphics.trouble}", advice)
    elif graphics.driver is None and graphics.cards:
        yield Finding(
            "warning",
            f"{graphics.cards} NVIDIA device{'s' if graphics.cards > 1 else ''} on the bus, but no driver",
            "sudo ubuntu-drivers install, or your distribution's nvidia-driver, and start again",
        )
    elif expects and not any(gpu.trouble for gpu in graphics.gpus):
        yield Finding("fault", f"the GPU cannot be used: {graphics.trouble or 'CUDA shows none'}", _LOAD)
    elif not expects:
        yield Finding("ok", "no NVIDIA GPU: bundles run on the CPU, with ONNX Runtime")


_LOAD = "see nvidia-smi and dmesg; sudo modprobe nvidia"


def _device_findings(host: Host, gpu: Gpu) -> Iterator[Finding]:
    if not gpu.usable:
        advice = "see what uses it: nvidia-smi" if gpu.compute_mode != "Default" else "see CUDA_VISIBLE_DEVICES"
        yield Finding("warning", f"{gpu.name}: {gpu.trouble}", advice)
    if gpu.compute_mode == "Prohibited":
        yield Finding("fault", f"{gpu.name}: its compute mode is Prohibited", "sudo nvidia-smi -c DEFAULT")
    elif gpu.compute_mode == "Exclusive_Process":
        yield Finding("hint", f"{gpu.name}: one process alone may use it", "sudo nvidia-smi -c DEFAULT lets others")
    if gpu.mig:
        yield Finding("hint", f"{gpu.name}: it is divided (MIG), and a model gets one instance of it")
    count, used = gpu.others
    if gpu.total and gpu.free is not None and not gpu.is_unified and gpu.free < (1 - _CROWDED) * gpu.total:
        who = f", by {count} process{'es' if count > 1 else ''} with {gigabytes(used)}" if count else ""
        found = f"{gpu.name}: {gigabytes(gpu.total - gpu.free)} of {gigabytes(gpu.total)} are in use{who}"
        yield Finding("warning", found, "stop what else uses it: nvidia-smi lists it")
    if gpu.slowed:
        yield Finding("warning", f"{gpu.name}: slowed down, {' and '.join(gpu.slowed)}", "see its cooling and supply")
    if gpu.persistence is False and not host.is_jetson:
        yield Finding(
            "hint", f"{gpu.name}: its driver sleeps when nobody uses it", "sudo nvidia-smi -pm 1 starts faster"
        )


def accelerator_findings(
    host: Host, graphics: Graphics, packages: Packages, verdicts: tuple[BackendVerdict, ...]
) -> Iterator[Finding]:
    """What a GPU that can be used still lacks: what is installed and does not run, or what to install."""
    gpu = graphics.first
    others = {verdict.backend: verdict for verdict in verdicts if verdict.backend != "onnxruntime"}
    if gpu is None or any(verdict.runs for verdict in others.values()):
        return
    cuda = graphics.cuda or cuda_major(graphics)
    driver = f"driver {graphics.driver}" if graphics.driver else "driver"
    too_old = [verdict for verdict in others.values() if "driver" in verdict.lacks]
    for verdict in too_old:
        yield Finding("fault", f"{verdict.backend}: {driver}: {verdict.how}", "; ".join(verdict.missing))
    if too_old:
        return
    best = recommended(host, gpu)
    broken = [backend for backend in GPU_BACKENDS if _is_installed(backend, packages) and _could_run(others[backend])]
    for backend in broken:
        verdict = others[backend]
        yield Finding("fault", f"{gpu.name} is there, but: {verdict.how}", "; ".join(verdict.missing))
    if best not in broken and _could_run(others[best]):
        found = f"{gpu.name}, {driver} (CUDA {cuda}), but no {SPOKEN_BACKENDS[best]}: bundles run on the CPU"
        yield Finding("hint", found, install_gpu_backend(best, host, graphics, packages))
    elif not broken:
        yield Finding("hint", f"{gpu.name}: nothing here is for {gpu.capability}: bundles run on the CPU")


def _is_installed(backend: GpuBackend, packages: Packages) -> bool:
    if backend == "onnxruntime-cuda":
        return CUDA_PROVIDER in packages.providers
    return packages.tensorrt[backend].installed


def _could_run(verdict: BackendVerdict) -> bool:
    """With other packages, on this GPU."""
    return "GPU" not in verdict.lacks
