"""Another version of a bundle in the place of the old one: what stays is not copied, what changes is written anew."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from llava_deploy.engines.manifest import MANIFEST_NAME
from llava_deploy.engines.staging import staged_directory


@contextlib.contextmanager
def rewritten_bundle(bundle: Path, *, keeps: Callable[[str], bool]) -> Iterator[Path]:
    """Give a directory that takes the place of ``bundle`` when the block ends without an error.

    It begins with everything of ``bundle`` that ``keeps`` says by its relative POSIX path, engines included, but never
    with the manifest, which the block has to write. Those files are the old ones under a second name where the file
    system has hard links, so the block may replace them but not write into them. A process killed at any time leaves
    the old bundle or the new one, as :func:`~llava_deploy.engines.staging.staged_directory` has it.

    Raises:
        OSError: a file cannot be linked, copied or written.
    """
    bundle = bundle.resolve()  # what a link names is replaced, not the link
    with staged_directory(bundle, replace=True) as staging:
        for path in sorted(bundle.rglob("*")):
            relative = path.relative_to(bundle).as_posix()
            if path.is_file() and relative != MANIFEST_NAME and keeps(relative):
                link_or_copy(path, staging / relative)
        yield staging


def link_or_copy(source: Path, target: Path) -> None:
    """Have a file under a second name, without a copy where there are hard links; so neither is to be written to.

    Raises:
        OSError: it cannot be linked, nor copied.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # no hard links here, or not across these file systems
        shutil.copyfile(source, target)
