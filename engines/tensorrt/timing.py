"""A file of measured kernels, so that the next build measures only what is new.

Of the full TensorRT; TensorRT for RTX measures nothing while it builds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.tensorrt.messages import Messages
from llava_deploy.engines.tensorrt_module import TensorRtModule


def load_timing_cache(module: TensorRtModule, config: Any, path: Path | None, messages: Messages) -> Any:
    """Give the cache in ``path`` to a build, or an empty one where there is no such file; ``None`` without a path.

    TensorRT takes a cache of another version or GPU for an empty one, and would write it over; it says so to
    ``messages``.

    Raises:
        OptionError: the file cannot be read, or is no cache of this version and GPU.
    """
    if path is None:
        return None
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OptionError("timing_cache", f"{path}: cannot be read ({error.strerror})") from error
    known = len(messages.warnings)
    cache = config.create_timing_cache(content)
    is_taken = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    if not is_taken or any("timing cache" in text.lower() for text in messages.warnings[known:]):
        raise OptionError(
            "timing_cache",
            f"{path}: want a timing cache of TensorRT {module.version} and this GPU, found another; name another file",
        )
    return cache


def save_timing_cache(config: Any, cache: Any, path: Path | None) -> None:
    """Write what a build has measured to ``path``, whole or not at all.

    Raises:
        OptionError: it cannot be written.
    """
    if path is None or cache is None:
        return
    content = memoryview(config.get_timing_cache().serialize())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
            whole = Path(directory, path.name)
            whole.write_bytes(content)
            whole.replace(path)
    except OSError as error:
        raise OptionError("timing_cache", f"{path}: cannot be written ({error.strerror})") from error
