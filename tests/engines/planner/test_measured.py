"""The estimates beside the peaks that were measured, all of those that are kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.names import HeadPrecision, Precision
from llava_deploy.engines.plain import from_plain
from llava_deploy.engines.planner.build import build_memory
from llava_deploy.engines.planner.export import export_memory
from llava_deploy.engines.planner.memory import Memory
from llava_deploy.engines.planner.model import PlannedModel, Sizes
from llava_deploy.engines.planner.parts import decoder_parts
from llava_deploy.engines.planner.run import run_memory
from llava_deploy.exporter.config import LlavaConfig
from llava_deploy.exporter.plan_source import planned_config
from llava_deploy.exporter.quantization.request import QuantizeOptions

DIRECTORY = Path(__file__).parents[3] / "benchmarks/results"
RESULTS = json.loads((DIRECTORY / "planner_peaks.json").read_text(encoding="utf-8"))
BUILDS_OF_7B = {
    path.name: json.loads(path.read_text(encoding="utf-8")) for path in DIRECTORY.glob("tensorrt_build_memory_*.json")
}
WITHIN = 0.15


def model(entry: dict[str, Any]) -> PlannedModel:
    config = from_plain(LlavaConfig, RESULTS["models"][entry["model"]], entry["model"])
    if "layers" in entry:
        config = replace(config, decoder=replace(config.decoder, num_hidden_layers=entry["layers"]))
    name, _, variant = entry["precision"].partition("-")
    precision: Precision = "int4-awq" if variant == "awq" else name
    head: HeadPrecision = "int8" if variant == "head" else "fp16"
    return planned_config(config, entry["model"], precision, QuantizeOptions(128, variant == "symmetric", head), {})


def estimate(entry: dict[str, Any]) -> Memory:
    planned = model(entry)
    stage, _, backend = entry["stage"].partition(" ")
    if stage == "export":
        return export_memory(planned)
    if stage == "build":
        return build_memory(planned, backend, Sizes.of_run(1, 1, 1), "in-place", decoder_parts(planned, 1))
    sizes = Sizes.of_run(entry["batch"], entry["length"], entry["pictures"])
    return run_memory(planned, backend, sizes, "in-place", (planned.decoder.layers,))


def title(entry: dict[str, Any]) -> str:
    sizes = "x".join(str(entry[key]) for key in ("batch", "length", "pictures", "targets") if key in entry)
    return f"{entry['stage']} {entry['model']} {entry['precision']} {sizes}".strip()


@pytest.mark.parametrize("entry", RESULTS["peaks"], ids=title)
def test_an_estimate_is_within_15_percent_of_the_peak(entry: dict[str, Any]) -> None:
    memory = estimate(entry)
    assert memory.anonymous == pytest.approx(entry["anonymous"], rel=WITHIN)
    assert memory.mapped == pytest.approx(entry["mapped"], rel=WITHIN)


@pytest.mark.parametrize("name", sorted(BUILDS_OF_7B))
def test_builds_of_7b_for_tensorrt_are_within_15_percent(name: str) -> None:
    measured = BUILDS_OF_7B[name]
    precision = measured["precision"] + ("-symmetric" if measured["form"] == "symmetric" else "")
    entry = {"model": "7b-4-layers", "layers": measured["layers"], "precision": precision}
    planned = model(entry)
    parts = tuple(measured["parts"])
    memory = build_memory(planned, "tensorrt-rtx", Sizes.of_run(measured["batch"], 1, 1), "in-place", parts)
    for kind, planned in (("RssAnon", memory.anonymous), ("RssFile", memory.mapped)):
        peak = max(part[kind]["bytes"] for part in measured["peaks"].values())
        assert planned == pytest.approx(peak, rel=WITHIN)


def test_several_models_were_measured_at_every_stage() -> None:
    models = Counter(stage for stage, _ in {(e["stage"], e["model"]) for e in RESULTS["peaks"]})
    built = {f"build {backend}" for backend in ("onnxruntime", "onnxruntime-cuda", "tensorrt-rtx")}
    assert set(models) == {"export", "run onnxruntime"} | built
    assert min(models.values()) >= 3  # of 3 M to 1 G parameters
