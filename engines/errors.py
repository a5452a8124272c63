"""The errors that llava-deploy raises on purpose.

Every message says what was wanted, what was found, where, and what to do next. The command line prints the message
alone and exits with ``exit_code``; anything that is not one of these is a bug and keeps its traceback.
"""

from __future__ import annotations


class LlavaDeployError(Exception):
    """Base of every error raised on purpose: something failed that the caller could not have known (exit code 1)."""

    exit_code = 1


class InputError(LlavaDeployError, ValueError):
    """The caller handed in something that cannot be used (exit code 2)."""

    exit_code = 2


class OptionError(InputError):
    """An option has a value that it cannot have.

    Attributes:
        option: its name in Python; on the command line it is the flag of that name, ``--max-len`` for ``max_len``.
        reason: the values that are wanted and the one that was found.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(option, reason)
        self.option = option
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.option}: {self.reason}"


class CheckpointError(InputError):
    """A checkpoint directory is not one, is damaged, or says something that cannot be honoured."""


class BundleError(InputError):
    """A bundle is missing, altered, incomplete or of another format version."""


class ContractError(InputError):
    """A tensor's name, dtype or shape differs from what its graph takes."""


class PictureError(InputError):
    """A picture is empty, damaged, not a picture, or too large."""


class PromptError(InputError):
    """A prompt cannot be turned into the decoder's input: placeholders, length, token ids or template."""


class BackendError(LlavaDeployError):
    """A backend (ONNX Runtime, TensorRT) is not installed, cannot run here, or failed."""


def lacks_onnx_ir(error: ImportError) -> BackendError:
    """What a builder raises where the lowering passes cannot be imported."""
    return BackendError(
        f"building an engine needs onnx-ir, which cannot be imported ({error}); "
        "install it with: pip install 'llava-deploy[build]'"
    )
