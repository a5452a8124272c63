"""The token ids and strings that stand for pictures (LLaVA, ``llava/constants.py``)."""

from __future__ import annotations

from llava_deploy.engines.contract import IGNORE_INDEX, IMAGE_TOKEN_INDEX

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_END_TOKEN",
    "IMAGE_PATCH_TOKEN",
    "IMAGE_START_TOKEN",
    "IMAGE_TOKEN",
    "IMAGE_TOKEN_INDEX",
]

IMAGE_TOKEN = "<image>"
IMAGE_PATCH_TOKEN = "<im_patch>"
IMAGE_START_TOKEN = "<im_start>"
IMAGE_END_TOKEN = "<im_end>"
