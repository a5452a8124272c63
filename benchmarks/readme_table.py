"""README's performance tables, made from the files of results.

    python benchmarks/readme_table.py           # writes them into README.md
    python benchmarks/readme_table.py --check   # fails where README.md says anything else

They stand between two comments, and nothing there is written by hand. A result that is not there has no table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- measured: written by benchmarks/readme_table.py -->"
END = "<!-- /measured -->"
PEERS = "peers.json"
DECODE = {"decode_bandwidth_1.1b.json": "TinyLlama-1.1B", "decode_bandwidth_7b.json": "Llama-2-7B"}
ON_GPU = "gpu/gpu_check_*.json"
RAN = {
    "onnxruntime-cuda": "**llava-deploy** {weights}, ONNX Runtime on CUDA",
    "onnxruntime-cuda-canonical": "the same in {weights} without `build`'s lowering",
    "tensorrt": "**llava-deploy** {weights}, TensorRT",
    "tensorrt-rtx": "**llava-deploy** {weights}, TensorRT for RTX",
    "transformers eager": "transformers {weights}",
    "transformers compiled": "transformers {weights}, `torch.compile`, static cache",
}
MODES = {"vlm": "", "text": ", decoder alone"}

OURS = "llava-deploy"


def tables(results: Path) -> str:
    """All tables, of the results that are there."""
    parts = []
    if (results / PEERS).is_file():
        parts.append(peers_table(_read(results / PEERS)))
    decode = {shape: _read(results / name) for name, shape in DECODE.items() if (results / name).is_file()}
    if decode:
        parts.append(decode_table(decode))
    parts += [gpu_table(_read(path)) for path in sorted(results.glob(ON_GPU))]
    return "\n\n".join(parts)


def peers_table(found: Mapping[str, Any]) -> str:
    """One row a peer: medians."""
    rounds = max(entry["rounds"] for entry in found["entries"])
    task = (
        f"{_day(found)}, {found['machine']}, {found['threads']} threads, {found['read_gb_per_s']['median']:.1f} GB/s "
        f"read; SmolLM2-135M behind a CLIP ViT-B/16, {found['prompt_tokens']} prompt tokens "
        f"({found['image_tokens']} of them one picture's), {found['new_tokens']} new; medians of {rounds} rounds:"
    )
    lines = [
        task,
        "",
        "| | first token | decode | of the bandwidth's limit | peak memory | tokens as transformers fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for entry in found["entries"]:
        equal = "" if entry["equal_tokens"] is None else f"{entry['equal_tokens']} of {found['new_tokens']}"
        cells = (
            entry["label"].replace(OURS, f"**{OURS}**") + MODES[entry["mode"]],
            f"{entry['ttft_ms']['median']:.0f} ms",
            f"{entry['decode_tokens_per_s']['median']:.1f} tok/s",
            f"{entry['share_of_ideal']:.0%}",
            f"{entry['peak_mb']:,} MB",
            equal,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def decode_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a shape and context: tokens a second and the share of the limit, ours and llama.cpp's."""
    groups = " and ".join(sorted({str(result["int4"]["group_size"]) for result in found.values()}, key=int))
    rounds = min(len(result["rounds"]) for result in found.values())
    what = (
        f"Decoders with drawn weights in int4, groups of {groups}; the limit counts every weight and the visible "
        f"cache, its values at two bytes; medians of {rounds} round{'s' if rounds > 1 else ''} or more:"
    )
    lines = [
        what,
        "",
        "| shape | behind | llava-deploy | of the limit | llama.cpp Q4_0 | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for shape, result in found.items():
        medians = result["medians"]
        for context in (key for key in medians["ours"] if key.isdigit()):
            pairs = [medians[name][context] for name in ("ours", "llama.cpp")]
            cells = [f"{one['tokens_per_s']:.1f} tok/s | {one['share_of_ideal']:.0%}" for one in pairs]
            lines.append(f"| {shape} | {int(context):,} tokens | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_table(found: Mapping[str, Any]) -> str:
    """One row a backend and precision that ran; of one row of tokens, and of eight."""
    environment = found["environment"]
    versions = {**environment["packages"], **environment["modules"]}
    speed = {part["name"]: part["result"] for part in found["parts"] if _ran(part)}
    tokens = {result["prompt_tokens"] for result in speed.values()}
    task = (
        f"{_day(found)}, {environment['gpu']['name']}, {environment['copy_gb_per_s']:,.0f} GB/s copied; a LLaVA of "
        f"7B's shape with drawn weights, {'/'.join(map(str, sorted(tokens)))} prompt tokens with one picture, 128 new; "
        f"ONNX Runtime {versions['onnxruntime']}, PyTorch {versions['torch']}, transformers "
        f"{versions['transformers']}; one run, every figure a median of several:"
    )
    lines = [
        task,
        "",
        "| | picture | first token | decode | of the copy's bandwidth | eight rows | GPU memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in speed.items():
        _, weights, backend, _ = name.split("/")
        eight = result.get("decode_at_batch", {}).get("8")
        cells = (
            RAN[backend].format(weights=weights),
            f"{result['vision_ms']:.1f} ms",
            f"{result['ttft_ms']:.0f} ms",
            f"{result['decode_tokens_per_s']:.0f} tok/s",
            f"{result['share_of_copy_bandwidth']:.0%}",
            "" if eight is None else f"{eight['tokens_per_s']:,.0f} tok/s",
            f"{result['device_peak_bytes'] / 1e9:.1f} GB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ran(part: Mapping[str, Any]) -> bool:
    shape, _, what = part["name"].partition("/")
    return part["status"] == "passed" and shape == "7b" and what.endswith("/speed")


def updated(readme: str, block: str) -> str:
    """README with the block between the marks.

    Raises:
        ValueError: it has not both marks, once each and in their order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md: want the marks {BEGIN} and {END}, once each and in this order")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}" if block else f"{before}{BEGIN}\n{END}{after}"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _day(found: Mapping[str, Any]) -> str:
    return str(found["date"]).partition("T")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where README does not match")
    given = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    wanted = updated(readme, tables(RESULTS))
    if wanted == readme:
        return
    if given.check:
        sys.exit("README.md: its measured tables are not those of benchmarks/results; run benchmarks/readme_table.py")
    README.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
