"""Numbers for people, with their units."""

from __future__ import annotations

from llava_deploy.runtime.bench.report import Samples


def seconds(value: float) -> str:
    """A time: ``84 ms``, ``3.2 s``, ``4 min 12 s``."""
    if value < 1:
        return milliseconds(value)
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def milliseconds(value: float) -> str:
    """A short time in ms, of three digits: ``8.41 ms``, ``84.1 ms``, ``841 ms``."""
    return f"{three(1e3 * value)} ms"


def three(value: float) -> str:
    """A number of three digits, and all of those before the point: ``8.41``, ``84.1``, ``1,841``."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}"


def spread(samples: Samples, scale: float = 1.0) -> str:
    """The median, and in brackets the least and the most; of one sample, that."""
    middle, least, most = (three(scale * value) for value in (samples.median, samples.least, samples.most))
    return middle if len(samples.each) == 1 else f"{middle} ({least} – {most})"


def share(value: float) -> str:
    """Of 1, in per cent: ``98.3 %``."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of shares: ``0.4 points``."""
    return f"{abs(100 * value):.1f} points"


def signed_points(value: float) -> str:
    """The same with its sign: ``−0.4 points``; none has no sign."""
    amount = points(value)
    return amount if amount == points(0) else f"{'−' if value < 0 else '+'}{amount}"


def count(number: int, what: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
