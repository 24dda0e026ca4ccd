"""The native library and its test program, built once per content and kept in `build/tests/`.

A folder is named by the hash of everything that goes into it, so that a second run, a second worker
and the next test find it made. It appears by a rename: whoever loses the race throws his away.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "tests"
SOURCES = ("kernels/csrc", "tests/kernels/native_test.cpp", "CMakeLists.txt")


def needs_compiler() -> None:
    """Skip the test where the library cannot be built."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")


def fingerprint(target: str, options: tuple[str, ...]) -> str:
    """Return the hash of the sources, the compiler's version, the machine and the options."""
    version = subprocess.run(["c++", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + platform.machine().encode())
    digest.update("\0".join((target, *options)).encode())
    for source in SOURCES:
        path = ROOT / source
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def built(target: str, *options: str) -> Path:
    """Return a folder that holds one target of CMakeLists.txt, building it if nobody has yet."""
    needs_compiler()
    folder = KEPT / fingerprint(target, options)
    if folder.is_dir():
        return folder
    KEPT.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="making-", dir=KEPT))
    _run("cmake", "-S", str(ROOT), "-B", str(work), *options)
    _run("cmake", "--build", str(work), "--target", target)
    try:
        os.rename(work, folder)
    except OSError:  # another worker was faster
        shutil.rmtree(work)
    return folder


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
