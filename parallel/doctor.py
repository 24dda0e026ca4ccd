"""Which optional parts of training are present, what each is for, and what stands in for it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata

import torch


@dataclass(frozen=True, kw_only=True)
class Part:
    """One optional part: `version` is None when it is absent, `problem` says why it is unusable."""

    name: str
    version: str | None
    problem: str | None
    used_for: str
    instead: str

    @property
    def usable(self) -> bool:
        """Whether training will use it."""
        return self.version is not None and self.problem is None


_PARTS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "megatron-core",
        "megatron.core",
        "megatron-core",
        "splitting one model over processes (tp, pp, cp)",
        "data parallelism only",
    ),
    (
        "transformer-engine",
        "transformer_engine.pytorch",
        "transformer-engine",
        "fused layers, fp8 and context-parallel attention of the trunk",
        "our RMSNorm and PyTorch's attention",
    ),
    (
        "apex",
        "apex.optimizers",
        "apex",
        "fused Adam and gradient accumulation (a source build of NVIDIA's)",
        "our AdamW with steps counted per group",
    ),
    (
        "flash-attn",
        "flash_attn",
        "flash-attn",
        "packed and variable-length attention",
        "PyTorch's attention",
    ),
    ("DALI", "nvidia.dali", "nvidia-dali-cuda130", "decoding on the GPU", "decoding on the CPU"),
    (
        "xformers",
        "xformers",
        "xformers",
        "self-attention of the diffusion decoder's UNet",
        "PyTorch's attention",
    ),
    ("triton", "triton", "triton", "our operators on a GPU", "the reference operators"),
    ("tensorboard", "tensorboard", "tensorboard", "curves and panels", "log.jsonl only"),
    ("wandb", "wandb", "wandb", "curves on a server (--set wandb=PROJECT)", "TensorBoard"),
)


def examine() -> list[Part]:
    """Try to import every part; megatron-core, which takes seconds, is only looked up."""
    cuda = Part(
        name="CUDA",
        version=torch.version.cuda if torch.cuda.is_available() else None,
        problem=None,
        used_for="everything; processes talk over NCCL",
        instead="the CPU; processes talk over gloo, through parallel/cpu.py",
    )
    return [cuda, *(_look(*part) for part in _PARTS)]


def _look(name: str, module: str, package: str, used_for: str, instead: str) -> Part:
    version, problem = None, None
    try:
        version = metadata.version(package)
        if module != "megatron.core":
            importlib.import_module(module)
    except metadata.PackageNotFoundError:
        pass
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Part(name=name, version=version, problem=problem, used_for=used_for, instead=instead)


def render(parts: list[Part]) -> str:
    """Return one line per part."""
    lines = []
    for part in parts:
        state = part.version or "absent"
        tail = f"used for {part.used_for}" if part.usable else f"instead: {part.instead}"
        if part.problem:
            state = f"{state}, unusable ({part.problem})"
        lines.append(f"{part.name:<20}{state:<14}{tail}")
    return "\n".join(lines)
