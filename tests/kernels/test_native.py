"""The C++ test program, under the address and the thread sanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.kernels.conftest import build, needs_compiler


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_native_library_is_clean_under_the_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    needs_compiler()
    build(tmp_path, "native_test", f"-DFOCUS_SANITIZE={sanitizer}", "-DCMAKE_BUILD_TYPE=Release")
    run = subprocess.run(
        [str(tmp_path / "native_test")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.strip() == "0 failures"
