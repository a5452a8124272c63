"""One result beside another: what both have measured, and what makes the comparison doubtful."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from llava_deploy.engines.errors import InputError
from llava_deploy.runtime.bench.report import Decode, Machine, Report, Samples

Better = Literal["less", "more"]
_BANDWIDTHS_APART = 1.2
_MEMORIES_APART = 1.02


@dataclass(frozen=True)
class Quantity:
    """One of the figures that two results have.

    Attributes:
        name: what was measured, and where.
        unit: of the samples, once they are multiplied by ``scale``.
        better: which way is the right one.
        before: of the other result.
        now: of this one.
    """

    name: str
    unit: str
    scale: float
    better: Better
    before: Samples
    now: Samples

    @property
    def ratio(self) -> float | None:
        """Of the medians, this one's to the other's; ``None`` where the other's is 0."""
        return self.now.median / self.before.median if self.before.median else None

    @property
    def verdict(self) -> str:
        """Whether this one is better, where no sample of one lies among those of the other."""
        if self.now.least <= self.before.most and self.before.least <= self.now.most:
            return "within the spread"
        return "better" if (self.now.median < self.before.median) == (self.better == "less") else "worse"


@dataclass(frozen=True)
class Beside:
    """Two results.

    Attributes:
        quantities: that both have.
        doubts: what is different about them beside the figures, a sentence each.
    """

    quantities: tuple[Quantity, ...]
    doubts: tuple[str, ...]


def compare(now: Report, before: Report) -> Beside:
    """Put two results beside each other.

    Raises:
        InputError: nothing was measured in both.
    """
    quantities = tuple(_quantities(now, before))
    if not quantities:
        raise InputError(
            "the results have no prompt, context or batch in common, so that nothing can be compared; measure with the "
            "other one's --prompt-tokens, --contexts, --batches and --new-tokens"
        )
    return Beside(quantities, tuple(_doubts(now, before)))


def _quantities(now: Report, before: Report) -> Iterator[Quantity]:
    one, other = now.first_token, before.first_token
    if (one.prompt_tokens, one.pictures) == (other.prompt_tokens, other.pictures):
        parts = {
            "time to first token": (other.total, one.total),
            "of it vision": (other.vision, one.vision),
            "of it prefill": (other.prefill, one.prefill),
        }
        for name, (earlier, later) in parts.items():
            if earlier.most or later.most:
                yield Quantity(f"{name}, {one.prompt_tokens} tokens", "ms", 1e3, "less", earlier, later)
    yield from _decode_quantities(now.decode, before.decode, lambda decode: f"behind {decode.context}")
    many, earlier_many = (tuple(each for each in report.batches if each.batch > 1) for report in (now, before))
    yield from _decode_quantities(many, earlier_many, lambda decode: f"{decode.batch} rows behind {decode.context}")


def _decode_quantities(
    now: tuple[Decode, ...], before: tuple[Decode, ...], name_of: Callable[[Decode], str]
) -> Iterator[Quantity]:
    known = {(decode.batch, decode.context, decode.new_tokens): decode for decode in before}
    for decode in now:
        other = known.get((decode.batch, decode.context, decode.new_tokens))
        if other is not None:
            rates = other.tokens_per_second, decode.tokens_per_second
            yield Quantity(f"decode, {name_of(decode)}", "tokens/s", 1.0, "more", *rates)


def _doubts(now: Report, before: Report) -> Iterator[str]:
    one, other = now.bundle, before.bundle
    if one.decoder != other.decoder or one.vision != other.vision or one.parameters != other.parameters:
        yield f"another model: {other.name} ({other.parameters:,} parameters), now {one.name} ({one.parameters:,})"
    elif one.precision != other.precision or one.quantization != other.quantization:
        yield f"another precision: {other.precision}, now {one.precision}" + (
            "" if one.precision != other.precision else " in another form"
        )
    elif one.digest != other.digest:
        yield f"another bundle of the same shape: {other.directory}, now {one.directory}"
    yield from _machine_doubts(now.machine, before.machine)
    if now.backend.name != before.backend.name:
        yield f"another backend: {before.backend.name}, now {now.backend.name}"
    elif now.backend.reason != before.backend.reason:
        yield f"the backend ran otherwise: {before.backend.reason}; now {now.backend.reason}"
    for what, earlier, later in (
        ("threads", before.backend.threads, now.backend.threads),
        ("slots of the cache", before.backend.max_len, now.backend.max_len),
        ("tokens of an answer", before.options.new_tokens, now.options.new_tokens),
    ):
        if earlier != later:
            yield f"{what}: {_said(earlier)}, now {_said(later)}"
    changed = [
        f"{name} {before.versions.get(name, 'none')}, now {now.versions.get(name, 'none')}"
        for name in sorted({*now.versions, *before.versions})
        if now.versions.get(name) != before.versions.get(name)
    ]
    if changed:
        yield f"other versions: {'; '.join(changed)}"
    rates = [report.bandwidth.bytes_per_second.median for report in (before, now)]
    if now.bandwidth.kind == before.bandwidth.kind and max(rates) > _BANDWIDTHS_APART * min(rates):
        earlier_rate, later_rate = (f"{rate / 1e9:.1f}" for rate in rates)
        yield f"memory was read at {earlier_rate} GB/s, now at {later_rate}: another machine, or a busier one"


def _machine_doubts(now: Machine, before: Machine) -> Iterator[str]:
    for what, earlier, later in (
        ("processor", before.cpu, now.cpu),
        ("GPU", before.gpu, now.gpu),
        ("number of processors", before.logical_cpus, now.logical_cpus),
        ("number of cores", before.physical_cores, now.physical_cores),
        ("system", before.system, now.system),
    ):
        if earlier != later:
            yield f"another {what}: {_said(earlier)}, now {_said(later)}"
    if before.memory is not None and now.memory is not None:
        small, large = sorted((before.memory, now.memory))
        if large > _MEMORIES_APART * small:
            yield f"another amount of memory: {before.memory / 1e9:.1f} GB, now {now.memory / 1e9:.1f} GB"


def _said(value: int | str | None) -> str:
    return "none given" if value is None else str(value)
