"""An installed package brings the native library where it can be built, and works without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kernels.native import NAMES
from tests.kernels.native_build import ROOT, needs_compiler

ENTRIES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CMakeLists.txt", "kernels")


def wheel(folder: Path, **environment: str) -> Path:
    """Build the wheel of the operators alone."""
    source = folder / "source"
    source.mkdir()
    for entry in ENTRIES:
        if (ROOT / entry).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / entry, source / entry, ignore=ignore)
        else:
            shutil.copy(ROOT / entry, source / entry)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-build-isolation", "-w", str(folder), str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_holds_the_library_and_names_its_platform(tmp_path: Path) -> None:
    needs_compiler()
    made = wheel(tmp_path)
    assert "-py3-none-" in made.name and not made.name.endswith("-any.whl")
    with zipfile.ZipFile(made) as archive:
        held = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] in NAMES]
        assert len(held) == 1 and held[0].startswith("kernels/")
        archive.extractall(tmp_path / "site")
    code = (
        "import torch; from kernels import dispatch, native;"
        "from kernels.codebook_lookup.api import codebook_lookup\n"
        "with dispatch.force(codebook_lookup='native'):\n"
        "    print(native.__file__, codebook_lookup(torch.eye(3), torch.eye(3))[0].tolist())"
    )
    env = {k: v for k, v in os.environ.items() if k != "FOCUS_NATIVE_LIBRARY"}
    env["PYTHONPATH"] = str(tmp_path / "site")
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout.split(maxsplit=1)[0].startswith(str(tmp_path)), run.stderr[-2000:]
    assert run.stdout.strip().endswith("[0, 1, 2]")


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure(tmp_path: Path) -> None:
    made = wheel(tmp_path, FOCUS_NO_NATIVE="1")
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        assert not [n for n in archive.namelist() if n.rsplit("/", 1)[-1] in NAMES]
