"""The self-test passes on what was exported, in every form in which it runs on a CPU, and says what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.engine_manifest import ENGINES, source_digest
from llava_deploy.engines.errors import BackendError, BundleError, OptionError
from llava_deploy.engines.goldens import read_goldens
from llava_deploy.engines.manifest import Manifest, read_manifest
from llava_deploy.engines.names import Int8Part, Precision
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.engines.processor import has_int8_products
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.selftest.report import ORDER, SelftestReport

Copied = Callable[..., Path]
Tested = Callable[..., SelftestReport]

needs_products = pytest.mark.skipif(not has_int8_products(), reason="no exact products of 8-bit integers here")


def names(report: SelftestReport) -> list[str]:
    return list(dict.fromkeys(stage.result.name for stage in report.stages))


def test_a_pass_says_what_was_tested_and_with_what(recorded_bundle: Path, tested: Tested) -> None:
    report = tested(recorded_bundle)
    assert report.ok, report.sentence
    assert report.verdict == "pass"
    assert report.first_failure is None
    manifest = read_manifest(recorded_bundle)
    goldens = read_goldens(recorded_bundle, manifest)
    assert report.goldens == len(goldens.goldens)
    assert report.not_run == ()
    kinds = list(dict.fromkeys(stage.result.kind for stage in report.stages))
    assert kinds == list(ORDER)
    pictured = [golden.name for golden in goldens.goldens if golden.pictures]
    of_pixels = [stage.golden for stage in report.stages if stage.result.kind == "pixels"]
    assert of_pixels == pictured
    assert report.bundle is not None
    assert report.bundle.digest == source_digest(manifest)
    assert report.bundle.precision == "fp32"
    assert report.bundle.recorded_with == goldens.tools
    assert report.backend is not None
    assert report.backend.name == "onnxruntime"
    assert "engine onnxruntime-" in report.backend.reason
    for name in ("numpy", "tokenizers", "pillow", "onnxruntime", "llava-deploy"):
        assert report.versions[name] == version(name)
    plain: dict[str, Any] = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["ok"] is True
    assert plain["first_failure"] is None
    assert [stage["kind"] for stage in plain["stages"]] == [stage.result.kind for stage in report.stages]
    assert plain["machine"]["cpu"] == report.machine.cpu


def test_the_graphs_without_an_engine(recorded_bundle: Path, copied: Copied, tested: Tested) -> None:
    report = tested(copied(recorded_bundle, ENGINES))
    assert report.ok, report.sentence
    assert report.backend is not None
    assert "canonical graphs" in report.backend.reason


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_16_bits_and_4_with_an_engine_and_without(
    recorded_in: Callable[[Precision], Path], copied: Copied, tested: Tested, precision: Precision
) -> None:
    bundle = recorded_in(precision)
    for place in (bundle, copied(bundle, ENGINES)):
        report = tested(place)
        assert report.ok, report.sentence
        assert max(stage.result.error for stage in report.stages if stage.result.kind == "logits") > 1e-5
        # Of int4 ONNX Runtime rounds activations to 8 bits, so that the logits are looked at without that, too.
        assert ("logits, not rounded" in names(report)) == (precision == "int4")


@needs_products
@pytest.mark.parametrize(
    ("precision", "part", "added"),
    [("fp32", "vision", "image features, not rounded"), ("int4", "prefill", "logits, not rounded")],
)
def test_engines_in_8_bit_integers(
    recorded_bundle: Path,
    recorded_in: Callable[[Precision], Path],
    copied: Copied,
    tested: Tested,
    precision: Precision,
    part: Int8Part,
    added: str,
) -> None:
    bundle = copied(recorded_bundle if precision == "fp32" else recorded_in(precision), ENGINES)
    build_onnxruntime(bundle, int8=[part])
    report = tested(bundle)
    assert report.ok, report.sentence
    assert report.backend is not None
    assert f"int8: {part}" in report.backend.reason
    assert added in names(report)
    rounded, exact = ({s.result.tolerance for s in report.stages if s.result.name == n} for n in (added[:-13], added))
    assert min(rounded) > 2 * max(exact)


def test_a_template_that_tells_the_date_is_not_held_against_another_days(
    recorded_bundle: Path, copied: Copied, rewrite: Callable[..., None], tested: Tested
) -> None:
    def dated(manifest: Manifest) -> Manifest:
        template = "{{ strftime_now('%d %b %Y') }}" + str(manifest.chat.template)
        return replace(manifest, chat=replace(manifest.chat, template=template))

    bundle = copied(recorded_bundle, ENGINES)
    rewrite(bundle, dated)
    report = tested(bundle)
    assert report.ok, report.sentence
    details = [stage.result.detail for stage in report.stages if stage.result.kind == "prompt"]
    assert all("its text is not compared" in detail for detail in details)


def test_a_context_that_is_too_short_for_some_and_for_all(recorded_bundle: Path, tested: Tested) -> None:
    report = tested(recorded_bundle, Wanted(threads=1, max_len=60))
    assert report.ok
    assert report.goldens == 1
    assert sorted(each.what for each in report.not_run) == [
        "golden one-picture", "golden two-pictures", "tokens, in a batch"
    ]  # fmt: skip
    assert all(stage.golden in (None, "text-only") for stage in report.stages)
    report = tested(recorded_bundle, Wanted(threads=1, max_len=8))
    assert not report.ok
    assert report.first_failure is None
    assert report.goldens == 0
    assert "no golden could be replayed" in report.sentence
    assert "the cache has 8" in report.sentence


def test_what_cannot_be_tested_is_an_error(
    demo_bundle: Path, recorded_bundle: Path, tmp_path: Path, tested: Tested
) -> None:
    with pytest.raises(BundleError, match="want a bundle directory"):
        tested(tmp_path)
    with pytest.raises(BundleError, match=r"want goldens.*llava-deploy record CHECKPOINT"):
        tested(demo_bundle)
    with pytest.raises(BackendError, match="no engine of TensorRT"):
        tested(recorded_bundle, Wanted("tensorrt-rtx"))
    with pytest.raises(OptionError, match="only ONNX Runtime on the CPU has it"):
        tested(recorded_bundle, Wanted("tensorrt-rtx", threads=1))
