"""Results derived from frozen tensors, remembered until one of them dies or is written to."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


def _same(refs: tuple[weakref.ref[Tensor], ...], tensors: tuple[Tensor, ...]) -> bool:
    return all(ref() is tensor for ref, tensor in zip(refs, tensors, strict=True))


class Remembered(Generic[T]):
    """A small cache keyed by the identity and the version counters of its source tensors.

    In-place writes raise a tensor's version, but writes through `.data` do not, and optimizers
    make them: a tensor that requires a gradient is therefore never remembered, freeze it first.
    Neither is one created in inference mode, which has no version. Safe to use from threads.
    """

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._entries: OrderedDict[
            tuple[int, ...], tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], T]
        ] = OrderedDict()

    def get(self, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """Return the remembered value of `sources`, or make and remember it."""
        if any(source.is_inference() or source.requires_grad for source in sources):
            return make()
        key = tuple(id(source) for source in sources)
        versions = tuple(source._version for source in sources)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry[1] == versions and _same(entry[0], sources):
                self._entries.move_to_end(key)
                return entry[2]
        value = make()
        with self._lock:
            self._entries[key] = (tuple(weakref.ref(s) for s in sources), versions, value)
            self._entries.move_to_end(key)
            for stale in [k for k, v in self._entries.items() if any(r() is None for r in v[0])]:
                del self._entries[stale]
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value

    def __len__(self) -> int:
        return len(self._entries)
