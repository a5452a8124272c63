"""What ``selftest`` asks for, and what it does. Nothing heavy is imported before it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click

from llava_deploy.engines.errors import BackendError, BundleError, LlavaDeployError
from llava_deploy.engines.names import Backend
from llava_deploy.runtime.command_group import options_as_one, quiet, say
from llava_deploy.runtime.command_options import backend_option, json_option, threads_option

if TYPE_CHECKING:
    from llava_deploy.runtime.backend_choice import BackendName

Build: TypeAlias = Callable[[Path, Backend, Callable[[str], None]], Path]
"""Builds a bundle's engine for a backend, and is told where warnings go."""


@dataclass(frozen=True)
class SelftestRequest:
    """What runs the goldens, whether it is built first, and how the result is shown."""

    build: bool
    backend: BackendName
    threads: int | None
    as_json: bool


selftest_options = options_as_one(
    "request",
    SelftestRequest,
    click.option(
        "--build", is_flag=True, help="Build the engine first where it is missing: --backend's, or else ONNX Runtime's."
    ),
    backend_option,
    threads_option,
    json_option,
)


def run_selftest(directory: Path, request: SelftestRequest, build: Build) -> None:
    """Test a bundle and show what was found; ``build`` is the builders'.

    Raises:
        LlavaDeployError: a stage left its tolerance, or nothing could be compared.
        BundleError: no bundle, or one without goldens.
        BackendError: the backend cannot be had, or the engine not be built.
    """
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.backend_choice import Wanted
    from llava_deploy.runtime.selftest.selftest import selftest
    from llava_deploy.runtime.terminal_selftest import selftest_tables

    wanted = Wanted(request.backend, None, request.threads)
    missing = _missing(directory, request.backend) if request.build else None
    if missing is not None:
        watch = terminal.Stopwatch()
        say(f"no engine for {missing} here yet: building it")
        with terminal.progress("building", quiet=quiet()):
            engine = build(directory, missing, say)
        say(f"built {engine.name} in {watch}")
    with terminal.progress("testing", quiet=quiet()):
        report = selftest(directory, wanted)
    terminal.show(report.to_dict() if request.as_json else selftest_tables(report))
    if not report.ok:
        raise LlavaDeployError(f"the self-test failed: {report.sentence}")


def _missing(directory: Path, backend: BackendName) -> Backend | None:
    """The backend that an engine has to be built for; ``None`` where there is one, or the files are damaged."""
    from llava_deploy.engines.engine_manifest import is_current
    from llava_deploy.engines.integrity import Integrity
    from llava_deploy.engines.onnxruntime_cuda import cuda_key
    from llava_deploy.runtime.backend_choice import Wanted, choose
    from llava_deploy.runtime.bundle import open_bundle
    from llava_deploy.runtime.selftest.files import engine_of

    try:
        bundle = open_bundle(directory, Integrity.FULL)
        choice = choose(bundle, Wanted(backend), Integrity.QUICK)
    except BundleError:
        return None  # which the test says
    except BackendError:
        if backend == "auto" or backend == "onnxruntime":
            raise  # ONNX Runtime is not installed
        key = cuda_key(bundle.manifest)
        if backend == key.backend and is_current(directory / key.directory, key):
            return None  # it runs on every machine that has what it wants, and this one lacks it, which the test says
        return backend
    return "onnxruntime" if engine_of(bundle, choice) is None else None
