"""An export holds one tensor at a time, however many the checkpoint has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

LAYERS = 14
TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "num_key_value_heads": 4}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}  # groups of 32 divide these
LARGEST = 512 * 2048 * 4  # bytes of a weight of the feed-forward part, as float32
FIRST_LAYER = "language_model.model.layers.0."

# Anonymous memory alone: pages of mapped files are the kernel's to take back. It is read whenever a tensor has just
# been written, and every millisecond, for what happens between.
SCRIPT = """
import sys, threading
from pathlib import Path
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions

def opened(path):
    checkpoint = open_checkpoint(path)
    return checkpoint if precision == "fp32" else round_to_nearest(checkpoint, QuantizeOptions(32, False, "fp16"))

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon:"))

def sample(_progress=None):
    global peak
    peak = max(peak, anonymous())

def watch():
    while not done.wait(0.001):
        sample()

precision = sys.argv[1]
small, large, output = map(Path, sys.argv[2:])
export(opened(small), output / "small-bundle", precision)  # what is imported and set up once is there by now
checkpoint = opened(large)
peak = before = anonymous()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
export(checkpoint, output / "bundle", precision, on_progress=sample)
done.set()
watcher.join()
print(peak - before)
"""


def deepened(directory: Path, edit_json: Any) -> None:
    """Give the decoder ``LAYERS`` layers, each with the weights of the first."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    first = {name: value for name, value in tensors.items() if name.startswith(FIRST_LAYER)}
    for layer in range(1, LAYERS):
        names = {name.replace(".layers.0.", f".layers.{layer}."): value for name, value in first.items()}
        tensors |= {name: value.clone() for name, value in names.items()}
    save_file(tensors, path)
    edit_json(directory / "config.json", lambda values: values["text_config"].update(num_hidden_layers=LAYERS))


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 50, 6), ("int4", 6, 3)])
def test_one_tensor_at_a_time(
    make_llava: Any,
    edit_json: Any,
    child_environment: dict[str, str],
    tmp_path: Path,
    precision: str,
    least: int,
    most: int,
) -> None:
    """In sizes of the largest tensor in float32: its file has ``least`` or more, the memory below ``most``."""
    large = make_llava("large", dtype=torch.float16, text=TEXT).directory
    deepened(large, edit_json)
    arguments = [precision, str(make_llava("small", text=SMALL).directory), str(large), str(tmp_path)]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "bundle" / "decoder.onnx.data").stat().st_size > least * LARGEST
    assert int(found.stdout) < most * LARGEST
