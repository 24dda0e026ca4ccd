"""The ahead-of-time report and what is cut off a kernel; neither needs Triton or a GPU."""

from __future__ import annotations

import pytest

from kernels import aot

PTX = """
.version 8.7
.target sm_90a
.visible .entry screen(
\t.param .u64 .ptr .global .align 1 screen_param_0,
\t.param .u32 screen_param_1,
\t.param .u64 .ptr .global .align 1 screen_param_2,
\t.param .u64 .ptr .global .align 1 screen_param_3
)
.reqntid 128
{
\tld.param.b64 \t%rd1, [screen_param_0];
\tld.param.b32 \t%r1, [screen_param_1];
\tret;
}
"""

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HGMMA.64x256x16.F32 R24, gdesc[UR4], R24 ;
        /*0020*/                   VIMNMX3 R2, R24, R25, R26 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
"""


def test_hidden_parameters_are_cut_off_and_the_rest_is_kept() -> None:
    cut = aot.trim(PTX, 2)
    assert "screen_param_1\n)" in cut and "screen_param_2" not in cut
    assert cut.replace(" ", "").count(".param.u") == 2
    assert cut.partition(".reqntid")[2] == PTX.partition(".reqntid")[2]
    assert aot.trim(cut, 2) == cut.replace("(\n\n\t", "(\n\t")


def test_a_hidden_parameter_that_is_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="reads hidden parameter 1"):
        aot.trim(PTX, 1)


def test_the_hot_loop_is_the_one_that_multiplies() -> None:
    body = aot.hot_loop(aot.parse(SASS))
    assert [code.split(".")[0] for code, _ in body] == ["HGMMA", "VIMNMX3", "BRA"]
    unrolled = aot.hot_loop(aot.parse(SASS.replace("@P0 BRA `(.L_x_0)", "NOP")))
    assert len(unrolled) == 6  # everything: no loop multiplies


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"spills": 3}, "3 spills"),
        ({"matrix": {"HGMMA": 4, "HMMA": 2}}, "products without wgmma: HMMA"),
        ({"per_element": 1.5, "most_per_element": 1.3}, "1.50 instructions per element"),
        ({"error": "out of registers"}, "failed: out of registers"),
    ],
)
def test_the_report_complains_about_what_costs_speed(
    changes: dict[str, object], complaint: str | None
) -> None:
    report = aot.Report(name="x", arch="sm_90", **changes)  # type: ignore[arg-type]
    assert report.complaints() == ([complaint] if complaint else [])


def test_an_older_architecture_gets_its_own_settings() -> None:
    constants, older = {"BM": 64, "C": 3}, {"BM": 32, "num_warps": 8}
    variant = aot.Variant(name="x", kernel="m:f", signature={}, constants=constants, older=older)
    assert variant.on("sm_90") is variant
    assert variant.on("sm_80").constants == {"BM": 32, "C": 3}
    assert variant.on("sm_80").num_warps == 8


def test_mma_of_an_older_architecture_is_no_complaint() -> None:
    assert aot.Report(name="x", arch="sm_80", matrix={"HMMA": 4}).complaints() == []


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(ValueError, match="no variants of \\['magic'\\]"):
        aot.variants(["magic"])
