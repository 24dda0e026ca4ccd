"""Codebook lookup on the processor: int8 or fp32 screen, fp64 decision (`csrc/lookup.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.kernel import Request
from kernels.remember import Remembered


class Prepared:
    """A codebook rearranged for the screen; immutable, so threads may share it."""

    def __init__(self, codes: Tensor) -> None:
        values = codes.detach().to(torch.float32).contiguous()
        self._library = native.library()
        self.num_codes, self.dim = values.shape
        self._handle = self._library.focus_codebook_prepare(
            values.data_ptr(), self.num_codes, self.dim
        )
        if not self._handle:
            raise native.NativeFailure(
                f"a codebook of {self.num_codes} x {self.dim} could not be prepared: no memory"
            )

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.focus_codebook_free(self._handle)

    @property
    def bytes(self) -> int:
        """Memory that the prepared codebook holds."""
        return int(self._library.focus_codebook_bytes(self._handle))

    def lookup(self, x: Tensor, isa: str = "auto", threads: int = 0) -> tuple[Tensor, Tensor]:
        """Return (index int64, distance fp32) of fp32 tokens [N, d]."""
        tokens = x.detach().to(torch.float32).contiguous()
        index = torch.empty(tokens.shape[0], dtype=torch.int64)
        distance = torch.empty(tokens.shape[0], dtype=torch.float32)
        status = self._library.focus_codebook_lookup(
            self._handle,
            tokens.data_ptr(),
            tokens.shape[0],
            index.data_ptr(),
            distance.data_ptr(),
            threads or torch.get_num_threads(),
            native.ISA[isa],
        )
        if status:
            raise native.NativeFailure(f"codebook lookup failed: {native.STATUS[status]}")
        return index, distance


_prepared: Remembered[Prepared] = Remembered()


def refuse(request: Request) -> str | None:
    """Return why the native library cannot serve a request."""
    if request.device != "cpu":
        return f"runs on cpu, the tensors are on {request.device}"
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, got {request.dtype}"
    if request["codes"] > 2**31 - 1024:
        return "takes fewer than 2^31 codes"
    return native.missing()


def prepare(codes: Tensor) -> Prepared:
    """Return the prepared form of `codes`, remembered until the tensor dies or is written to."""
    return _prepared.get((codes,), lambda: Prepared(codes))


def codebook_lookup(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, distance) of the nearest codes."""
    return prepare(codes).lookup(x)
