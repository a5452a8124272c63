"""Colours that can be read, light and dark, and told apart by people who see fewer of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llava_deploy.runtime.report.palette import BAD, COLOURS, FAINT, GOOD, GROUND, INK, OPEN, PANEL, SERIES, Colour

GROUNDS = ("light", "dark")
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SEEN = {
    "all": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """By WCAG 2."""
    dark, light = sorted(float(linear(colour) @ TO_XYZ[1]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_contrast_is_what_it_is_known_to_be() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("colour", SERIES, ids=lambda colour: colour.name)
def test_lines_and_bars_stand_out(colour: Colour, ground: str) -> None:
    assert contrast(getattr(colour, ground), getattr(GROUND, ground)) >= 3


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("colour", [INK, FAINT, GOOD, BAD, OPEN], ids=lambda colour: colour.name)
def test_text_can_be_read(colour: Colour, ground: str) -> None:
    for under in (GROUND, PANEL):
        assert contrast(getattr(colour, ground), getattr(under, ground)) >= 4.5


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("sight", SEEN)
def test_series_are_told_apart(sight: str, ground: str) -> None:
    for one, other in itertools.combinations(SERIES, 2):
        seen = [lab(SEEN[sight] @ linear(getattr(colour, ground))) for colour in (one, other)]
        assert np.linalg.norm(seen[0] - seen[1]) >= 15, (one.name, other.name)


def test_names_and_stand_ins_are_one_of_a_kind() -> None:
    for values in ([colour.name for colour in COLOURS], [colour.stand_in for colour in COLOURS]):
        assert len({*values}) == len(values)
