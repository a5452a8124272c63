"""A small report, made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.manifest import FileEntry, ModelCard, QuantizationRecipe
from llava_deploy.engines.names import Precision
from llava_deploy.runtime.agreement import Agreement
from llava_deploy.runtime.bench.options import STANDARD
from llava_deploy.runtime.bench.report import (
    BackendCard,
    Bandwidth,
    BundleCard,
    Decode,
    FirstToken,
    Machine,
    Memory,
    Report,
    Samples,
)
from llava_deploy.runtime.evaluation import Score
from llava_deploy.runtime.report.record import (
    SCHEMA_VERSION,
    Accuracy,
    Asked,
    BuiltEngine,
    BundleRecord,
    Card,
    Energy,
    MemorySample,
    Phase,
    Record,
    Tested,
    TestedStage,
    Walk,
)
from llava_deploy.runtime.report.verdict import (
    ACCURACY_LOSS,
    check_accuracy,
    check_memory,
    check_run,
    check_tested,
    decide,
)

INT4 = QuantizationRecipe("rtn", 32, False, "fp16", 29, 4)
DIGEST = "ab" * 32


def of(*values: float) -> Samples:
    return Samples.of(values)


def speed(precision: Precision, factor: float) -> Report:
    def decode(batch: int, context: int) -> Decode:
        rate = of(*(factor * batch * turn / (1 + context / 1000) for turn in (90.0, 100.0, 120.0)))
        read = int(8e6 / factor) + batch * context * 2048
        limit = 2e9 * batch / read
        return Decode(batch, context, 64, rate, of(5e-5), read, limit, rate.median / limit)

    took = [2e-3, 1e-2, 1e-3, 2e-2, 5e-4]
    first = FirstToken(75, 1, *(of(*(part * turn for turn in (0.9, 1.0, 1.3))) for part in (*took, sum(took))))
    return Report(
        schema=1,
        date="2026-01-02T03:04:05+00:00",
        machine=Machine("Linux 6, x86_64", "Abacus 1", 4, 2, 16 << 30, 32 << 20, None),
        versions={"python": "3.11.7", "onnxruntime": "1.25.0"},
        bundle=BundleCard(precision, "llava", precision, 3_160_320, "tower", "decoder", None, DIGEST, 12_000_000),
        backend=BackendCard("onnxruntime", "ONNX Runtime 1.25.0 on the CPU", None, 1024, 0.2),
        options=STANDARD,
        bandwidth=Bandwidth("host read", 2, 1 << 29, of(2e10, 2.1e10)),
        first_token=first,
        decode=(decode(1, 64), decode(1, 512)),
        batches=(decode(1, 64), decode(2, 64), decode(4, 64)),
        memory=(Memory("loading", 50 << 20, 40 << 20, None),),
        remarks=("context of 2000 tokens left out: with 64 new ones at most 960 fit",),
    )


def walk() -> Walk:
    phases = (
        Phase("load", 0.0, 0.3),
        Phase("picture", 0.3, 0.4),
        Phase("prefill", 0.4, 0.41),
        Phase("decode", 0.41, 1.0),
    )
    samples = tuple(MemorySample(at / 100, 20_000_000 + 300_000 * at, 40_000_000, 0, None) for at in range(0, 100, 3))
    return Walk(75, 1, 257, 256, 8 << 30, None, phases, samples)


def card(precision: Precision, label: str) -> Card:
    return Card(
        label=label,
        directory=f"bundles/{label}",
        model=ModelCard("llava", "llava-hf", "CLIP, 4 layers", "2 layers", "llama, 4 layers", precision, 3_160_320),
        quantization=INT4 if precision == "int4" else None,
        vision=VisionShape("float32", 28, 28, 4, 8),
        decoder=DecoderShape("float32", 8, 1, 1, 4, 11, 32),
        digest=DIGEST,
        weight_bytes=12_000_000 if precision == "fp32" else 4_000_000,
        tools={"llava-deploy": "0.1.0", "torch": "2.6.0"},
        files=(FileEntry("decoder.onnx", 12_000, DIGEST), FileEntry("tokenizer.json", 3_000, DIGEST)),
        engines=(BuiltEngine("onnxruntime-1.25.0-cpu", 13_000_000),),
    )


def bundle(precision: Precision, factor: float, first: str | None) -> BundleRecord:
    stages = tuple(TestedStage(name, "passed", "off by 1e-06") for name in ("files", "pixels", "logits", "tokens"))
    tested = Tested("passed", "3 goldens replayed, every stage within its tolerance", stages)
    kinds = {"colour": Score(500, 490), "count": Score(500, 480)}
    near = None if first is None else Agreement(4000, 3990, 2e-4)
    accuracy = Accuracy(Score(1000, 970), kinds, 0 if first is None else 2, 0 if first is None else 2, near)
    energy = Energy("RAPL: package-0", 20.0, 50.0, 120, 0.5, 0.3) if precision == "fp32" else None
    one = card(precision, precision)
    checks = (
        check_run(None),
        check_tested(tested),
        check_accuracy(one, accuracy, first, ACCURACY_LOSS),
        check_memory(walk()),
    )
    return BundleRecord(
        card=one,
        verdict=decide(checks),
        failure=None,
        tested=tested,
        walk=walk(),
        energy=energy,
        energy_refusals=() if energy is not None else ("only root may read the counters",),
        speed=speed(precision, factor),
        accuracy=accuracy,
    )


def of_bundles(bundles: Sequence[BundleRecord]) -> Record:
    return Record(
        schema=SCHEMA_VERSION,
        title="llava",
        date="2026-01-02T03:04:05+00:00",
        quick=False,
        accuracy_loss=ACCURACY_LOSS,
        asked=Asked("drawn pictures", 1000, {"colour": 0.25, "count": 0.2}),
        seconds=83.0,
        bundles=tuple(bundles),
    )


@pytest.fixture(scope="session")
def record() -> Record:
    """Three bundles, all of them to be shipped."""
    return of_bundles([bundle("fp32", 1.0, None), bundle("fp16", 1.5, "fp32"), bundle("int4", 3.0, "fp32")])


@pytest.fixture(scope="session")
def failed(record: Record) -> Record:
    """Of three bundles the second failed its self-test and was not told apart from the first, the third died."""
    good, bad, dead = record.bundles
    tested = Tested("failed", "logits of one-picture is the first stage out of tolerance", bad.tested.stages)
    reason = "the process was killed while it was loaded: most likely there is too little memory for it"
    none = Tested("not shown", "the bundle has no goldens", ())
    bad = replace(bad, tested=tested, verdict=decide([check_run(None), check_tested(tested), check_memory(None)]))
    dead = replace(
        dead,
        tested=none,
        failure=reason,
        walk=None,
        energy=None,
        speed=None,
        accuracy=None,
        verdict=decide([check_run(reason), check_tested(none), check_memory(None)]),
    )
    return replace(record, bundles=(good, bad, dead), quick=True)
