"""Parts over the shipped tiny LLaVA: its export, and the comparison with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backends import load
from names import BackendUnderTest, Weights
from outcome import CheckFailedError

from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.demo.questions import drawn_picture
from llava_deploy.exporter.demo.scenes import DESCRIBE, checkpoint_dir
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import GROUP_SIZE, QuantizeOptions
from llava_deploy.exporter.verify import VerifyOptions, verify_loaded
from llava_deploy.runtime.prompt import render_chat
from llava_deploy.runtime.stages import StageResult


def shipped(weights: Weights) -> Checkpoint:
    """The tiny model, its decoder rounded to int4 where that is asked for."""
    checkpoint = open_checkpoint(checkpoint_dir())
    if weights == "fp16":
        return checkpoint
    return round_to_nearest(checkpoint, QuantizeOptions(GROUP_SIZE, weights == "int4-symmetric", "fp16"))


def make_bundle(weights: Weights, bundle: str) -> dict[str, Any]:
    """A part: export the tiny model to ``bundle``."""
    manifest = export(shipped(weights), Path(bundle), "fp16" if weights == "fp16" else "int4", replace=True)
    return {"bundle_bytes": sum(entry.size for entry in manifest.files), "parameters": manifest.model.parameters}


def compare(bundle: str, backend: BackendUnderTest, device: str) -> dict[str, Any]:
    """A part: hold the loaded bundle against PyTorch on ``device``, stage by stage, with the project's own ``verify``.

    Raises:
        CheckFailedError: a stage is out of tolerance.
    """
    llava = load(Path(bundle), backend, None)
    content = [{"type": "image", "image": drawn_picture()}, {"type": "text", "text": DESCRIBE}]
    prompt = render_chat([{"role": "user", "content": content}], llava.manifest.chat)
    options = VerifyOptions(prompt, drawn_picture(), device=device)
    report = verify_loaded(open_checkpoint(checkpoint_dir()), llava, options, _say)
    result = report.to_dict()
    if report.first_failure is not None:
        raise CheckFailedError(f"{report.first_failure} is the first stage out of tolerance", result)
    return result


def _say(stage: StageResult) -> None:
    print(f"{'ok  ' if stage.ok else 'BAD '} {stage.name}: {stage.detail}", flush=True)
