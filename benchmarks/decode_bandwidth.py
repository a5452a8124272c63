"""Decode of large decoders against what the memory's bandwidth allows, ours and llama.cpp's in turns.

    python benchmarks/decode_bandwidth.py WORK --shape 1.1b -o benchmarks/results/decode_bandwidth_1.1b.json

Decoders of TinyLlama-1.1B's shape and of Llama-2-7B's, every weight drawn, in int4; 7B's take 12 GB of disk. A step
reads every weight and the visible cache once: bandwidth over these bytes, the cache's values counted at two bytes, is
the most that the machine allows. Of ours, with --shape 1.1b, also eight prompts at once beside one, and the first token
of a second turn beside that of its new tokens alone. Needs the environments `hf` and `llamacpp` of the peers'
comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from bandwidth import MemoryBandwidth
from drawn_checkpoint import drawn_checkpoint
from measuring import circumstances, save
from peers.decoder_shape import Shape
from peers.processes import ProcessError, result, run

from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.config import LlavaConfig
from llava_deploy.exporter.demo.scenes import checkpoint_dir
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions

PEERS = Path(__file__).resolve().parent / "peers"
CONTEXTS = (64, 2000)
STEPS = 32
POSITIONS = 4096
OPTIONS = QuantizeOptions(group_size=128, symmetric=False, lm_head="int8")
"""The form that export gives by default, with an output layer of 8 bits, as the GGUF file has."""

BUILD = {"1.1b": ("--int8", "prefill"), "7b": ()}
"""What ``llava-deploy build`` is given beside the backend: integers for the steps of eight prompts at once."""

BATCH, TURN = 8, 512
CACHE_VALUE = 2  # bytes
LIMIT_S = 3600


SHAPES = {
    "1.1b": Shape(22, 2048, 5632, 32, 4, 32000, POSITIONS),
    "7b": Shape(32, 4096, 11008, 32, 32, 32000, POSITIONS),
}


def config_of(shape: Shape) -> LlavaConfig:
    """The decoder behind the shipped tiny model's vision tower."""
    tiny = open_checkpoint(checkpoint_dir()).config
    decoder = dataclasses.replace(
        tiny.decoder, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, max_position_embeddings=shape.positions, tie_word_embeddings=False,
    )  # fmt: skip
    sizes = (tiny.projector.sizes[0], *(shape.hidden for _ in tiny.projector.sizes[1:]))
    return dataclasses.replace(tiny, decoder=decoder, projector=dataclasses.replace(tiny.projector, sizes=sizes))


def cache_bytes(shape: Shape, tokens: int) -> int:
    """Keys and values of so many tokens."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * CACHE_VALUE * tokens


def write_bundle(name: str, bundle: Path) -> None:
    """Ours of one of the shapes, with an engine."""
    drawn = drawn_checkpoint(config_of(SHAPES[name]))
    export(round_to_nearest(drawn, OPTIONS), bundle, "int4", replace=True)
    program = Path(sys.executable).with_name("llava-deploy")
    run([program, "build", bundle, "--backend", "onnxruntime", *BUILD[name]], LIMIT_S)


class Turns:
    """Both models of a shape, and the rounds over them."""

    def __init__(self, work: Path, venvs: Path, name: str, threads: int) -> None:
        self._shape, self._name, self._threads = SHAPES[name], name, threads
        self._bundle, self._gguf = work / f"drawn-{name}", work / f"drawn-{name}.gguf"
        self._hf, self._llamacpp = (venvs / one / "bin" / "python" for one in ("hf", "llamacpp"))
        self._peer_bytes = 0
        self._rounds: list[dict[str, Any]] = []

    def make(self) -> None:
        """Write both models."""
        write_bundle(self._name, self._bundle)
        shape = json.dumps(dataclasses.asdict(self._shape))
        self._peer_bytes = result([self._hf, PEERS / "drawn_gguf.py", self._gguf, shape], LIMIT_S)["weight_bytes"]

    def round(self) -> None:
        """Bandwidth, then ours, then llama.cpp, each in a process of its own but for the first."""
        asked = [
            "--contexts", *map(str, CONTEXTS), "--steps", str(STEPS), "--threads", str(self._threads),
        ]  # fmt: skip
        beside = ["--batch", str(BATCH), "--turn", str(TURN)] if self._name == "1.1b" else []
        read = MemoryBandwidth().read(self._threads)
        ours = result([sys.executable, PEERS / "decode_ours.py", self._bundle, *asked, *beside], LIMIT_S)
        peer = result([self._llamacpp, PEERS / "decode_llamacpp.py", self._gguf, *asked], LIMIT_S)
        peer["weight_bytes"] = self._peer_bytes
        self._rounds.append({"read_gb_per_s": read, "ours": ours, "llama.cpp": peer})

    def remove(self) -> None:
        """Remove both models."""
        shutil.rmtree(self._bundle, ignore_errors=True)
        self._gguf.unlink(missing_ok=True)

    def found(self) -> dict[str, Any]:
        """Medians of the rounds, and the rounds."""
        read = statistics.median(one["read_gb_per_s"] for one in self._rounds)
        rows = {name: self._row(name, read) for name in ("ours", "llama.cpp")}
        return {
            "shape": dataclasses.asdict(self._shape),
            "int4": dataclasses.asdict(OPTIONS),
            "build": BUILD[self._name],
            "threads": self._threads,
            "steps": STEPS,
            "read_gb_per_s": read,
            "medians": rows,
            "rounds": self._rounds,
        }

    def _row(self, name: str, read: float) -> dict[str, Any]:
        weights = self._rounds[0][name]["weight_bytes"]
        row: dict[str, Any] = {"weight_bytes": weights}
        for context in CONTEXTS:
            rate = statistics.median(one[name]["decode_tokens_per_s"][str(context)] for one in self._rounds)
            ideal = read * 1e9 / (weights + cache_bytes(self._shape, context + STEPS // 2))
            row[str(context)] = {
                "tokens_per_s": rate,
                "ideal_tokens_per_s": round(ideal, 2),
                "share_of_ideal": round(rate / ideal, 3),
            }
        for key in ("batch_gain", "turn_over_alone"):
            found = [one[name][key] for one in self._rounds if key in one[name]]
            row |= {key: round(statistics.median(found), 3)} if found else {}
        return row


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"read bandwidth {found['read_gb_per_s']:.1f} GB/s"]
    for name, row in found["medians"].items():
        for context in CONTEXTS:
            at = row[str(context)]
            share = f"{at['share_of_ideal']:.0%} of {at['ideal_tokens_per_s']:.1f}"
            lines.append(f"{name:10} behind {context:>5} tokens: {at['tokens_per_s']:6.2f} tok/s, {share}")
        lines += [f"{name:10} {key}: {row[key]}" for key in ("batch_gain", "turn_over_alone") if key in row]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--venvs", type=Path, help="environments of the peers; WORK/venvs by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    venvs = given.work / "venvs" if given.venvs is None else given.venvs
    turns = Turns(given.work, venvs, given.shape, given.threads)
    try:
        turns.make()
        for _ in range(given.rounds):
            turns.round()
            save(given.output, {**circumstances(), **turns.found()})
    except ProcessError as error:
        sys.exit(f"{given.shape}: {error}")
    finally:
        turns.remove()
    print(table(turns.found()))


if __name__ == "__main__":
    main()
