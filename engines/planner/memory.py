"""Peak memory as a sum of named parts, each in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["host", "mapped", "device"]
"""``host`` is anonymous memory; ``mapped`` are pages of files, which the system takes back where it must."""

PartName = Literal["process", "weights", "KV cache", "activations", "workspace", "image features"]


@dataclass(frozen=True)
class Part:
    """One of the things that take memory at the peak, in bytes."""

    name: PartName
    place: Place
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """The peak of one process."""

    parts: tuple[Part, ...]

    def of(self, place: Place) -> int:
        """Bytes in one place."""
        return sum(part.nbytes for part in self.parts if part.place == place)

    @property
    def anonymous(self) -> int:
        """Bytes of the host's memory that no file stands behind: there they are, or the process dies."""
        return self.of("host")

    @property
    def mapped(self) -> int:
        """Bytes of files that are mapped, at most; fewer make it slower, not fail."""
        return self.of("mapped")

    @property
    def device(self) -> int:
        """Bytes of the GPU's memory."""
        return self.of("device")

    @property
    def unified(self) -> int:
        """Bytes where host and device share one memory, in which everything is once."""
        return self.anonymous + self.device
