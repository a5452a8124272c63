"""One real run over the shipped model, and what it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.planner.model import planned_bundle
from llava_deploy.engines.planner.run import decode_bound
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.bench import bandwidth
from llava_deploy.runtime.bench.bench import run_benchmark
from llava_deploy.runtime.bench.options import BenchOptions
from llava_deploy.runtime.bench.report import Report

Run = Callable[..., Report]
ON_THE_CPU = Wanted("onnxruntime", threads=1)
SMALL = BenchOptions(None, (16, 64), (1, 2), 6, 3)


@pytest.fixture(scope="session")
def run_bench() -> Run:
    """Measure a bundle; ``on_turn`` gets how many turns are over, and of how many."""

    def run(
        bundle: Path,
        wanted: Wanted = ON_THE_CPU,
        options: BenchOptions = SMALL,
        on_turn: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Report:
        model = planned_bundle(bundle, read_manifest(bundle))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bandwidth, "_HOST_BUFFER", 1 << 24)
            patch.setattr(bandwidth, "_CACHES", 0)
            patch.setattr(bandwidth, "_DEVICE_BUFFER", 1 << 20)
            return run_benchmark(bundle, wanted, options, partial(decode_bound, model), on_turn)

    return run


@pytest.fixture(scope="session")
def report(run_bench: Run, demo_bundle: Path) -> Report:
    """The shipped model in float32."""
    return run_bench(demo_bundle)
