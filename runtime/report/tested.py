"""The self-test of a bundle, where it carries goldens, in the words of a report."""

from __future__ import annotations

from pathlib import Path

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.goldens import has_goldens
from llava_deploy.engines.manifest import Manifest
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.report.record import State, Tested, TestedStage
from llava_deploy.runtime.selftest.report import GoldenStage, SelftestReport
from llava_deploy.runtime.selftest.selftest import selftest


def run_selftest(bundle: Path, manifest: Manifest, wanted: Wanted) -> Tested:
    """Replay the goldens of a bundle, or say why that cannot be done.

    Raises:
        OptionError: an option that cannot be had.
    """
    if not has_goldens(manifest):
        remedy = f"record them where the checkpoint is: llava-deploy record CHECKPOINT {bundle}"
        return Tested("not shown", f"the bundle has no goldens, PyTorch's own answers to hold it against; {remedy}", ())
    try:
        report = selftest(bundle, wanted)
    except BackendError as error:
        return Tested("not shown", f"it could not be made: {error}", ())
    return tested_of(report)


def tested_of(report: SelftestReport) -> Tested:
    """A self-test's result; where no golden could be replayed nothing was shown."""
    state: State = "passed" if report.ok else "failed" if report.first_failure is not None else "not shown"
    return Tested(state, report.sentence, tuple(map(_stage, report.stages)))


def _stage(stage: GoldenStage) -> TestedStage:
    result = stage.result
    detail = "; ".join(filter(None, [result.detail, f"off by {result.error:.2g} of {result.tolerance:.2g} allowed"]))
    return TestedStage(str(stage), "passed" if result.ok else "failed", detail)
