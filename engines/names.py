"""Names that options and manifests take, stated once. Standard library only."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "fp16"]
"""Of a bundle's weights and activations."""

Conversation = Literal["vicuna_v1", "llama_2", "mistral", "plain"]
"""The built-in conversation formats, by LLaVA's names."""
