"""Ahead-of-time compilation of the Triton kernels: cubin, PTX and launch description; no GPU.

    python -m kernels.aot --arch sm_90 [--out DIR] [--op NAME] [--table FILE]

Each operator folder lists its variants in `variants.py` (kernel, dtype, shape class, launch
settings). The report gives registers, spills, shared memory, tensor-core instructions and, for the
hot loop, instructions per element; the command fails when a variant spills, when a product on
sm_90 is not wgmma, or when a loop is longer than its variant allows. What is written takes exactly
the listed arguments: the scratch pointers that Triton appends are cut off. Works with Triton 3.6
and the current release.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kernels import catalog

WARPGROUP = ("HGMMA", "IGMMA", "QGMMA")  # wgmma: sm_90
MATRIX = (*WARPGROUP, "HMMA", "IMMA")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel for one dtype and shape class.

    `signature` maps runtime arguments to Triton types ("*fp16", "i32", "fp32"); pointers and the
    integers in `aligned` are compiled as multiples of 16. `older` replaces constants, `num_warps`
    and stages below sm_90. `elements` is the number of outputs of the hot loop per thread and
    iteration (0: not counted), `most_per_element` what the loop may cost per output on sm_90.
    """

    name: str
    kernel: str  # "kernels.<operator>.triton:<function>"
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    elements: int = 0
    most_per_element: float = float("inf")
    older: dict[str, Any] = field(default_factory=dict)

    def on(self, arch: str) -> Variant:
        """Return the variant with its settings for an architecture."""
        if number(arch) >= 90 or not self.older:
            return self
        constants = {k: self.older.get(k, v) for k, v in self.constants.items()}
        stages = self.older.get("STAGES", self.num_stages)
        warps = self.older.get("num_warps", self.num_warps)
        return replace(self, constants=constants, num_warps=warps, num_stages=stages)


def number(arch: str) -> int:
    """Return 90 of "sm_90"."""
    return int(arch.removeprefix("sm_"))


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
    most_per_element: float = float("inf")
    error: str = ""

    def complaints(self) -> list[str]:
        """Return what is wrong with the variant."""
        found = [f"failed: {self.error}"] if self.error else []
        if self.spills:
            found.append(f"{self.spills} spills")
        old = [name for name in self.matrix if name not in WARPGROUP]
        if old and number(self.arch) == 90:
            found.append(f"products without wgmma: {', '.join(old)}")
        per_element = self.per_element or 0.0
        if number(self.arch) == 90 and per_element > self.most_per_element:
            found.append(f"{per_element:.2f} instructions per element")
        return found


def variants(operators: list[str] | None = None) -> list[Variant]:
    """Return the variants of some or all operators."""
    modules = catalog.optional("variants")
    unknown = sorted(set(operators or ()) - set(modules))
    if unknown:
        raise ValueError(f"no variants of {unknown}; operators that have some: {sorted(modules)}")
    return [v for name in operators or modules for v in modules[name].VARIANTS]


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
    return triton_compile(source, target=GPUTarget("cuda", number(arch), 32), options=options)


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
    """Return the innermost loop with the most tensor-core instructions.

    Where no loop holds one but the kernel does, everything is unrolled: all of it is returned.
    """
    at = {text: i for i, (op, text) in enumerate(lines) if op == "LABEL"}
    loops = []
    for i, (op, text) in enumerate(lines):
        target = re.search(r"(\.L_\w+)", text) if op.startswith("BRA") else None
        if target and at.get(target.group(1), i) < i:
            loops.append((at[target.group(1)], i))
    inner = [a for a in loops if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in loops)]
    bodies = [[line for line in lines[a : b + 1] if line[0] != "LABEL"] for a, b in inner]
    hot = max(bodies, key=lambda body: (_matrix_count(body), len(body)), default=[])
    if _matrix_count(lines) and not _matrix_count(hot):
        return [line for line in lines if line[0] != "LABEL"]
    return hot


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
        most_per_element=variant.most_per_element,
    )
    if variant.elements and body:
        result.per_element = (len(body) - _matrix_count(body)) / variant.elements
    return result


def trim(ptx: str, arguments: int) -> str:
    """Cut the parameters after the first `arguments` off the entry of a kernel.

    Triton appends two scratch pointers to every kernel; ours read neither.

    Raises:
        ValueError: the kernel reads one of them.
    """
    entry = re.search(r"\.entry\s+(\w+)\((.*?)\)", ptx, re.S)
    if entry is None:
        raise ValueError("no kernel entry in the PTX; expected one .entry")
    parameters = [part.strip() for part in entry.group(2).split(",")]
    for index in range(arguments, len(parameters)):
        if re.search(rf"\b{entry.group(1)}_param_{index}\b", ptx[entry.end() :]):
            raise ValueError(
                f"{entry.group(1)} reads hidden parameter {index}; launchers pass none"
            )
    kept = ",\n\t".join(parameters[:arguments])
    return f"{ptx[: entry.start(2)]}\n\t{kept}\n{ptx[entry.end(2) :]}"


def assemble(ptx: str, arch: str) -> bytes:
    """Assemble PTX with the assembler and the options that Triton takes for `arch`."""
    nvidia = importlib.import_module("triton.backends.nvidia.compiler")
    release = re.search(r"release (\d+)", nvidia.get_ptxas_version(number(arch)))
    options = ["--regAllocOptLevel=2"] if release and int(release.group(1)) >= 13 else []
    target = re.search(r"\.target\s+(\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [
            nvidia.get_ptxas(number(arch)).path,
            *options,
            f"--gpu-name={target and target[1]}",
        ]
        done = subprocess.run(
            [*command, str(source), "-o", str(out)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(f"the assembler refused the trimmed kernel: {done.stderr[:300]}")
        return out.read_bytes()


def launch(variant: Variant, arch: str, compiled: Any) -> dict[str, Any]:
    """Describe how to launch a trimmed cubin: arguments in order, threads, shared memory."""
    scratch = [
        getattr(compiled.metadata, name, 0) or 0
        for name in ("global_scratch_size", "profile_scratch_size")
    ]
    if any(scratch):
        raise ValueError(f"{variant.name} needs scratch memory {scratch}; launchers pass none")
    return {
        "name": variant.name,
        "symbol": compiled.metadata.name,
        "arch": arch,
        "arguments": [{"name": n, "type": t} for n, t in variant.signature.items()],
        "hidden": 0,
        "aligned_to_16": sorted(
            {n for n, t in variant.signature.items() if t.startswith("*")} | set(variant.aligned)
        ),
        "constants": variant.constants,
        "threads": 32 * variant.num_warps,
        "shared": int(compiled.metadata.shared),
    }


def write(variant: Variant, arch: str, compiled: Any, result: Report, out: Path) -> None:
    """Write cubin, PTX and launch description; the description last, so that it vouches for all."""
    ptx = trim(compiled.asm["ptx"], len(variant.signature))
    stem = out / f"{variant.name.replace('/', '-')}.{arch}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.cubin").write_bytes(assemble(ptx, arch))
    Path(f"{stem}.ptx").write_text(ptx)
    measured = {k: v for k, v in asdict(result).items() if k != "most_per_element"}
    description = {**launch(variant, arch, compiled), "report": measured}
    Path(f"{stem}.json").write_text(json.dumps(description, indent=1))


def build(variant: Variant, arch: str, out: Path | None) -> Report:
    """Compile, measure and optionally write one variant."""
    variant = variant.on(arch)
    try:
        compiled = compile_variant(variant, arch)
    except Exception as error:  # the assembler's own failures are part of the report
        return Report(name=variant.name, arch=arch, error=str(error).splitlines()[0][:160])
    result = report(variant, arch, compiled)
    if out is not None:
        write(variant, arch, compiled, result, out)
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


TABLE_HEAD = (
    "| kernel | arch | registers | spills | shared memory | tensor-core instructions "
    "| hot loop | per element |\n|---|---|---|---|---|---|---|---|"
)


def table_row(result: Report) -> str:
    """Format one row of the Markdown table."""
    matrix = " + ".join(f"{v} {k}" for k, v in result.matrix.items()) or "none"
    per = f"{result.per_element:.2f}" if result.per_element is not None else ""
    return (
        f"| `{result.name}` | {result.arch} | {result.registers} | {result.spills} "
        f"| {result.shared / 1024:.1f} KB | {matrix} | {result.loop} | {per} |"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 1 when a variant fails, spills or breaks its limits."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_90"])
    parser.add_argument("--op", nargs="+")
    parser.add_argument("--out", type=Path, help="write cubin, PTX and launch description here")
    parser.add_argument("--table", type=Path, help="write the report as a Markdown table here")
    chosen = parser.parse_args(arguments)
    results: list[Report] = []
    for arch in chosen.arch:
        for variant in variants(chosen.op):
            results.append(build(variant, arch, chosen.out))
            print(line(results[-1]), flush=True)
    if chosen.table:
        chosen.table.write_text("\n".join([TABLE_HEAD, *map(table_row, results)]) + "\n")
    bad = [(r.name, complaint) for r in results for complaint in r.complaints()]
    print(f"{len(results)} variants, {len(bad)} complaints")
    for name, complaint in bad:
        print(f"  {name}: {complaint}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
