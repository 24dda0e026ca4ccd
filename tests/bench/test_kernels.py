"""The kernel benchmark: a wrong answer has no speed, contenders take turns, rows tell all."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import kernels as bench
from bench import profile_kernels, report, timer
from bench.peers import lookup_chunked, peers
from kernels import catalog, dispatch
from kernels.kernel import Case, Implementation, Kernel, Request

ROOT = Path(__file__).resolve().parents[2]
LOOKUP = Case(name="small", sizes={"tokens": 20, "codes": 90, "dim": 8}, bench=True)
MASK = Case(
    name="small",
    sizes={
        "batch": 1,
        "heads": 2,
        "grid": (4, 4),
        "dim": 8,
        "masks": 1,
        "rows": 8,
        "columns": 8,
        "kind": "hard",
        "position": "rope",
        "sharp": 1.0,
    },
    bench=True,
)
GATED = Case(
    name="small",
    sizes={"batch": 1, "queries": 3, "tokens": 20, "channels": 8, "dim": 16, "heads": 2},
    bench=True,
)


def off_by_one(inputs: dict[str, Any]) -> Any:
    right = lookup_chunked(inputs)
    return lambda: (right() + 1) % inputs["codes"].shape[0]


def broken(inputs: dict[str, Any]) -> Any:
    def call() -> Any:
        raise RuntimeError("needs another machine")

    return call


def lookup_rows(monkeypatch: pytest.MonkeyPatch, **contenders: Any) -> dict[str, report.Row]:
    monkeypatch.setattr(bench, "peers", lambda operator, device: contenders)
    kernel = catalog.kernel("codebook_lookup")
    found = bench.run_case(kernel, LOOKUP, "forward", "cpu", 2, 1e9)
    return {row.implementation: row for row in found}


def test_a_wrong_answer_has_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = lookup_rows(monkeypatch, right=lookup_chunked, wrong=off_by_one)
    assert rows["right"].exact_enough and rows["right"].median_ms > 0.0
    assert not rows["wrong"].exact_enough and rows["wrong"].max_error == 1.0
    assert math.isnan(rows["wrong"].median_ms) and math.isnan(rows["wrong"].min_ms)
    listed = report.table(list(rows.values()))
    assert [line for line in listed.splitlines() if "wrong" in line and "no speed" in line]
    assert report.best_peer(list(rows.values()), rows["ours reference"]) is rows["right"]
    report.write_json(list(rows.values()), tmp_path / "rows.json")
    written = {r["implementation"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert written["wrong"]["median_ms"] is None
    wanted = (
        "op case direction implementation is_peer median_ms extra_mb max_error exact_enough "
        "floor_ms"
    )
    assert set(wanted.split()) <= set(written["right"])
    report.write_csv(list(rows.values()), tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        assert [r["implementation"] for r in csv.DictReader(file)] == list(rows)


def test_a_peer_that_cannot_run_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lookup_rows(monkeypatch, broken=broken, right=lookup_chunked)
    assert "broken" not in rows and "right" in rows
    assert "broken: cannot run: needs another machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "case"), [("mask_attention", MASK), ("gated_cross_attention", GATED)]
)
def test_peers_compute_what_the_operator_computes(name: str, case: Case) -> None:
    kernel = catalog.kernel(name)
    inputs = kernel.inputs(case, torch.float32, "cpu")
    truth = bench.oracle(kernel, inputs)
    found = peers(name, "cpu")
    assert found
    for label, peer in found.items():
        error, good = bench.accuracy(kernel, peer(inputs)(), truth, inputs)
        assert good and error < 1e-6, label
    expected = bench.with_backward(kernel, bench._ours(kernel, "reference"), inputs)()
    for label, peer in found.items():
        grads = bench.with_backward(kernel, peer, inputs)()
        for one, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=label)


def twice(x: Any) -> Any:
    request = Request(device=x.device.type, dtype=x.dtype, sizes=(("n", x.numel()),))
    return dispatch.load(dispatch.choose(DOUBLE, request).module).twice(x)


# `module` of an implementation may be any module: this one holds both.
DOUBLE = Kernel(
    name="double",
    function=twice,
    implementations=(
        Implementation(name="reference", module="doubles_reference", cost=lambda request: 1.0),
        Implementation(name="off", module="doubles_off", cost=lambda request: 2.0),
    ),
    inputs=lambda case, dtype, device: {"x": torch.arange(1.0, 1.0 + case.sizes["n"]).to(dtype)},
    differentiable=("x",),
    trained=("x",),
    cases=(Case(name="nine", sizes={"n": 9}, bench=True),),
)


def test_a_new_operator_is_timed_from_its_record_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, factor in (("doubles_reference", 2.0), ("doubles_off", 2.1)):
        module = ModuleType(name)
        module.__dict__["twice"] = lambda x, factor=factor: factor * x
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(catalog, "kernels", lambda: [DOUBLE])
    assert bench.main(["--repeats", "2"]) == 0
    dispatch.load.cache_clear()
    listed = capsys.readouterr().out
    assert "double  nine  forward  " in listed and "double  nine  forward+backward" in listed
    assert listed.count("* ours off") == listed.count("no speed: error 5.0e-02") == 2


def test_contenders_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = timer.measure(calls, device="cpu", repeats=3)
    assert order[-6:] == ["a", "b"] * 3
    assert {len(t.wall_ms) for t in timings.values()} == {3}


def test_extra_memory_is_the_peak_beyond_what_was_there() -> None:
    found = timer.extra_memory(lambda: torch.ones(48 << 18), "cpu")
    if math.isnan(found):
        pytest.skip("this system does not tell its high-water mark")
    assert 44.0 < found < 60.0


def test_the_profile_names_what_ran(tmp_path: Path) -> None:
    kernel = catalog.kernel("mask_attention")
    trace = tmp_path / "traces" / "one.json"
    found = profile_kernels.measure(kernel, MASK, "forward+backward", "cpu", trace)
    names = {part.name for part in found.parts}
    assert {"focus::mask_attention", "focus::mask_attention_backward"} <= names
    assert found.parts == sorted(found.parts, key=lambda p: -p.us) and found.total_us > 0.0
    assert "traceEvents" in json.loads(trace.read_text())
    assert "forward+backward" in profile_kernels.show(found)


def test_the_gpu_suite_parses_and_stays_under_nine_minutes() -> None:
    script = ROOT / "bench" / "gpu_suite.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    steps = [line.split() for line in script.read_text().splitlines() if line.startswith("step ")]
    assert [step[1] for step in steps] == [
        "tests", "aot", "bench", "profile", "tune", "bench_tuned"
    ]  # fmt: skip
    assert sum(int(step[2]) for step in steps) <= 525  # and a few seconds to look at the device


def test_the_gpu_suite_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    run = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_suite.sh"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2 and "no CUDA device" in run.stderr
