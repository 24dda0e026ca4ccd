"""Packages, data files and the native library; everything else stands in pyproject.toml.

The library of `kernels/` is built where CMake and a C++ compiler are there. Without them the
package installs as well: the operators run in PyTorch, and whoever forces the library is told how
to build it. FOCUS_NO_NATIVE=1 leaves it out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FLOORS = ("kernels", "focus", "parallel", "engine", "bench")
ROOT = Path(__file__).resolve().parent


def can_build() -> bool:
    """Return whether sources, CMake and a compiler are there, and nobody asked to leave it out."""
    compiler = os.environ.get("CXX", "c++")
    return (
        (ROOT / "CMakeLists.txt").is_file()
        and shutil.which("cmake") is not None
        and shutil.which(compiler) is not None
        and os.environ.get("FOCUS_NO_NATIVE", "0") != "1"
    )


class BuildWithNative(build_py):
    """Copy the packages, then put the native library beside `kernels/native.py`.

    An editable install builds it in `build/`, where `kernels/native.py` looks as well.
    """

    def run(self) -> None:
        super().run()
        if not can_build():
            self.announce("kernels: no CMake or compiler, the native library is left out", 2)
            return
        folder = ROOT / "build" if self.editable_mode else Path(self.build_lib).parent / "native"
        try:
            for step in (
                ["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"],
                ["cmake", "--build", folder, "--target", "focus_kernels"],
            ):
                subprocess.run([str(part) for part in step], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.announce(f"kernels: the native library is left out: {error}", 3)
            return
        if not self.editable_mode:
            for library in folder.glob("*focus_kernels.*"):
                if library.suffix in {".so", ".dylib", ".dll"}:
                    self.copy_file(str(library), str(Path(self.build_lib) / "kernels"))


class WheelOfPlatform(bdist_wheel):
    """Any Python 3, but one platform where the wheel holds the library."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not can_build()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


# `kernels` is a PEP 420 namespace, and folders of C++ and JSON below a floor count as packages too.
packages = find_namespace_packages(
    include=[f"{floor}{tail}" for floor in FLOORS for tail in ("", ".*")]
)
package_dir = {}

# The shipped weights lie in assets/; a wheel brings them as a package of data files.
if Path("assets").is_dir():
    packages.append("focus_assets")
    package_dir["focus_assets"] = "assets"

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "": ["*.json", "*.md", "*.typed"],
        "kernels": ["csrc/**/*", "**/*.cpp", "**/*.h", "**/*.cu"],
        "engine": ["**/*.html", "**/*.css", "**/*.js", "export/csrc/*"],
        "focus_assets": ["**/*"],
    },
    include_package_data=False,
    cmdclass={"build_py": BuildWithNative, "bdist_wheel": WheelOfPlatform},
)
