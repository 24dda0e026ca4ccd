"""Our operators as TensorRT plugins: numbers of the single-launch kernels, the real decorators."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
WHEEL = os.environ.get("FOCUS_TENSORRT_WHEEL", "")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(name: str, **environment: str) -> None:
    """Run a file of tests in a process of its own: bindings and interpreter change the process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, str(HERE / name)],
        env={**inherited, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


@needs_triton
def test_single_launch_kernels_equal_the_operators() -> None:
    run("single_launch.py", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(
    not Path(WHEEL).is_file(),
    reason="no wheel of TensorRT's bindings: pip download tensorrt-cu13-bindings --no-deps, and "
    "name the file in FOCUS_TENSORRT_WHEEL",
)
def test_the_real_decorators_take_the_plugins() -> None:
    run("real_bindings.py")
