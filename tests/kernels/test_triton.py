"""Triton kernels: interpreted against fp64, and compiled without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import catalog

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.parametrize(
    "operator",
    [k.name for k in catalog.kernels() if any(i.name == "triton" for i in k.implementations)],
)
def test_interpreted_kernels_stay_within_the_error_budget(operator: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(HERE / "interpreted.py"), "-k", operator],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout


@needs_triton
def test_lookup_screen_compiles_to_few_instructions_and_no_spill() -> None:
    code = (
        "from kernels import aot; v = aot.variants(['codebook_lookup'])[0];"
        "r = aot.build(v, 'sm_90', None);"
        "print(r.error, r.spills, r.matrix.get('HGMMA', 0), r.per_element)"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    spills, matrix, per_element = run.stdout.split()[-3:]
    assert int(spills) == 0 and int(matrix) > 0 and float(per_element) <= 1.3


@pytest.mark.slow
@needs_triton
def test_every_variant_compiles_without_spills(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "kernels.aot", "--arch", "sm_90", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert run.returncode == 0, run.stdout
    written = sorted(tmp_path.rglob("*.json"))
    assert len(list(tmp_path.rglob("*.cubin"))) == len(written) > 20
    for path in written:
        listed = json.loads(path.read_text())["arguments"]
        entry = path.with_suffix(".ptx").read_text().partition(".entry")[2].partition(")")[0]
        assert entry.count(".param") == len(listed), path.name
