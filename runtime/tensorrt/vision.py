"""The vision graph through TensorRT; features stay on the GPU, and nobody waits for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np

from llava_deploy.engines.contract import VisionShape
from llava_deploy.runtime.tensorrt.buffers import Pool, Staging
from llava_deploy.runtime.tensorrt.cuda import Device, DeviceMemory, Mark
from llava_deploy.runtime.tensorrt.engine import Engine, Replay


class TensorRtFeatures:
    """Features of one picture, ``[patches, hidden]``, on the GPU; see :class:`DeviceFeatures`.

    Attributes:
        address: of the first row.
        shape: ``(patches, hidden)``.
        dtype: of the vision graph.
    """

    def __init__(self, device: Device, block: DeviceMemory, pool: Pool, shape: tuple[int, int], dtype: str) -> None:
        self.address = block.address
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._device = device
        weakref.finalize(self, pool.put, block).atexit = False

    @property
    def row_size(self) -> int:
        """Bytes of a row."""
        return self.shape[1] * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """A copy on the host; waits for the GPU."""
        found = np.empty(self.shape, self.dtype)
        self._device.download(found.ctypes.data, self.address, found.nbytes)
        self._device.synchronize()
        return found


class TensorRtVision:
    """The vision graph on the GPU; see :class:`VisionSession`."""

    def __init__(self, engine: Engine, shape: VisionShape) -> None:
        """Have a context for it.

        Raises:
            DeviceMemoryError: there is no room.
            BackendError: TensorRT refuses.
        """
        self.max_images = engine.recipe.limits.max_images
        self._shape = shape
        self._spec = shape.spec(self.max_images)
        self._device = engine.device
        engine.require(self._spec)
        self._context = engine.context(0, Replay.NEVER)
        self._staging = Staging(engine.device, "pictures' pixels")
        self._features: DeviceMemory | None = None
        self._pool = Pool(engine.device, self._picture_size, "a picture's features")
        self._uploaded: Mark | None = None
        self._span: tuple[Mark, Mark] | None = None

    @property
    def _picture_size(self) -> int:
        return self._shape.patches * self._shape.hidden_size * np.dtype(self._shape.dtype).itemsize

    def encode(self, pixel_values: np.ndarray) -> list[TensorRtFeatures]:
        """``[images, 3, height, width]`` to the features of each picture, which are being computed.

        Raises:
            ContractError: of another shape, or more than ``max_images``.
            DeviceMemoryError: there is no room.
            BackendError: TensorRT fails.
        """
        shape, device = self._shape, self._device
        feed = pixel_values.astype(shape.dtype, copy=False)
        images = self._spec.check({"pixel_values": feed})["images"]
        if self._uploaded is not None:
            self._uploaded.wait()  # the pixels of the call before may still be on their way up
            self._uploaded = None
        arrays = self._staging.lay_out({"pixel_values": (feed.shape, feed.dtype)})
        arrays.host["pixel_values"][:] = feed
        size = self._picture_size
        if self._features is None or self._features.size < images * size:
            self._features = None
            self._features = device.allocate(images * size, "pictures' features")
        blocks = [self._pool.take() for _ in range(images)]
        found = [
            TensorRtFeatures(device, block, self._pool, (shape.patches, shape.hidden_size), shape.dtype)
            for block in blocks
        ]
        began = device.mark()
        arrays.upload()
        self._uploaded = device.mark()
        self._context.bind("pixel_values", arrays.addresses["pixel_values"])
        self._context.reshape("pixel_values", feed.shape)
        self._context.bind("image_features", self._features.address)
        self._context.run()
        # Each in a block of its own: the pictures of one run are not forgotten together.
        for i, block in enumerate(blocks):
            device.copy(block.address, self._features.address + i * size, size)
        self._span = (began, device.mark())
        return found

    def clock(self) -> Callable[[], float] | None:
        """Seconds that the GPU took for the last :meth:`encode`; see :class:`VisionSession`."""
        if self._span is None:
            return None
        began, ended = self._span
        return lambda: ended.since(began)
