"""Where the full TensorRT, its releases and TensorRT for RTX differ; all else of their interface is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llava_deploy.engines.errors import BackendError, OptionError
from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions, normal_capability
from llava_deploy.engines.tensorrt_module import TensorRtBackend, TensorRtModule, import_cuda
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe

_ALWAYS_STRONGLY_TYPED: Mapping[TensorRtBackend, tuple[int, int]] = {"tensorrt": (11, 0), "tensorrt-rtx": (1, 7)}
"""From these releases on there are no other networks, and the flag is deprecated."""

_NO_TARGETS = ("NONE", "CURRENT")


def network_flags(module: TensorRtModule) -> int:
    """For ``create_network``: strongly typed, so that every tensor has the type that the graph gives it."""
    if module.release >= _ALWAYS_STRONGLY_TYPED[module.backend]:
        return 0
    return 1 << int(module.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def resolve_capabilities(module: TensorRtModule, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """What to build for, in ascending order: ``wanted``, or this machine's GPU.

    Raises:
        OptionError: no capability, one that the module cannot build for, or none and no GPU to take it from.
        BackendError: the full TensorRT, which builds on the GPU that it builds for, and no GPU.
    """
    asked = tuple(sorted({normal_capability(text) for text in wanted}, key=lambda name: int(name[2:])))
    if module.backend == "tensorrt":
        try:
            present = current_capability()
        except BackendError as error:
            raise BackendError(
                f"TensorRT builds on the GPU that it builds for, and {error}; "
                "build on a machine with that GPU, or with --backend tensorrt-rtx, which needs none"
            ) from error
        if asked not in ((), (present,)):
            raise OptionError(
                "sm", f"TensorRT builds for the GPU that it builds on, here {present}, got {', '.join(asked)}; "
                "leave it out, or use --backend tensorrt-rtx"
            )  # fmt: skip
        return (present,)
    if not asked:
        try:
            asked = (current_capability(),)
        except BackendError as error:
            raise OptionError(
                "sm", f"want the compute capabilities to build for, such as sm89, for there is no GPU to ask: {error}"
            ) from error
    known = [name.lower() for name in module.api.ComputeCapability.__members__ if name not in _NO_TARGETS]
    if unknown := [name for name in asked if name not in known]:
        raise OptionError(
            "sm", f"TensorRT for RTX {module.version} builds for {', '.join(known)}, not for {', '.join(unknown)}; "
            "use --backend tensorrt on such a GPU"
        )  # fmt: skip
    return asked


def require_supported(module: TensorRtModule, options: TensorRtBuildOptions) -> None:
    """Refuse what TensorRT for RTX cannot do, before it fails at it in words of its own.

    Raises:
        OptionError: the option that asks for it.
    """
    if module.backend == "tensorrt":
        return
    if options.timing_cache is not None:  # deprecated in 1.2, and without effect
        raise OptionError("timing_cache", "TensorRT for RTX measures no kernels while it builds; leave it out")
    if options.version_compatible:  # 1.7 looks for a library of the full TensorRT's
        raise OptionError(
            "version_compatible", "TensorRT for RTX has no lean runtime to put into its engines; leave it out"
        )
    if options.refit:
        try:
            current_capability()
        except BackendError as error:
            raise OptionError(
                "refit", f"TensorRT for RTX needs a GPU while it builds engines that can be refitted: {error}"
            ) from error


def set_targets(module: TensorRtModule, config: Any, capabilities: tuple[str, ...]) -> None:
    """Have TensorRT for RTX build for ``capabilities``; the full TensorRT builds for the GPU that it is on.

    Raises:
        BackendError: the combination is refused.
    """
    if module.backend == "tensorrt":
        return
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        if not config.set_compute_capability(getattr(module.api.ComputeCapability, name.upper()), index):
            raise BackendError(
                f"TensorRT for RTX {module.version} refuses to build for {', '.join(capabilities)} in one engine; "
                "build for one compute capability at a time, in a copy of the bundle each"
            )


def set_flags(module: TensorRtModule, config: Any, recipe: TensorRtRecipe) -> None:
    """Have an engine built in the ways that its recipe names."""
    flags = module.api.BuilderFlag
    if module.backend == "tensorrt-rtx" and "REQUIRE_USER_ALLOCATION" in flags.__members__:  # 1.7 has it
        # The runtime gives an engine all of its memory, and CUDA graphs are of engines that allocate none.
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    config.clear_flag(flags.TF32)  # a graph in float32 means float32
    if recipe.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if recipe.refittable:
        config.set_flag(flags.REFIT)
    if recipe.workspace is not None:
        config.set_memory_pool_limit(module.api.MemoryPoolType.WORKSPACE, recipe.workspace)


def current_capability() -> str:
    """Compute capability of the first GPU, as ``sm89``.

    Raises:
        BackendError: there is none, or no driver, or no cuda-python.
    """
    cudart = import_cuda()
    attributes = cudart.cudaDeviceAttr
    numbers = []
    for which in (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor):
        error, value = cudart.cudaDeviceGetAttribute(which, 0)
        if int(error) != 0:
            raise BackendError(f"no GPU can be used here ({cudart.cudaGetErrorString(error)[1].decode()})")
        numbers.append(value)
    return f"sm{numbers[0]}{numbers[1]}"


def free_device_memory() -> int | None:
    """Bytes that are free on the first GPU; ``None`` where there is none to ask."""
    try:
        error, free, _ = import_cuda().cudaMemGetInfo()
    except BackendError:
        return None
    return int(free) if int(error) == 0 else None


def serialize(module: TensorRtModule, builder: Any, network: Any, config: Any, path: Path) -> bool:
    """Build, and write the plan to the new file ``path``; whether TensorRT has built one.

    It goes there in pieces where the release can do that, so that the whole is not in memory beside the weights.

    Raises:
        OSError: the file cannot be written.
        BackendError: nothing has come to be written.
    """
    with path.open("xb") as file:
        if "build_serialized_network_to_stream" not in dir(module.api.Builder):  # as in 10.3
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                return False
            file.write(memoryview(plan))
            return True
        failures: list[OSError] = []
        writer = _make_writer(module.api, file, failures)
        built = bool(builder.build_serialized_network_to_stream(network, config, writer))
    if failures:
        raise failures[0]
    if built and path.stat().st_size == 0:  # TensorRT takes a lost write for a good one
        raise BackendError(
            f"{path.name}: TensorRT {module.version} has built a plan that did not arrive: "
            "there was no memory for it, most likely; free some"
        )
    return built


def _make_writer(api: Any, file: BinaryIO, failures: list[OSError]) -> Any:
    """An ``IStreamWriter`` to ``file``. What goes wrong is kept: an exception cannot pass through TensorRT."""

    class _Writer(api.IStreamWriter):  # type: ignore[name-defined]
        def __init__(self) -> None:
            api.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            if failures:
                return 0
            try:
                return file.write(data)
            except OSError as error:
                failures.append(error)
                return 0

    return _Writer()
