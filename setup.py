"""Packages and data files; everything that needs no code stands in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_namespace_packages, setup

FLOORS = ("kernels", "focus", "parallel", "engine", "bench")

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
        "engine": ["**/*.html", "**/*.css", "**/*.js"],
        "focus_assets": ["**/*"],
    },
    include_package_data=False,
)
