"""The import law of the house: a floor imports only the floors below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each floor may import of the house, and what it must never import of the world.
MAY: dict[str, frozenset[str]] = {
    "kernels": frozenset({"kernels"}),
    "focus": frozenset({"focus", "kernels"}),
    "parallel": frozenset({"parallel", "focus", "kernels"}),
    "engine": frozenset({"engine", "parallel", "focus", "kernels"}),
    "bench": frozenset({"bench", "engine", "parallel", "focus", "kernels"}),
}
NEVER: dict[str, tuple[str, ...]] = {
    "kernels": ("torch.distributed", "megatron", "transformers", "diffusers", "nvidia.dali"),
    "focus": ("torch.distributed", "megatron", "nvidia.dali", "onnx", "onnxruntime", "tensorrt"),
    "parallel": ("nvidia.dali",),
    "engine": (),
    "bench": (),
}
# A server needs no trainer, no data set and no Megatron.
SEALED = ("engine/serve", "engine/export")
SEALED_NEVER = ("engine.train", "engine.data", "engine.stages", "engine.runs", "parallel")
# Files of an operator that meet in its api only.
IMPLEMENTATIONS = frozenset({"reference", "native", "triton"})


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that a file imports, inside functions and TYPE_CHECKING too."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


DYNAMIC = frozenset({"importlib.import_module", "import_module", "__import__"})


def is_under(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def violations(path: str, source: str) -> list[str]:
    """The lines of one file that break the law; `path` is relative to the root."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    floor = parts[0]
    found = []
    for line, name in imports(source, module, is_package):
        top = name.partition(".")[0]
        reason = ""
        if top in MAY and top not in MAY[floor]:
            reason = f"{floor} may not import {top}"
        elif top == "tests" or is_under(name, *NEVER[floor]):
            reason = f"{floor} never imports {name}"
        elif path.startswith(SEALED) and is_under(name, *SEALED_NEVER):
            reason = f"{'/'.join(parts[:2])} never imports {name}"
        elif top == "kernels":
            reason = kernel_violation(parts, name)
        if reason:
            found.append(f"{path}:{line}: {reason}")
    return found


def kernel_violation(importer: tuple[str, ...], name: str) -> str:
    """Operators are islands; the rest of the house sees their `api` only."""
    _, operator, file, *_ = [*name.split("."), "", ""]
    if not is_operator(operator):
        return ""
    if importer[0] != "kernels":
        return "" if file == "api" else f"only the public face of kernels, not {name}"
    if len(importer) > 2 and operator != importer[1]:
        return f"the operator {importer[1]} may not import {name}"
    if len(importer) > 2 and importer[2] in IMPLEMENTATIONS and file in IMPLEMENTATIONS:
        return f"{importer[2]} and {file} meet in api only"
    return ""


def is_operator(name: str) -> bool:
    return (ROOT / "kernels" / name).is_dir()


def files() -> list[Path]:
    return sorted(path for floor in MAY for path in (ROOT / floor).rglob("*.py"))


def test_every_floor_obeys_the_import_law() -> None:
    assert len(files()) > 20
    found = [
        line
        for path in files()
        for line in violations(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("focus/x.py", "import engine.cli", "focus may not import engine"),
        ("kernels/dispatch.py", "from focus import config", "kernels may not import focus"),
        ("parallel/x.py", "def f():\n    import engine", "parallel may not import engine"),
        (
            "focus/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch.distributed",
            "focus never imports torch.distributed",
        ),
        ("focus/x.py", "from torch import distributed", "focus never imports torch.distributed"),
        ("focus/vision/x.py", "from ...engine import cli", "focus may not import engine"),
        ("focus/x.py", "import importlib\nimportlib.import_module('megatron.core')", "megatron"),
        ("engine/serve/api.py", "from engine import train", "engine/serve never imports"),
        ("engine/serve/api.py", "from ..data.records import Record", "never imports engine.data"),
        ("engine/export/onnx.py", "import parallel.mesh", "engine/export never imports"),
        (
            "kernels/mask_attention/api.py",
            "from kernels.codebook_lookup.api import simvq",
            "the operator mask_attention may not import",
        ),
        (
            "kernels/mask_attention/triton.py",
            "from kernels.mask_attention.reference import f",
            "triton and reference meet in api only",
        ),
        (
            "focus/x.py",
            "from kernels.mask_attention.reference import f",
            "only the public face of kernels",
        ),
        ("bench/x.py", "from tests.support import case", "bench never imports tests"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, message: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/train.py", "import parallel.mesh\nfrom focus.presets import focus_tiny"),
        ("engine/serve/api.py", "from engine.pictures import read_picture\nimport focus.model"),
        ("focus/x.py", "from kernels.mask_attention.api import mask_attention\nimport torch"),
        ("kernels/mask_attention/api.py", "from kernels.dispatch import dispatch"),
        ("kernels/mask_attention/api.py", "from kernels.mask_attention import reference"),
        ("bench/x.py", "import engine.train, parallel.mesh, kernels.catalog"),
    ],
)
def test_a_lawful_import_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_kernels_is_a_namespace_without_init() -> None:
    assert not list((ROOT / "kernels").rglob("__init__.py"))
