"""Choice of implementation: the cheapest that accepts a request, never a silent fallback.

`FOCUS_KERNELS` forces a choice: `FOCUS_KERNELS=reference` for every operator, or
`FOCUS_KERNELS=mask_attention=structured,codebook_lookup=native` for some. A forced implementation
that refuses a request is an error, and so is a name that no operator has.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

from kernels.kernel import Implementation, Kernel, KernelUnsupported, Request

ENVIRONMENT = "FOCUS_KERNELS"
_forced: dict[str, str] = {}  # process-wide like the variable: backward may run in another thread


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One line of an explanation: an implementation, and why it cannot serve (None: it can)."""

    name: str
    refusal: str | None
    cost: float

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.name}: refused, {self.refusal}"
        return f"{self.name}: {self.cost:.1f} us estimated"


def parse(text: str) -> dict[str, str]:
    """Parse `FOCUS_KERNELS`; the key "*" stands for every operator."""
    forced: dict[str, str] = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        operator, equals, implementation = part.partition("=")
        forced[operator if equals else "*"] = implementation if equals else operator
    return forced


@lru_cache(maxsize=8)
def _from_environment(text: str) -> Mapping[str, str]:
    return parse(text)


def forced_name(kernel: Kernel) -> str | None:
    """Return the implementation that `force` or `FOCUS_KERNELS` demands for an operator."""
    text = os.environ.get(ENVIRONMENT, "")
    if not text and not _forced:
        return None
    forced = {**_from_environment(text), **_forced}
    if kernel.name in forced:
        return forced[kernel.name]
    everywhere = forced.get("*")
    if everywhere is None or any(i.name == everywhere for i in kernel.implementations):
        return everywhere
    raise KernelUnsupported(
        f"{ENVIRONMENT} asks for {everywhere!r} everywhere, but {kernel.name} has only "
        f"{[i.name for i in kernel.implementations]}; name operators one by one"
    )


@contextlib.contextmanager
def force(**implementations: str) -> Iterator[None]:
    """Force implementations by operator name for the length of a `with` block."""
    before = dict(_forced)
    _forced.update(implementations)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def explain(kernel: Kernel, request: Request) -> list[Candidate]:
    """List every implementation of an operator with its estimate or its reason to refuse."""
    return [
        Candidate(
            name=candidate.name,
            refusal=(refusal := candidate.refuse(request)),
            cost=candidate.cost(request) if refusal is None else float("inf"),
        )
        for candidate in kernel.implementations
    ]


def choose(kernel: Kernel, request: Request) -> Implementation:
    """Return the implementation that serves a request.

    Raises:
        KernelUnsupported: nobody accepts it, or the forced one refuses.
    """
    name = forced_name(kernel)
    if name is None:
        return _cheapest(kernel.name, kernel.implementations, request)
    chosen = kernel.implementation(name)
    refusal = chosen.refuse(request)
    if refusal is not None:
        raise KernelUnsupported(
            f"{kernel.name}: implementation {name!r} is forced but refuses [{request}]: {refusal}"
        )
    return chosen


@lru_cache(maxsize=4096)
def _cheapest(
    operator: str, implementations: tuple[Implementation, ...], request: Request
) -> Implementation:
    best: Implementation | None = None
    best_cost = float("inf")
    reasons: list[str] = []
    for candidate in implementations:
        refusal = candidate.refuse(request)
        if refusal is not None:
            reasons.append(f"  {candidate.name}: {refusal}")
            continue
        cost = candidate.cost(request)
        if best is None or cost < best_cost:
            best, best_cost = candidate, cost
    if best is None:
        raise KernelUnsupported(
            f"{operator}: no implementation takes [{request}]\n" + "\n".join(reasons)
        )
    return best


def forget() -> None:
    """Drop remembered choices, for instance after a native library was built."""
    _cheapest.cache_clear()


@lru_cache(maxsize=64)
def load(module: str) -> ModuleType:
    """Import an implementation's module once."""
    return importlib.import_module(module)
