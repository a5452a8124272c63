"""The command ``doctor``. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.runtime.command_group import examples, quiet
from llava_deploy.runtime.command_options import PATH, json_option

if TYPE_CHECKING:
    from llava_deploy.runtime.doctor.bundles import Planner


def doctor_command(planner: Planner) -> click.Command:
    """The command; ``planner``, of another room, says whether a bundle fits."""

    @click.command("doctor", epilog=examples("doctor", "doctor bundle", "doctor bundle --json"))
    @click.argument("bundles", type=PATH, nargs=-1, metavar="[BUNDLE ...]")
    @json_option
    def doctor(bundles: tuple[Path, ...], as_json: bool) -> None:
        """Say what this machine has, and what bundles could do on it.

        System, processor, memory, GPU with its driver, power mode, and what is installed and really loads; which
        backend runs, and what to install for the others. Of a bundle: which engines fit, whether memory does, and what
        to type next.

        Nothing is changed. Fails where nothing can run a bundle, or not every bundle that is named runs as it is.
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

    return doctor
