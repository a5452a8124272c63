"""Opening a bundle: its manifest, and its files held against the sizes and sha256 that the manifest lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked."""

    directory: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Full path of a file that the manifest lists."""
        return self.directory / self.manifest.entry(name).path


def open_bundle(directory: Path, integrity: Integrity = Integrity.QUICK) -> Bundle:
    """Read the manifest of ``directory`` and check the files it lists.

    Raises:
        BundleError: no bundle, a manifest that cannot be used, or a file that is missing, altered, or reached through a
            link that leaves the bundle.
    """
    manifest = read_manifest(directory)
    check_files(directory, manifest.files, integrity, remedy="export the bundle again")
    return Bundle(directory, manifest)
