"""A result as a picture."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from llava_deploy.engines.errors import LlavaDeployError, OptionError
from llava_deploy.runtime.bench.plot import require_plot, write_plot
from llava_deploy.runtime.bench.report import Report


def colours(path: Path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}


def test_a_png_has_its_own_ground_and_every_part(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    settings, loaded = dict(mpl.rcParams), "matplotlib.pyplot" in sys.modules
    write_plot(report, path)
    assert dict(mpl.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == loaded  # it would open windows
    with Image.open(path) as image:
        assert image.width > 2 * image.height > 1000
        corner = image.convert("RGBA").getpixel((0, 0))
    assert corner == (255, 255, 255, 255)
    assert {(0x0B, 0x62, 0xA4), (0xB3, 0x37, 0x2F)} <= colours(path)  # decode and its limit


def test_an_svg_is_the_same_each_time(report: Report, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.svg", "b.SVG")]
    for path in paths:
        write_plot(report, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert ElementTree.parse(paths[0]).getroot().tag.endswith("svg")


def test_without_several_rows_there_is_a_panel_less(report: Report, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.svg", tmp_path / "part.svg"
    write_plot(report, whole)
    write_plot(replace(report, batches=report.batches[:1]), part)
    panels = [path.read_text(encoding="utf-8").count('<g id="axes_') for path in (whole, part)]
    assert panels == [3, 2]


@pytest.mark.parametrize("name", ["a.pdf", "a", "png", "a.png.txt"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"plot: want a name that ends with \.png or \.svg, got"):
        require_plot(Path(name))


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"install it with: pip install 'llava-deploy\[bench\]'"):
        require_plot(Path("a.png"))


def test_a_place_that_cannot_be_written_to(report: Report, tmp_path: Path) -> None:
    with pytest.raises(LlavaDeployError, match="the plot cannot be written"):
        write_plot(report, tmp_path / "nowhere" / "a.png")
