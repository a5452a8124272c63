"""Whether a bundle should be shipped: what has to be so, and what of it was shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llava_deploy.runtime.report.record import Accuracy, Card, Check, Tested, Verdict, Walk
from llava_deploy.runtime.report.units import points, share, signed_points
from llava_deploy.runtime.terminal import size

ACCURACY_LOSS = 0.01
"""Share of the answers that a bundle may lose against the first."""

_ONE_SIDED_95 = 1.645


def decide(checks: Sequence[Check]) -> Verdict:
    """One check that failed is enough against it; one that shows nothing is enough not to be for it."""
    states = {check.state for check in checks}
    if "failed" in states:
        return Verdict("do not ship", tuple(checks))
    return Verdict("not shown" if "not shown" in states else "ship", tuple(checks))


def check_run(failure: str | None) -> Check:
    """Whether it runs here at all."""
    if failure is not None:
        return Check("runs here", "failed", failure)
    return Check("runs here", "passed", "it loads, and answers a question about a picture")


def check_tested(tested: Tested) -> Check:
    """The self-test: whether it computes here what PyTorch computed where it was made."""
    return Check("self-test", tested.state, tested.sentence)


def check_accuracy(card: Card, accuracy: Accuracy | None, first: str | None, allowed: float) -> Check:
    """Whether it answers as the first one does.

    The loss is that of the questions which one of both answered right and the other wrong: since both got the same
    questions, those tell more than two percentages. Its bounds are those of Agresti and Min (2005) for a difference of
    paired proportions, one-sided, at 95 %.

    Args:
        card: of the bundle.
        accuracy: what it answered; ``None`` where it was not asked.
        first: the first bundle's label; ``None`` where this is the first.
        allowed: share of the answers that it may lose.
    """
    if accuracy is None:
        return Check("accuracy", "not shown", "it was asked nothing")
    total = f"{accuracy.total.right:,} of {accuracy.total.asked:,} answers right, {share(accuracy.total.accuracy)}"
    if first is None:
        if card.quantization is None:
            return Check("accuracy", "passed", f"{total}; what others are held against, as nothing is quantised in it")
        return Check("accuracy", "not shown", f"{total}; name the unquantised bundle first to see what was lost")
    loss, least, most = loss_bounds(accuracy)
    against = f"{total}, {signed_points(-loss)} against {first}"
    if loss > allowed and least > 0:
        return Check("accuracy", "failed", f"{against}: more than the {points(allowed)} that it may lose")
    if most > allowed:
        few = f"{accuracy.total.asked:,} questions do not show that it loses no more than {points(allowed)}"
        return Check("accuracy", "not shown", f"{against}, but {few}: it may be {points(most)}; ask more")
    bound = f"it loses no more than {points(max(0.0, most))} (95 % sure), and may lose {points(allowed)}"
    return Check("accuracy", "passed", f"{against}; {bound}")


def loss_bounds(accuracy: Accuracy) -> tuple[float, float, float]:
    """The share of answers that was lost, and the least and the most that it may be in truth, at 95 % each."""
    asked, lost, gained = accuracy.total.asked, accuracy.lost, accuracy.gained
    if not asked:
        return 0.0, -1.0, 1.0
    count, more, less = asked + 2, lost + 0.5, gained + 0.5
    mean = (more - less) / count
    spread = _ONE_SIDED_95 * math.sqrt(more + less - (more - less) ** 2 / count) / count
    return (lost - gained) / asked, mean - spread, mean + spread


def check_memory(walk: Walk | None) -> Check:
    """Whether it had room: in the host's memory, without swapping, and in the GPU's."""
    name = "memory"
    if walk is None:
        return Check(name, "not shown", "it was not loaded")
    if not walk.samples or walk.available is None:
        return Check(name, "not shown", "this system does not tell what a process takes, or what it could have")
    first = walk.samples[0]
    took = peak_bytes(walk) - first.anonymous - first.mapped
    said = f"{size(max(0, took))} at the peak, of {size(walk.available)} that were free"
    swapped = max(sample.swapped for sample in walk.samples) - first.swapped
    if swapped > 0:
        return Check(name, "failed", f"{said}, and {size(swapped)} of it went to the disk (swap)")
    if took > walk.available:
        return Check(name, "failed", said)
    device = device_peak(walk)
    if device is not None and walk.device_available is not None:
        said += f"; {size(device)} of {size(walk.device_available)} that were free on the GPU"
        if device > walk.device_available:
            return Check(name, "failed", said)
    return Check(name, "passed", said)


def peak_bytes(walk: Walk) -> int:
    """Of anonymous memory and mapped files together; 0 where nothing was told."""
    return max((sample.anonymous + sample.mapped for sample in walk.samples), default=0)


def device_peak(walk: Walk) -> int | None:
    """Of the GPU's memory; ``None`` where there is none."""
    return max((sample.device for sample in walk.samples if sample.device is not None), default=None)
