"""What the measurements of ours share: what a step reads, and answers that nothing ends early or knows in part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_deploy.engines.manifest import DECODER_GRAPH, read_manifest
from llava_deploy.runtime import Llava

MOST_REUSED = 1
"""Tokens that a prompt shares with the one before: some tokenizers begin every prompt with the same one."""


def without_end(llava: Llava) -> Llava:
    """The same model, but no answer ends before its number of tokens."""
    chat = replace(llava.manifest.chat, stop_token_ids=(), stop_strings=())
    llava.manifest = replace(llava.manifest, chat=chat)
    return llava


def decoder_bytes(bundle: Path) -> int:
    """Bytes of the files that the decoder's graph has its weights in: a tied output layer's are the embedding table."""
    graph = (bundle / DECODER_GRAPH).read_bytes()

    def is_named(path: str) -> bool:
        # A short text in a protobuf file: its length in one byte, then the text.
        return bytes([len(path)]) + path.encode() in graph

    return sum(entry.size for entry in read_manifest(bundle).files if is_named(entry.path))
