"""The C++ test program, under the address and the thread sanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.kernels import native_build
from tests.kernels.native_build import built, fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_native_library_is_clean_under_the_sanitizer(sanitizer: str) -> None:
    folder = built("native_test", f"-DFOCUS_SANITIZE={sanitizer}", "-DCMAKE_BUILD_TYPE=Release")
    run = subprocess.run([str(folder / "native_test")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.strip() == "0 failures"


def test_a_build_is_named_by_what_goes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_build.needs_compiler()
    (tmp_path / "a.cpp").write_text("int a;")
    monkeypatch.setattr(native_build, "ROOT", tmp_path)
    monkeypatch.setattr(native_build, "SOURCES", ("a.cpp",))
    before = fingerprint("x", ())
    assert fingerprint("x", ()) == before
    assert fingerprint("x", ("-DA=1",)) != before
    (tmp_path / "a.cpp").write_text("int b;")
    assert fingerprint("x", ()) != before
