"""The wheel: whole, importable from a clean environment, and at peace with its namesakes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "focus", "parallel", "engine", "bench")
# Modules of the package `kernels` on PyPI (0.17): ours must not be called like one of them.
THEIRS = {
    "_rust",
    "_system",
    "_versions",
    "_windows",
    "archs",
    "backends",
    "benchmark",
    "benchmarks",
    "cli",
    "compat",
    "deps",
    "hf_hub",
    "importer",
    "install",
    "layer",
    "load",
    "locking",
    "python_deps",
    "resolver",
    "status",
    "utils",
    "validate",
    "variants",
    "verify",
}
ENTRIES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", *FLOORS, "assets")


def call(arguments: Sequence[str | Path], cwd: Path) -> str:
    done = subprocess.run([str(a) for a in arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that the checkout stays clean."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for entry in ENTRIES:
        if (ROOT / entry).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / entry, source / entry, ignore=ignore)
        elif (ROOT / entry).exists():
            shutil.copy(ROOT / entry, source / entry)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", work, source], work)
    return next(work.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment that borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    call([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    call([*pip, "install", "--no-deps", "--no-index", wheel], folder)
    site = site_of(python)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def site_of(python: Path) -> Path:
    return next((python.parent.parent / "lib").glob("python*/site-packages"))


def test_wheel_holds_every_file_of_the_floors(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".json", ".html"} and "build" not in path.parts
    }
    assert len(wanted) > 40
    assert sorted(wanted - names) == []
    assert not [name for name in names if name.startswith(("tests/", "docs/", "setup"))]


def test_wheel_ships_the_weights(wheel: Path) -> None:
    shipped = {
        path.relative_to(ROOT / "assets").as_posix()
        for path in (ROOT / "assets").rglob("*")
        if path.is_file()
    }
    if not shipped:
        pytest.skip("this checkout holds no weights")
    prefix = "focus_assets/"
    names = {
        n.removeprefix(prefix) for n in zipfile.ZipFile(wheel).namelist() if n.startswith(prefix)
    }
    assert names == shipped


def test_wheel_has_no_init_in_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "kernels/catalog.py" in names
    assert not [n for n in names if n.startswith("kernels/") and n.endswith("__init__.py")]


def test_no_module_of_kernels_is_called_like_one_of_the_namesake() -> None:
    ours = {path.stem for path in (ROOT / "kernels").iterdir()}
    assert "catalog" in ours
    assert ours & THEIRS == set()


def test_wheel_names_its_requirements(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    assert "Name: focus-vl" in lines
    assert "Version: 2026.11.0" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Dist: megatron-core==0.16.1" in lines
    required = " ".join(line for line in lines if line.startswith("Requires-Dist:")).lower()
    assert "apex" not in required  # the package of that name on PyPI is another one
    assert "torchvision" not in required  # its wheels need CUDA libraries


def test_installed_floors_import_from_the_environment(python: Path, tmp_path: Path) -> None:
    script = (
        "import bench, engine.cli, focus.config, kernels.catalog, parallel\n"
        "for m in (bench, engine, focus.config, kernels.catalog, parallel): print(m.__file__)"
    )
    lines = call([python, "-I", "-c", script], tmp_path).split()
    assert len(lines) == 5
    assert all(line.startswith(str(site_of(python))) for line in lines), lines


def test_installed_command_answers(python: Path, tmp_path: Path) -> None:
    command = python.parent / "focus"
    assert call([command, "--version"], tmp_path) == "focus 2026.11.0\n"
    assert "segment" in call([command, "--help"], tmp_path)
    assert call([python, "-m", "engine", "--version"], tmp_path) == "focus 2026.11.0\n"


def test_kernels_lives_beside_the_package_of_that_name(python: Path, tmp_path: Path) -> None:
    namesake = site_of(python) / "kernels" / "__init__.py"
    namesake.write_text("WHOSE = 'theirs'\n")
    try:
        script = "import kernels.catalog; print(kernels.WHOSE, kernels.catalog.__name__)"
        assert call([python, "-I", "-c", script], tmp_path) == "theirs kernels.catalog\n"
    finally:
        namesake.unlink()
