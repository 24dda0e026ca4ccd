"""What the Triton implementations may run on, asked without importing Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from kernels.kernel import Request


def interpreting() -> bool:
    """Return whether Triton's interpreter is on (`TRITON_INTERPRET=1`), which runs on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuse_triton(request: Request) -> str | None:
    """Return why Triton cannot serve a request at all."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if request.device == "cpu" and not interpreting():
        return "runs on cuda, the tensors are on cpu (TRITON_INTERPRET=1 interprets, for tests)"
    if request.device not in ("cuda", "cpu"):
        return f"runs on cuda, the tensors are on {request.device}"
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, got {request.dtype}"
    if interpreting() and request.dtype is torch.bfloat16:
        return "the interpreter multiplies bf16 wrongly (triton issue 11584); use fp16 or fp32"
    return None


def power_of_two(value: int, least: int = 16) -> int:
    """Return the next power of two, at least `least` (the smallest tensor-core side)."""
    return max(least, 1 << (max(1, value) - 1).bit_length())


def interpreted_cost(request: Request) -> float:
    """Return a prohibitive cost where Triton would be interpreted: it runs only when forced."""
    return 0.0 if request.device == "cuda" else 1e15
