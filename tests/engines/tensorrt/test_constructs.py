"""The table of releases: what follows from it, and that it says where it has it from."""

from __future__ import annotations

import pytest

from llava_deploy.engines.errors import OptionError
from llava_deploy.engines.tensorrt.constructs import (
    CONSTRUCTS,
    Release,
    cache_form,
    construct_of,
    explain,
    parse_release,
    release_of,
    takes,
)
from llava_deploy.engines.tensorrt.operators import OPERATORS_10_3
from llava_deploy.engines.tensorrt_module import TensorRtModule


@pytest.mark.parametrize(
    ("text", "form", "fused"),
    [
        ("10.3", "growing", False),
        ("10.3.0.26", "growing", False),
        (" 10.13 ", "growing", False),
        ("10.14.1", "growing", True),
        ("10.15.1.29", "in-place", True),
        ("11.0", "in-place", True),
        ("11.4.0.106", "in-place", True),
    ],
)
def test_a_release_has_a_form_of_cache(text: str, form: str, fused: bool) -> None:
    release = parse_release(text)
    assert (cache_form(release), takes(release, "Attention")) == (form, fused)


def test_releases_for_rtx_count_on_their_own() -> None:
    module = TensorRtModule("tensorrt-rtx", None, "1.7.1.116")
    assert cache_form(release_of(module)) == "in-place"
    assert release_of(module) == Release("tensorrt-rtx", 1, 7)
    assert str(release_of(module)) == "TensorRT for RTX 1.7"


@pytest.mark.parametrize(
    "text", ["", "ten", "10", "10.", "10.3-rc1", "v10.3", "9.3", "10.2.0", "8.6.1", "-10.3", "١٠.3"]
)
def test_no_release_or_too_old_a_one_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"want a release of TensorRT from 10\.3 on, as in 10\.3, got") as caught:
        parse_release(text)
    assert caught.value.option == "trt_version"


def test_no_release_takes_zero_points_or_an_inner_past() -> None:
    for name in ("int4 zero points", "Attention with a past", "Attention with nonpad_kv_seqlen"):
        assert not takes(Release("tensorrt", 99, 0), name)  # type: ignore[arg-type]
        assert not takes(Release("tensorrt-rtx", 99, 0), name)  # type: ignore[arg-type]


def test_every_row_says_its_source() -> None:
    words = ("changelog", "operators list", "parsed and built here", "refused here", "bindings")
    for name, row in CONSTRUCTS.items():
        assert any(word in row.source for word in words), name
        assert name in explain(name)
    assert "from TensorRT 10.14, for RTX 1.7 on" in explain("Attention")
    assert "no release" in explain("int4 zero points")


def test_operators_of_a_graph_have_rows() -> None:
    assert construct_of("TensorScatter") == "TensorScatter"
    assert construct_of("DequantizeLinear") == "int4 weights in blocks"
    assert construct_of("MatMul") is None


def test_the_list_of_10_3_has_none_of_the_later_operators() -> None:
    later = {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter", "STFT", "HannWindow"}
    assert not later & {*OPERATORS_10_3}
    assert OPERATORS_10_3["DequantizeLinear"] == ("int8", "float8", "int4")
    assert all(types for types in OPERATORS_10_3.values())
