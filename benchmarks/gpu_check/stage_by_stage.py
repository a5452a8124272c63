"""PyTorch and a backend side by side in Polygraphy's comparator, over graphs with their hidden states as outputs.

The engines that are compared here are built for it: a graph with more outputs is not the one that is deployed, and may
be fused otherwise. What is deployed is held against PyTorch by the project's own ``verify``. In exchange, a layer that
goes wrong on the GPU is named here. Polygraphy reads ``POLYGRAPHY_USE_TENSORRT_RTX`` once, at its import.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from names import BackendUnderTest
from onnxruntime_on import open_session
from outcome import CheckFailedError
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from torch_runners import TorchDecoder, TorchVision, decoder_feeds

from llava_deploy.engines.contract import GraphSpec
from llava_deploy.engines.lowering.files import lower_file
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, Manifest, read_manifest
from llava_deploy.engines.onnxruntime_module import import_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.questions import drawn_picture
from llava_deploy.exporter.demo.scenes import checkpoint_dir
from llava_deploy.exporter.inner_values import mark_hidden_states
from llava_deploy.exporter.quantization.stored import with_stored_decoder
from llava_deploy.exporter.reference.pixels import reference_pixels
from llava_deploy.exporter.reference.torch_model import exact_float32, load_torch
from llava_deploy.runtime.stages import TOLERANCE, position_errors

PROMPT = 24  # tokens of text behind the picture's


class _Mark(ir.passes.InPlacePass):
    """Hidden states become outputs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        mark_hidden_states(model)
        return ir.passes.PassResult(model, modified=True)


def compare(bundle: str, backend: BackendUnderTest, device: str) -> dict[str, Any]:
    """A part: both graphs of the tiny model's bundle on a backend beside PyTorch, in Polygraphy's comparator.

    Args:
        bundle: directory.
        backend: what runs the graphs: a TensorRT, or ONNX Runtime on the CPU.
        device: of PyTorch.

    Raises:
        CheckFailedError: a hidden state or an output is out of tolerance.
    """
    directory, manifest = Path(bundle), read_manifest(Path(bundle))
    checkpoint = open_checkpoint(checkpoint_dir())
    stored = checkpoint if manifest.quantization is None else with_stored_decoder(checkpoint, directory)
    model = load_torch(stored).to(device)
    result: dict[str, Any] = {"onnxruntime": import_onnxruntime().__version__, "outputs": {}}
    wrong: list[str] = []
    with exact_float32(), TemporaryDirectory() as place:
        pixels = reference_pixels(drawn_picture(), checkpoint.image).astype(manifest.vision.dtype)
        spec = manifest.vision.spec()
        torch_vision = TorchVision(model, spec, device)
        feeds = [{"pixel_values": pixels}]
        other = _runner(backend, directory, VISION_GRAPH, manifest, spec, 0, Path(place))
        wrong += _compare(torch_vision, other, feeds, manifest, result["outputs"])

        decoder_spec = manifest.decoder.spec()
        torch_decoder = TorchDecoder(model, decoder_spec, device)
        embeds = _embeds(model, torch_vision, feeds[0], device).astype(manifest.decoder.dtype)
        token = embeds[:, -1:]
        steps = decoder_feeds(torch_decoder, manifest, embeds, token)
        slots = steps[0]["past.0.key"].shape[2]
        other = _runner(backend, directory, DECODER_GRAPH, manifest, decoder_spec, slots, Path(place))
        wrong += _compare(torch_decoder, other, steps, manifest, result["outputs"])
    if wrong:
        raise CheckFailedError(f"{wrong[0]} is the first of {len(wrong)} out of tolerance", result)
    return result


def _embeds(model: Any, runner: TorchVision, feed: dict[str, np.ndarray], device: str) -> np.ndarray:
    """A picture's features and some text behind them, ``[1, seq, hidden]``."""
    runner.activate()
    features = runner.infer(feed)["image_features"]
    runner.deactivate()
    with torch.inference_mode():
        text = model.embed(torch.arange(5, 5 + PROMPT, device=device)[None]).float().cpu().numpy()
    return np.concatenate([features, text], axis=1)


def _compare(
    reference: BaseRunner, other: BaseRunner, feeds: list[dict[str, np.ndarray]], manifest: Manifest,
    found: dict[str, Any],
) -> list[str]:  # fmt: skip
    """Run both over the feeds and compare every output of ``other``; those that are out of tolerance."""
    tolerance = TOLERANCE[manifest.model.precision]
    with G_LOGGER.verbosity(G_LOGGER.WARNING):
        results = Comparator.run([reference, other], data_loader=feeds)
    wrong: list[str] = []
    errors: list[OrderedDict[str, bool]] = []

    def measure(wanted: Any, got: Any) -> OrderedDict[str, bool]:
        step = f"{len(errors) + 1} of {len(feeds)}"
        verdicts: OrderedDict[str, bool] = OrderedDict()
        for name, value in got.items():
            want = np.asarray(wanted[name])
            # Of a cache, the slots that are filled.
            part = np.asarray(value)[:, :, : want.shape[2]] if name.startswith("present.") else np.asarray(value)
            error = float(position_errors(part, want).max())
            verdicts[name] = error <= tolerance
            key = f"{reference.name.split(', ')[-1]} {name}, feed {step}"
            found[key] = {"error": error, "tolerance": tolerance, "ok": verdicts[name]}
            print(f"{'ok  ' if verdicts[name] else 'BAD '} {key}: relative error {error:.1e}", flush=True)
            if not verdicts[name]:
                wrong.append(key)
        errors.append(verdicts)
        return verdicts

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # what differs is printed here
        agreed = bool(Comparator.compare_accuracy(results, compare_func=measure))
    if len(errors) != len(feeds) or agreed == bool(wrong):
        raise ValueError(
            f"Polygraphy compared {len(errors)} of {len(feeds)} feeds and says {agreed}, with {wrong} wrong"
        )
    return wrong


def _runner(
    backend: BackendUnderTest, bundle: Path, graph: str, manifest: Manifest, spec: GraphSpec, slots: int, place: Path
) -> BaseRunner:
    """Of the graph with its hidden states as outputs; ``slots`` of the decoder's cache."""
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        from tensorrt_runner import tensorrt_runner

        return tensorrt_runner(backend, bundle / graph, manifest, slots, [_Mark()], place)
    lowered = lower_file(bundle / graph, place, [_Mark()])
    return OnnxrtRunner(lambda: open_session(lowered, "cpu"), name=f"{backend}, {spec.name}")
