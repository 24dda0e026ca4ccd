"""What is remembered of pictures: features, codes, and the keys and values of the prompt's start.

Every prompt about a picture begins alike: system message, the picture, the adapter's queries; the
turns of a dialogue agree further. The trunk is causal, so keys and values of a common start serve
whatever follows. An entry is found by the picture's pixels and used as far as the new prompt agrees
with the last one, position by position.
"""

# L layers, K key/value heads, N positions of the start, d head width, D width

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from focus.batch import Batch, Source
from focus.model import Features
from focus.request import Pixels
from focus.tokenizer.dual import Codes


@dataclass(kw_only=True)
class Start:
    """The first N positions of a prompt, as the trunk read them."""

    ids: Tensor  # [N] what stood there: token,
    source: Tensor  # [N] origin
    grid: Tensor  # [N, 3] and cell
    keys: Tensor  # [L, K, N, d]
    values: Tensor
    hidden: Tensor  # [N, D]

    def common(self, batch: Batch, row: int) -> int:
        """Number of positions at which a prompt begins like this one; less than the prompt has."""
        most = min(len(self.ids), int(batch.lengths[row]) - 1)
        same = (
            (batch.input_ids[row, :most] == self.ids[:most])
            & (batch.source[row, :most] == self.source[:most])
            & (batch.grid[row, :most] == self.grid[:most]).all(1)
        )
        num = int(same.long().cumprod(0).sum())
        if num < most and not torch.equal(batch.grid[row, num], self.grid[num]):
            num -= 1  # a position also tells which cell comes next
        return max(num, 0)


@dataclass(kw_only=True)
class Seen:
    """One picture. `codes` and `start` come when they are first needed."""

    features: Features
    codes: Codes | None = None
    start: Start | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        return sum(t.numel() * t.element_size() for t in tensors(self))


class Memory:
    """The pictures seen last, within `max_bytes`; safe to share among threads."""

    def __init__(self, max_bytes: int = 1 << 28) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()
        self._sizes: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._seen)

    def find(self, key: bytes) -> Seen | None:
        """Return what is known of a picture."""
        with self._lock:
            seen = self._seen.get(key)
            if seen is None:
                self.misses += 1
                return None
            self.hits += 1
            self._seen.move_to_end(key)
            return seen

    def put(self, key: bytes, seen: Seen) -> None:
        """Remember a picture; forget those that were not asked for longest."""
        with self._lock:
            self._seen[key], self._sizes[key] = seen, seen.num_bytes
            self._seen.move_to_end(key)
            while sum(self._sizes.values()) > self.max_bytes and len(self._seen) > 1:
                del self._sizes[self._seen.popitem(last=False)[0]]

    def clear(self) -> None:
        """Forget all pictures."""
        with self._lock:
            self._seen.clear()
            self._sizes.clear()


def key_of(pixels: Pixels) -> bytes:
    """Return a fingerprint of a picture's size and pixels."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.digest()


def shared_end(batch: Batch, row: int) -> int:
    """Number of positions that another prompt may share: up to a region's own vector."""
    own = (batch.source[row, : int(batch.lengths[row])] == Source.REGION).nonzero()
    return int(own[0]) if len(own) else int(batch.lengths[row])


def row_of(features: Features, row: int) -> Features:
    """Return the features of one picture of a batch, as copies."""
    taken: Features = _walk([features], lambda found: found[0][row : row + 1].clone())
    return taken


def stack(features: Sequence[Features]) -> Features:
    """Return the features of several pictures as one batch."""
    if len(features) == 1:
        return features[0]
    joined: Features = _walk(features, lambda found: torch.cat(list(found)))
    return joined


def tensors(value: Any) -> list[Tensor]:
    """Return every tensor of nested records."""
    found: list[Tensor] = []

    def take(same: Sequence[Tensor]) -> Tensor:
        found.append(same[0])
        return same[0]

    _walk([value], take)
    return found


def _walk(values: Sequence[Any], change: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """Rebuild records of one shape with `change` of the tensors that stand at one place."""
    first = values[0]
    if isinstance(first, Tensor):
        return change(values)
    if is_dataclass(first) and not isinstance(first, type):
        names = [item.name for item in fields(first)]
        new = {name: _walk([getattr(value, name) for value in values], change) for name in names}
        return replace(first, **new)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_walk(parts, change) for parts in zip(*values, strict=True)))
    if isinstance(first, (list, tuple)) and any(isinstance(part, Tensor) for part in first):
        return type(first)(_walk(parts, change) for parts in zip(*values, strict=True))
    return first
