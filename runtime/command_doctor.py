"""What ``doctor`` does. Nothing heavy is imported before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.runtime.command_group import quiet

if TYPE_CHECKING:
    from llava_deploy.runtime.doctor.bundles import Planner


def run_doctor(bundles: Sequence[Path], planner: Planner, *, as_json: bool) -> None:
    """Look at this machine and at bundles, and show what was found; ``planner`` says whether a bundle fits.

    Raises:
        LlavaDeployError: nothing can run a bundle, or not every one of these runs as it is.
    """
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.doctor.diagnosis import examine
    from llava_deploy.runtime.doctor.system import this_system
    from llava_deploy.runtime.terminal_doctor import diagnosis_tables

    with terminal.progress("looking", quiet=quiet()):
        diagnosis = examine(this_system(), bundles, planner)
    terminal.show(diagnosis.to_dict() if as_json else diagnosis_tables(diagnosis))
    if diagnosis.trouble:
        raise LlavaDeployError(diagnosis.trouble)
