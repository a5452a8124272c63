"""Tensors of a checkpoint, read one at a time and only when their values are wanted.

Opening a file reads names, dtypes and shapes; 14 GB take milliseconds. safetensors files are mapped into memory, so
reading one of their tensors copies nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llava_deploy.engines.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that weights may be stored in."""

_FROM_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"} | {
    f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)
}
_QUANTISED = re.compile(r"\bq?u?int\d|float[48]_|^[IU]\d|^F[468](_|$)")
"""In the words of torch and of safetensors: what quantised weights are packed into."""


class TensorSource(Protocol):
    """One tensor of a checkpoint."""

    @property
    def name(self) -> str:
        """Canonical name, or the file's own where it has not been renamed."""

    @property
    def key(self) -> str:
        """The file's own name."""

    @property
    def dtype(self) -> str:
        """``float32``, ``float16`` or ``bfloat16``; anything else is the file's word for it and cannot be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""

    @property
    def origin(self) -> str:
        """File and key, for messages."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that its values come from."""

    def read(self) -> np.ndarray:
        """The values, of ``shape``; bfloat16 as ``ml_dtypes.bfloat16``. Read-only, mapped from the file if it can be.

        Raises:
            CheckpointError: the values are stored in a dtype that cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class DerivedTensor:
    """A tensor whose values are made of another one's; the rest is that one's, where a subclass says no more.

    Subclasses have a name and ``read``.

    Attributes:
        source: the other one.
    """

    source: TensorSource

    @property
    def key(self) -> str:
        """See :class:`TensorSource`, also for the rest."""
        return self.source.key

    @property
    def dtype(self) -> str:
        """Of what ``read`` gives."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the source's values."""
        return self.source.nbytes

    @property
    def origin(self) -> str:
        """File and key, for messages."""
        return self.source.origin

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that its values come from."""
        return self.source.files


Source = TypeVar("Source", bound=TensorSource)


def renamed(source: Source, name: str) -> Source:
    """The same tensor under another name; every kind of source is a dataclass."""
    return dataclasses.replace(source, name=name)  # type: ignore[type-var]


def require_dtype(source: TensorSource) -> np.dtype:
    """The NumPy dtype of a source's values.

    Raises:
        CheckpointError: not a dtype that weights may be stored in.
    """
    if source.dtype not in DTYPES:
        step = "weights are not stored like this: convert the tensor to one of these"
        if _QUANTISED.search(source.dtype):
            step = "quantised in a form that is not read: take the unquantised checkpoint"
        raise CheckpointError(f"{source.origin}: want values of {', '.join(DTYPES)}, found {source.dtype}; {step}")
    return DTYPES[source.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that stands in one file under one key."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    key: str

    @property
    def origin(self) -> str:
        """File and key."""
        return f"{self.path} ({self.key})"

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.path,)

    def read(self) -> np.ndarray:
        """As :meth:`TensorSource.read`."""
        return self._values(require_dtype(self))

    def read_integers(self) -> np.ndarray:
        """As ``read``, for the signed integers of 8 to 64 bits that quantised weights are packed into."""
        return self._values(np.dtype(self.dtype))

    @abstractmethod
    def _values(self, dtype: np.dtype) -> np.ndarray:
        """The values as ``dtype``, which is the file's own."""


@dataclass(frozen=True)
class MappedTensor(StoredTensor):
    """A tensor in a safetensors file, read as a view of the mapped file; nothing is copied."""

    offset: int

    def _values(self, dtype: np.dtype) -> np.ndarray:
        if self.nbytes == 0:  # nothing can be mapped
            return np.empty(self.shape, dtype)
        try:
            return np.memmap(self.path, dtype, mode="r", offset=self.offset, shape=self.shape)
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointError(
                f"{self.origin}: cannot be read any more ({error}): the file was changed after it had been opened; "
                "leave it alone and start again"
            ) from error


@dataclass(frozen=True)
class TorchTensor(StoredTensor):
    """A tensor in a file of ``torch.save``, a view of it unless the values are stored transposed or with gaps."""

    tensor: torch.Tensor

    def _values(self, dtype: np.dtype) -> np.ndarray:
        values = self.tensor.detach().contiguous()
        if self.dtype == "bfloat16":  # torch gives NumPy no bfloat16
            import torch

            values = values.view(torch.uint16)
        return values.numpy().view(dtype)


def open_file(path: Path) -> Mapping[str, StoredTensor]:
    """Every tensor in one file, by the file's own names: safetensors by its suffix, else ``torch.save``'s format.

    Raises:
        CheckpointError: no such file, damaged, or a pickle that would need to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: want a weight file, found none; fetch the checkpoint's files again")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy"):  # the library checks offsets, sizes, overlaps and the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: want a whole safetensors file of {path.stat().st_size:,} bytes or more, found one that is "
            f"damaged or cut short ({error}); fetch the file again"
        ) from error
    header.pop("__metadata__", None)
    return {
        key: MappedTensor(
            name=key,
            dtype=_FROM_SAFETENSORS.get(entry["dtype"], entry["dtype"]),
            shape=tuple(entry["shape"]),
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            path=path,
            key=key,
            offset=8 + length + entry["data_offsets"][0],
        )
        for key, entry in header.items()
    }


def _open_torch(path: Path) -> dict[str, StoredTensor]:
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's first line advises to run the code; the one about a GLOBAL names it.
        lines = str(error).splitlines() or ["no reason given"]
        reason = next((line.strip() for line in lines if "GLOBAL" in line), lines[0])
        raise CheckpointError(
            f"{path}: refused, because reading it would run code that the file brings along ({reason}); "
            "take the checkpoint as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle calls torch with anything, and torch raises anything
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: want a whole zip file of torch.save, which can be mapped, found one that is damaged, cut short "
            f"or of the format before torch 1.6 ({reason}); fetch the file again, or take the checkpoint as safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path}: want a mapping of names to tensors, found {type(content).__name__} of other things; "
            "this is not a file of model weights"
        )
    return {str(key): _torch_source(path, str(key), tensor) for key, tensor in content.items()}


def _torch_source(path: Path, key: str, tensor: torch.Tensor) -> TorchTensor:
    import torch

    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
    dtype = str(tensor.dtype).removeprefix("torch.") if plain else kind
    shape = tuple(tensor.shape)
    return TorchTensor(key, dtype, shape, math.prod(shape) * tensor.dtype.itemsize, path, key, tensor)
