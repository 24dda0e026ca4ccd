"""The native library, built once for the tests where a compiler is there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import dispatch, native

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, target: str, *options: str) -> None:
    """Configure and build one target of CMakeLists.txt."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    subprocess.run(configure, check=True, capture_output=True)
    command = ["cmake", "--build", str(folder), "--target", target]
    subprocess.run(command, check=True, capture_output=True)


def needs_compiler() -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use the library that is there; build it aside when there is none."""
    if native.missing() is None:
        yield
        return
    needs_compiler()
    folder = tmp_path_factory.mktemp("native")
    build(folder, "focus_kernels", "-DCMAKE_BUILD_TYPE=Release")
    os.environ[native.LIBRARY_ENVIRONMENT] = str(folder / native.NAMES[0])
    native.forget()
    dispatch.forget()
    yield
    del os.environ[native.LIBRARY_ENVIRONMENT]
    native.forget()
    dispatch.forget()
