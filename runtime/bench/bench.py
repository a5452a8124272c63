"""The whole benchmark of one bundle."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from llava_deploy.engines.engine_manifest import source_digest, weights_size
from llava_deploy.engines.manifest import Manifest
from llava_deploy.engines.names import Backend
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.bench.bandwidth import Meter, device_meter, host_meter
from llava_deploy.runtime.bench.device import open_device, used_bytes
from llava_deploy.runtime.bench.machine import physical_cores, this_machine, versions
from llava_deploy.runtime.bench.measure import Bench, DecodeSample, FirstSample, Measured
from llava_deploy.runtime.bench.memory import peak_watch
from llava_deploy.runtime.bench.options import BenchOptions, Turns, fitting
from llava_deploy.runtime.bench.report import (
    SCHEMA_VERSION,
    BackendCard,
    Bandwidth,
    BundleCard,
    Decode,
    FirstToken,
    Machine,
    Report,
    Samples,
)
from llava_deploy.runtime.bench.sessions import Loaded, load

if TYPE_CHECKING:
    from llava_deploy.runtime.tensorrt.cuda import Device


class Bound(Protocol):
    """What the memory's bandwidth allows of a decode step."""

    @property
    def step_bytes(self) -> int:
        """That a step has to read."""

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""


BoundOf: TypeAlias = Callable[[Backend, int, int, float], Bound]
"""Of a backend, rows, slots of the cache that a row sees, and bytes a second. The planner has it."""


def run_benchmark(
    directory: Path,
    wanted: Wanted,
    options: BenchOptions,
    bound_of: BoundOf,
    on_turn: Callable[[int, int], None],
) -> Report:
    """Load a bundle and measure it.

    Args:
        directory: of the bundle.
        wanted: backend, slots of the cache, threads.
        options: what to measure.
        bound_of: what a bandwidth allows of decoding.
        on_turn: gets the number of turns that are over, those that warm up included, and of how many at most.

    Raises:
        OptionError: an option that the bundle cannot have, or too short a context to measure anything in.
        BundleError: no bundle, or a damaged one.
        BackendError: the backend cannot be had, or fails.
    """
    device = open_device(directory, wanted.backend)
    with peak_watch(None if device is None else partial(used_bytes, device)) as watch:
        watch.phase("loading")
        loaded = load(directory, wanted)
        turns = fitting(options, loaded.room)
        count = (1 + options.rounds) * (1 + len(turns.contexts) + sum(batch > 1 for batch in turns.batches))
        done = iter(range(1, count + 1))
        bench = Bench(loaded, turns, lambda: on_turn(next(done), count))
        unmeasured = bench.warm_up(watch)
    on_gpu = loaded.backend != "onnxruntime"
    machine = this_machine(device.name if on_gpu and device is not None else None)
    meter = _meter(loaded, device, wanted.threads, machine)
    measured = bench.run(options.rounds, meter.read)
    bandwidth = Bandwidth(meter.kind, meter.threads, meter.nbytes, Samples.of(measured.bandwidth))
    decode, batches = _decodes(loaded.backend, turns, measured, bound_of, bandwidth.bytes_per_second.median)
    manifest = loaded.llava.manifest
    return Report(
        schema=SCHEMA_VERSION,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        versions=versions(loaded.backend),
        bundle=_bundle(directory, manifest),
        backend=BackendCard(loaded.backend, loaded.llava.backend, wanted.threads, loaded.llava.max_len, loaded.seconds),
        options=options,
        bandwidth=bandwidth,
        first_token=_first_token(turns, measured.first),
        decode=decode,
        batches=batches,
        memory=watch.peaks if on_gpu else tuple(replace(peak, device=None) for peak in watch.peaks),
        remarks=(*turns.remarks, *unmeasured, *_cached(decode[0].step_bytes, machine, on_gpu=on_gpu)),
    )


def _meter(loaded: Loaded, device: Device | None, threads: int | None, machine: Machine) -> Meter:
    if loaded.backend == "onnxruntime":
        return host_meter(physical_cores() if threads is None else threads, machine)
    if device is None:  # ONNX Runtime does without what asks the GPU for its memory: why that cannot be had is raised
        from llava_deploy.runtime.tensorrt.cuda import Device

        device = Device()
    return device_meter(device)


def _bundle(directory: Path, manifest: Manifest) -> BundleCard:
    model = manifest.model
    return BundleCard(
        directory=str(directory),
        name=model.name,
        precision=model.precision,
        parameters=model.parameters,
        vision=model.vision,
        decoder=model.decoder,
        quantization=manifest.quantization,
        digest=source_digest(manifest),
        weight_bytes=weights_size(manifest),
    )


def _first_token(turns: Turns, samples: Sequence[FirstSample]) -> FirstToken:
    def of(name: str) -> Samples:
        return Samples.of([getattr(sample, name) for sample in samples])

    return FirstToken(
        prompt_tokens=samples[0].prompt_tokens,
        pictures=int(turns.has_picture),
        preprocess=of("preprocess"),
        vision=of("vision"),
        splice=of("splice"),
        prefill=of("prefill"),
        rest=of("rest"),
        total=of("total"),
    )


def _decodes(
    backend: Backend, turns: Turns, measured: Measured, bound_of: BoundOf, bandwidth: float
) -> tuple[tuple[Decode, ...], tuple[Decode, ...]]:
    """By context, and by batch."""

    def decode(batch: int, samples: Sequence[DecodeSample]) -> Decode:
        context, steps = samples[0].context, samples[0].steps
        bound = bound_of(backend, batch, context + steps // 2, bandwidth)
        rate = Samples.of([batch * sample.steps / sample.seconds for sample in samples])
        return Decode(
            batch=batch,
            context=context,
            new_tokens=steps + 1,
            tokens_per_second=rate,
            python_seconds=Samples.of([sample.python for sample in samples]),
            step_bytes=bound.step_bytes,
            limit=bound.tokens_per_second,
            share=rate.median / bound.tokens_per_second,
        )

    by_context = tuple(decode(1, samples) for samples in measured.decode.values())
    single = by_context[:1] if 1 in turns.batches else ()
    return by_context, (*single, *(decode(batch, samples) for batch, samples in measured.batches.items()))


def _cached(step_bytes: int, machine: Machine, *, on_gpu: bool) -> list[str]:
    cache = machine.last_level_cache
    if on_gpu or cache is None or step_bytes > cache:
        return []
    sizes = f"a step reads {step_bytes / 1e6:.1f} MB, and the processor's cache holds {cache / 1e6:.1f} MB"
    return [f"{sizes}: decoding may pass the limit, which is the memory's"]
