"""Ahead-of-time compilation of the Triton kernels: cubin, PTX and launch description; no GPU.

    python -m kernels.aot --arch sm_90 [--out DIR] [--op NAME]

Each operator folder lists its variants in `variants.py` (kernel, dtype, shape class, launch
settings). The report gives registers, spills, shared memory, tensor-core instructions and, for the
hot loop, instructions per element. Works with Triton 3.6 and the current release.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MATRIX = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel for one dtype and shape class.

    `signature` maps runtime arguments to Triton types ("*fp16", "i32", "fp32"); pointers and the
    integers in `aligned` are compiled as multiples of 16. `elements` is the number of outputs of
    the hot loop per thread and iteration (0: not counted).
    """

    name: str
    kernel: str  # "kernels.<operator>.triton:<function>"
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    elements: int = 0


@dataclass(kw_only=True)
class Report:
    """What the assembler made of a variant."""

    name: str
    arch: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    loop: int = 0
    per_element: float | None = None
    error: str = ""


def variants(operators: list[str] | None = None) -> list[Variant]:
    """Return the variants of some or all operators."""
    names = operators or ["codebook_lookup", "gated_cross_attention", "mask_attention"]
    found: list[Variant] = []
    for name in names:
        found += importlib.import_module(f"kernels.{name}.variants").VARIANTS
    return found


def compile_variant(variant: Variant, arch: str) -> Any:
    """Compile one variant with Triton for `arch` ("sm_90")."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = variant.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    order = list(kernel.arg_names)
    signature = {
        name: variant.signature.get(name, "constexpr" if name in variant.constants else None)
        for name in order
    }
    unknown = [name for name, kind in signature.items() if kind is None]
    if unknown:
        raise ValueError(f"{variant.name}: no type or value for arguments {unknown}")
    aligned = {n for n, t in variant.signature.items() if t.startswith("*")} | set(variant.aligned)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(order.index(k),): v for k, v in variant.constants.items()},
        attrs={(order.index(n),): [["tt.divisibility", 16]] for n in sorted(aligned)},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": True,
    }
    return triton_compile(
        source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options
    )


def tool(name: str) -> str:
    """Return the path of an assembler tool that ships with Triton."""
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not found.is_file():
        raise ValueError(f"{name} is not part of this Triton; install a release wheel")
    return str(found)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return (resource usage, SASS listing) of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tool("cuobjdump"), "-res-usage", str(path))
        return usage, _run(tool("nvdisasm"), "-c", str(path))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


Line = tuple[str, str]  # (opcode or "LABEL", label or text)


def parse(listing: str) -> list[Line]:
    """Return the instructions and labels of a SASS listing."""
    lines: list[Line] = []
    for text in listing.splitlines():
        label = re.match(r"\s*(\.L_\w+):", text)
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
        if label:
            lines.append(("LABEL", label.group(1)))
        elif code:
            lines.append((code.group(1), text))
    return lines


def hot_loop(lines: list[Line]) -> list[Line]:
    """Return the innermost loop with the most tensor-core instructions."""
    at = {text: i for i, (op, text) in enumerate(lines) if op == "LABEL"}
    loops = []
    for i, (op, text) in enumerate(lines):
        target = re.search(r"(\.L_\w+)", text) if op.startswith("BRA") else None
        if target and at.get(target.group(1), i) < i:
            loops.append((at[target.group(1)], i))
    inner = [a for a in loops if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in loops)]
    bodies = [[line for line in lines[a : b + 1] if line[0] != "LABEL"] for a, b in inner]
    return max(bodies, key=lambda body: (_matrix_count(body), len(body)), default=[])


def _matrix_count(lines: list[Line]) -> int:
    return sum(op.split(".")[0] in MATRIX for op, _ in lines)


def report(variant: Variant, arch: str, compiled: Any) -> Report:
    """Measure a compiled variant."""
    usage, listing = disassemble(compiled.asm["cubin"])
    lines = parse(listing)
    counts = collections.Counter(op.split(".")[0] for op, _ in lines)
    body = hot_loop(lines)
    registers = re.search(r"REG:(\d+)", usage)
    result = Report(
        name=variant.name,
        arch=arch,
        registers=int(registers.group(1)) if registers else 0,
        spills=counts["LDL"] + counts["STL"],
        shared=int(compiled.metadata.shared),
        matrix={name: counts[name] for name in MATRIX if counts[name]},
        loop=len(body),
    )
    if variant.elements and body:
        result.per_element = (len(body) - _matrix_count(body)) / variant.elements
    return result


def launch(variant: Variant, arch: str, compiled: Any) -> dict[str, Any]:
    """Describe how to launch a cubin: arguments in order, threads, shared memory.

    Triton appends two scratch pointers to every kernel; none of ours uses them, so `hidden` tells
    how many null pointers follow the listed arguments.
    """
    scratch = [
        getattr(compiled.metadata, name, 0) or 0
        for name in ("global_scratch_size", "profile_scratch_size")
    ]
    if any(scratch):
        raise ValueError(f"{variant.name} needs scratch memory {scratch}; launchers pass none")
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", compiled.asm["ptx"], re.S)
    parameters = len(re.findall(r"\.param", entry.group(1))) if entry else 0
    return {
        "name": variant.name,
        "symbol": compiled.metadata.name,
        "arch": arch,
        "arguments": [{"name": n, "type": t} for n, t in variant.signature.items()],
        "hidden": parameters - len(variant.signature),
        "aligned_to_16": sorted(
            {n for n, t in variant.signature.items() if t.startswith("*")} | set(variant.aligned)
        ),
        "constants": variant.constants,
        "threads": 32 * variant.num_warps,
        "shared": int(compiled.metadata.shared),
    }


def build(variant: Variant, arch: str, out: Path | None) -> Report:
    """Compile, measure and optionally write one variant."""
    try:
        compiled = compile_variant(variant, arch)
    except Exception as error:  # the assembler's own failures are part of the report
        return Report(name=variant.name, arch=arch, error=str(error).splitlines()[0][:160])
    result = report(variant, arch, compiled)
    if out is not None:
        stem = out / f"{variant.name.replace('/', '-')}.{arch}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{stem}.cubin").write_bytes(compiled.asm["cubin"])
        Path(f"{stem}.ptx").write_text(compiled.asm["ptx"])
        description = {**launch(variant, arch, compiled), "report": asdict(result)}
        Path(f"{stem}.json").write_text(json.dumps(description, indent=1))
    return result


def line(result: Report) -> str:
    """Format one row of the report."""
    if result.error:
        return f"{result.name:52s} {result.arch} failed: {result.error}"
    matrix = " ".join(f"{k} {v}" for k, v in result.matrix.items()) or "-"
    per = f"{result.per_element:.2f}" if result.per_element is not None else "-"
    return (
        f"{result.name:52s} {result.arch} {result.registers:4d} regs {result.spills:4d} spills "
        f"{result.shared:7d} B  {matrix:12s} loop {result.loop:5d}  instr/elt {per}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 1 when a variant failed or spills."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_90"])
    parser.add_argument("--op", nargs="+")
    parser.add_argument("--out", type=Path, help="write cubin, PTX and launch description here")
    chosen = parser.parse_args(arguments)
    results = [
        build(variant, arch, chosen.out) for arch in chosen.arch for variant in variants(chosen.op)
    ]
    for result in results:
        print(line(result))
    bad = [r.name for r in results if r.error or r.spills]
    print(f"{len(results)} variants, {len(bad)} failed or spilling {bad if bad else ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
