"""What the bundles are, and where and with what they were measured, as tables and sentences."""

from __future__ import annotations

from collections.abc import Callable

from llava_deploy.runtime.report.record import BundleRecord, Card, Record
from llava_deploy.runtime.report.tables import Table
from llava_deploy.runtime.report.units import count, seconds, three
from llava_deploy.runtime.terminal import size
from llava_deploy.runtime.terminal_eval import quantization_words

_BANDWIDTHS_APART = 1.2
"""Measured ones that are further apart tell of a machine that was busier at one time than at the other."""


def model_table(record: Record) -> Table:
    """What the bundles are, a column each."""
    rows: list[tuple[str, Callable[[Card], str]]] = [
        ("model", lambda card: f"{card.model.name} ({card.model.layout} layout)"),
        ("parameters", lambda card: f"{card.model.parameters:,}"),
        ("precision", lambda card: ", ".join([card.model.precision, *quantization_words(card.quantization)])),
        ("vision tower", lambda card: card.model.vision),
        ("picture", _picture),
        ("projector", lambda card: card.model.projector),
        ("decoder", lambda card: card.model.decoder),
        ("layers, width, vocabulary", _decoder),
        ("context", lambda card: count(card.decoder.max_positions, "token")),
        ("graphs and weights", lambda card: size(card.weight_bytes)),
        ("all files", lambda card: f"{size(sum(entry.size for entry in card.files))} in {len(card.files)}"),
        ("engines", _engines),
        ("made with", lambda card: ", ".join(f"{name} {version}" for name, version in card.tools.items())),
        ("digest of graphs and weights", lambda card: card.digest[:16]),
        ("directory", lambda card: card.directory),
    ]
    cards = [one.card for one in record.bundles]
    cells = tuple((name, *(cell(card) for card in cards)) for name, cell in rows)
    return Table("The bundles", ("", *(card.label for card in cards)), cells)


def _picture(card: Card) -> str:
    sides = f"{card.vision.image_width} × {card.vision.image_height} pixels"
    return f"{sides}, {count(card.vision.patches, 'token')}"


def _decoder(card: Card) -> str:
    shape = card.decoder
    return f"{shape.layers}, {shape.hidden_size:,}, {shape.vocab_size:,}"


def _engines(card: Card) -> str:
    return "; ".join(f"{engine.name}, {size(engine.size)}" for engine in card.engines) or "none built"


def files_table(one: BundleRecord) -> Table:
    """A bundle's files, as its manifest lists them."""
    rows = tuple((entry.path, size(entry.size), entry.sha256) for entry in one.card.files)
    return Table(f"Files of {one.card.label}", ("file", "size", "sha256"), rows)


def stages_table(one: BundleRecord) -> Table:
    """The stages of a bundle's self-test."""
    rows = tuple((stage.name, stage.state, stage.detail) for stage in one.tested.stages)
    return Table(f"Self-test of {one.card.label}", ("stage", "found", "detail"), rows)


def machine_table(record: Record) -> Table | None:
    """Where the bundles were timed; ``None`` where none was."""
    speeds = [(one.card.label, one.speed) for one in record.bundles if one.speed is not None]
    if not speeds:
        return None
    machine = speeds[0][1].machine
    cores = f"{count(machine.physical_cores, 'core')}, {count(machine.logical_cpus, 'processor')} for the process"
    rows = [
        *([] if machine.gpu is None else [("GPU", machine.gpu)]),
        ("processor", f"{machine.cpu}; {cores}"),
        ("memory", "not told" if machine.memory is None else size(machine.memory)),
        ("cache", "not told" if machine.last_level_cache is None else size(machine.last_level_cache)),
        ("system", machine.system),
    ]
    for label, speed in speeds:
        kind = f"read by {count(speed.bandwidth.threads, 'thread')}"
        how = kind if speed.bandwidth.kind == "host read" else "copied on the GPU"
        rate = three(speed.bandwidth.bytes_per_second.median / 1e9)
        rows.append((f"{label} ran on", f"{speed.backend.reason}; {speed.backend.max_len:,} slots of cache"))
        rows.append((f"memory's bandwidth beside {label}", f"{rate} GB/s, {how}"))
    rows += [(name, version) for name, version in speeds[0][1].versions.items()]
    return Table("Where and with what", ("", "found"), tuple(rows))


def remarks(record: Record) -> list[str]:
    """What has to be known beside the numbers, a sentence each."""
    found = []
    if record.quick:
        found.append(
            "A look (--quick): one round, shorter answers, fewer contexts; measure without it before you decide."
        )
    found.append(f"Measured on {record.date} in {seconds(record.seconds)}, one bundle after the other.")
    rates = [one.speed.bandwidth.bytes_per_second.median for one in record.bundles if one.speed is not None]
    if rates and max(rates) > _BANDWIDTHS_APART * min(rates):
        low, high = (three(rate / 1e9) for rate in (min(rates), max(rates)))
        found.append(
            f"The memory was read at {low} to {high} GB/s beside the bundles: the machine was busier at one time than "
            "at another, and the bundles' speeds are that uncertain against each other."
        )
    for one in record.bundles:
        found += [f"{one.card.label}: {remark}." for remark in (one.speed.remarks if one.speed is not None else ())]
    return found
