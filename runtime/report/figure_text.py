"""What figures show, in words: a title and a description for those who do not see them, and a caption for all."""

from __future__ import annotations

from collections.abc import Sequence

from llava_deploy.runtime.report.record import BundleRecord, Walk
from llava_deploy.runtime.report.timed import PARTS, Timed, middle_round
from llava_deploy.runtime.report.units import count, milliseconds, seconds, share, three
from llava_deploy.runtime.report.verdict import peak_bytes
from llava_deploy.runtime.terminal import size

Text = tuple[str, str, str]
"""Title, description and caption."""


def describe_first_token(timed: Sequence[Timed]) -> Text:
    """Of the parts of the first token."""

    def one_of(one: Timed) -> str:
        parts = middle_round(one.speed.first_token)
        listed = ", ".join(f"{PARTS[name]} {milliseconds(took)}" for name, took in parts.items())
        return f"{one.label}: {milliseconds(sum(parts.values()))}, of it {listed}."

    first = timed[0].speed.first_token
    shown = "a picture and a question" if first.pictures else "a question without a picture"
    caption = (
        f"From the call to the first token of {shown} never seen before, {first.prompt_tokens} tokens together, in the "
        "round whose total is the median. 'First token' is the runtime's own Python: inputs of the decoder, choosing "
        "the token."
    )
    return "Time to the first token, by its parts", " ".join(map(one_of, timed)), caption


def describe_contexts(timed: Sequence[Timed]) -> Text:
    """Of decoding behind contexts."""

    def one_of(one: Timed) -> str:
        rates = [f"{three(d.tokens_per_second.median)} behind {d.context:,}" for d in one.speed.decode]
        return f"{one.label}: {', '.join(rates)} tokens of context."

    caption = (
        "One question at a time. Bars go from the slowest to the fastest round; dotted, what the memory's measured "
        "bandwidth allows."
    )
    return "Tokens a second against the context's length", " ".join(map(one_of, timed)), caption


def describe_batches(timed: Sequence[Timed]) -> Text:
    """Of several rows at once."""

    def one_of(one: Timed) -> str:
        rates = [f"{three(d.tokens_per_second.median)} of {d.batch}" for d in one.speed.batches]
        return f"{one.label}: {', '.join(rates)} at once."

    context = timed[0].speed.batches[0].context if timed[0].speed.batches else timed[0].speed.decode[0].context
    caption = f"Tokens of all answers together, each behind {context:,} tokens; dotted, in proportion to their number."
    return "Tokens a second against questions at once", " ".join(map(one_of, timed)), caption


def describe_roof(timed: Sequence[Timed]) -> Text:
    """Of decoding against the memory's bandwidth."""

    def one_of(one: Timed) -> str:
        best = max(one.speed.decode, key=lambda decode: decode.share)
        return f"{one.label}: at best {share(best.share)} of the limit, where a step reads {size(best.step_bytes)}."

    caption = (
        "A decode step cannot be faster than the memory gives the bytes that it reads: the dashed line, with the "
        "spread of what was measured beside each bundle. Filled: one question, behind several contexts; hollow: "
        "several at once."
    )
    return "Decoding against the memory's bandwidth (roofline)", " ".join(map(one_of, timed)), caption


def describe_memory(walked: Sequence[tuple[BundleRecord, Walk]]) -> Text:
    """Of memory over time."""

    def one_of(record: BundleRecord, walk: Walk) -> str:
        phases = ", ".join(f"{phase.name} {seconds(phase.ended - phase.began)}" for phase in walk.phases)
        return f"{record.card.label}: {size(peak_bytes(walk))} at the peak; {phases}."

    walk = walked[0][1]
    shown = count(walk.pictures, "picture") if walk.pictures else "no picture"
    caption = (
        f"A process of its own loads the bundle, reads a prompt of {walk.prompt_tokens} tokens with {shown}, and "
        f"answers. The line is anonymous memory and mapped files together, the area anonymous memory alone; Python and "
        "its packages are in it."
    )
    description = " ".join(one_of(record, each) for record, each in walked)
    return "Memory over time", description, caption
