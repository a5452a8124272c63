"""What a decode step of ours reads of a bundle."""

from __future__ import annotations

from pathlib import Path

from llava_deploy.engines.manifest import DECODER_GRAPH, read_manifest


def decoder_bytes(bundle: Path) -> int:
    """Bytes of the files that the decoder's graph has its weights in: a tied output layer's are the embedding table."""
    graph = (bundle / DECODER_GRAPH).read_bytes()

    def is_named(path: str) -> bool:
        # A short text in a protobuf file: its length in one byte, then the text.
        return bytes([len(path)]) + path.encode() in graph

    return sum(entry.size for entry in read_manifest(bundle).files if is_named(entry.path))
