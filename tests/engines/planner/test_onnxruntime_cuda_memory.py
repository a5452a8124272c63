"""Memory of ONNX Runtime on CUDA, from the shapes of LLaVA-1.5-7B, and what an engine really takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.names import FEATURES_KEPT, Precision
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.engines.planner import onnxruntime_cuda_memory as planner
from llava_deploy.engines.planner.boards import find_board
from llava_deploy.engines.planner.memory import Memory, PartName, Place
from llava_deploy.engines.planner.model import GraphWeights, PlannedModel, Sizes, planned_bundle
from llava_deploy.engines.planner.onnx_header import TensorSize
from llava_deploy.engines.planner.onnxruntime_cuda_memory import (
    cuda_build_memory,
    cuda_decode_bytes,
    cuda_engine_bytes,
    cuda_run_memory,
)
from llava_deploy.engines.planner.plan import plan, resolve_sizes
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import QuantizeOptions, round_to_nearest
from llava_deploy.runtime.onnxruntime_cuda import OnnxRuntimeCudaVision

SevenB = Callable[..., PlannedModel]
GB = 10**9
ATTENTION, MLP, HEAD = 4 * 4096**2, 3 * 4096 * 11008, 4096 * 32064
LAYERS = 32 * (ATTENTION + MLP)
GATE_UP = 2 * 4096 * 11008
ONE = Sizes.of_run(1, 4096, 1)


def part(memory: Memory, name: PartName, place: Place) -> int:
    return sum(each.nbytes for each in memory.parts if (each.name, each.place) == (name, place))


def test_weights_on_the_gpu_are_those_of_the_graphs(seven_b: SevenB) -> None:
    for precision, each in (("fp16", 2), ("int4", 1 / 2 + 2.5 / 128)):
        model = seven_b(precision)
        expected = each * LAYERS + 2 * HEAD + model.vision_weights.nbytes
        assert part(cuda_run_memory(model, ONE), "weights", "device") == pytest.approx(expected, rel=1e-3)
    tied = dataclasses.replace(seven_b("fp16"), is_tied=True)
    more = part(cuda_run_memory(tied, ONE), "weights", "device")
    assert more - part(cuda_run_memory(seven_b("fp16"), ONE), "weights", "device") == tied.embedding_bytes


@pytest.mark.parametrize(("rows", "slots"), [(1, 2047), (1, 2048), (3, 2000)])
def test_the_cache_is_float16_with_all_slots_and_the_logits(seven_b: SevenB, rows: int, slots: int) -> None:
    for precision in ("fp16", "int4"):
        memory = cuda_run_memory(seven_b(precision), Sizes.of_run(rows, slots, 1))
        assert part(memory, "KV cache", "device") == rows * slots * 2 * 32 * 4096 * 2 + 4 * (rows + 1) * 32064


def test_rows_are_read_one_by_one_in_pieces(seven_b: SevenB) -> None:
    model = seven_b("fp16")
    one, four = (part(cuda_run_memory(model, Sizes.of_run(n, 4096, 1)), "activations", "device") for n in (1, 4))
    assert one == four
    pieces = [part(cuda_run_memory(model, Sizes.of_run(1, n, 1)), "activations", "device") for n in (512, 1024, 4096)]
    assert pieces[0] < pieces[1] == pieces[2]


def test_pictures_are_encoded_as_many_at_once_as_the_runtime_does(seven_b: SevenB) -> None:
    most = OnnxRuntimeCudaVision.max_images
    counts = (1, most, most + 1)
    one, all_at_once, more = (
        part(cuda_run_memory(seven_b("int4"), Sizes.of_run(1, 4096, n)), "activations", "device") for n in counts
    )
    assert one < all_at_once == more


def test_a_long_prompt_is_multiplied_with_the_largest_product_as_floats(seven_b: SevenB) -> None:
    """Gate and up, which are one product of quantised layers."""
    assert part(cuda_run_memory(seven_b("int4"), ONE), "workspace", "device") == 2 * GATE_UP
    assert part(cuda_run_memory(seven_b("fp16"), ONE), "workspace", "device") == 0


def test_loading_has_quantised_matrices_in_the_hosts_memory(seven_b: SevenB) -> None:
    """Turned to what kernels want; floats are read as they lie, so the host's peak of fp16 is a run's."""
    int4, fp16 = (cuda_run_memory(seven_b(precision), ONE) for precision in ("int4", "fp16"))
    quantized = (1 / 2 + 2.5 / 128) * LAYERS
    assert quantized < part(int4, "weights", "host") < 1.1 * quantized
    assert part(int4, "image features", "host") == 0
    assert part(fp16, "weights", "host") == 0
    assert part(fp16, "image features", "host") == FEATURES_KEPT * 576 * 4096 * 2


def test_a_weight_and_the_libraries_are_not_mapped_at_once(seven_b: SevenB) -> None:
    model = seven_b("int4")
    libraries = cuda_run_memory(model, ONE).mapped
    assert libraries > 2 * HEAD
    wide = GraphWeights((*model.decoder_weights.tensors, TensorSize("head", (4096, 128256), 16)))
    assert cuda_run_memory(dataclasses.replace(model, decoder_weights=wide), ONE).mapped == 2 * 4096 * 128256


@pytest.mark.parametrize(("precision", "fits", "rows"), [("int4", True, 2), ("fp16", False, 0)])
def test_a_card_of_8_gb_runs_7b_in_int4(seven_b: SevenB, precision: Precision, fits: bool, rows: int) -> None:
    """Of one row an H100 had 5.9 GB, over an empty context; each further row has 1.07 GB of cache."""
    model, board = seven_b(precision), find_board("rtx-4060")
    stages = plan(model, board, resolve_sizes(model, 1, 2048, 1), None).stages
    run = next(stage for stage in stages if (stage.stage, stage.backend) == ("run", "onnxruntime-cuda"))
    assert run.memory is not None
    assert (run.memory.device < 8 * GB) == fits
    assert run.fits is fits
    assert run.largest_batch == rows


def test_what_is_beside_the_shapes_is_in_one_constant(seven_b: SevenB, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cuda_run_memory(seven_b("int4"), ONE).device
    monkeypatch.setattr(planner, "PROVIDER", planner.PROVIDER + 123)
    assert cuda_run_memory(seven_b("int4"), ONE).device == before + 123


def test_a_step_reads_int4_as_int4_and_the_visible_cache(seven_b: SevenB) -> None:
    fp16, int4 = (cuda_decode_bytes(seven_b(precision), 1, 0) for precision in ("fp16", "int4"))
    assert fp16 == pytest.approx(2 * (LAYERS + HEAD), rel=1e-3)
    assert int4 == pytest.approx((1 / 2 + 2.5 / 128) * LAYERS + 2 * HEAD, rel=1e-3)
    assert cuda_decode_bytes(seven_b("int4"), 4, 1000) - int4 == 4 * 1000 * 2 * 32 * 4096 * 2


def test_a_build_holds_one_product_that_is_put_together(seven_b: SevenB) -> None:
    int4, fp16 = cuda_build_memory(seven_b("int4")), cuda_build_memory(seven_b("fp16"))
    assert (int4.device, fp16.device) == (0, 0)
    assert part(int4, "weights", "host") == 2 * GATE_UP // 2
    assert part(int4, "weights", "mapped") == 2 * HEAD  # the largest that is copied
    assert part(fp16, "weights", "host") == part(fp16, "weights", "mapped") == 0


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_an_engine_on_the_disk_is_what_was_planned(demo_checkpoint: Path, tmp_path: Path, precision: Precision) -> None:
    checkpoint, bundle = open_checkpoint(demo_checkpoint), tmp_path / "bundle"
    options = QuantizeOptions(group_size=64, symmetric=False, lm_head="fp16")
    export(checkpoint if precision == "fp16" else round_to_nearest(checkpoint, options), bundle, precision)
    engine = build_onnxruntime_cuda(bundle)
    model = planned_bundle(bundle, read_manifest(bundle))
    own = sum(path.stat().st_size for path in engine.glob("*.data") if path.stat().st_nlink == 1)
    padding = 4096 * len(model.decoder_weights.tensors) if own else 0
    assert cuda_engine_bytes(model) <= own <= cuda_engine_bytes(model) + padding
    assert (own == 0) == (precision == "fp16")
    assert (engine / "vision.onnx.data").samefile(bundle / "vision.onnx.data")
