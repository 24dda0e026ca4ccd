"""The decode step as a CUDA graph: one launch instead of hundreds. (Not run here: needs a GPU.)

Graphs have fixed addresses and shapes: there is one for every cache, number of rows and number of
tokens per row, up to `LONGEST`; longer chunks run as they are, on the same cache.
"""

# B rows, T positions, D width

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from focus.llm import KVCache

T = TypeVar("T")

LONGEST = 4  # tokens per row that are worth a graph: a cell, and the end of its line


class GraphTrunk(nn.Module):
    """A trunk whose short steps are replayed from CUDA graphs.

    trunk: what is captured (`FusedTrunk`). A cache must attend over all its slots
    (`KVCache(whole=True)`), or its shapes would change from step to step; other caches, longer
    chunks and devices without graphs go to the trunk itself.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.config: Any = trunk.config
        self._trunk = [trunk]
        self._graphs: dict[tuple[int, int, int], _Graph] = {}

    def forward(
        self, embeddings: Tensor, *, lengths: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return final-normed hidden states [B, T, D]; append to the cache."""
        trunk = self._trunk[0]
        num = embeddings.shape[1]
        if cache is None or num > LONGEST or not cache.whole or not can_capture(cache):
            states: Tensor = trunk(embeddings, lengths=lengths, cache=cache)
            return states
        cache.reserve(num, lengths)
        key = (cache.keys.data_ptr(), cache.batch, num)
        if key not in self._graphs:
            self._graphs[key] = _Graph(trunk, cache, embeddings)
        return self._graphs[key](embeddings, lengths, cache)

    def release(self) -> None:
        """Free all graphs; call it before their caches go."""
        self._graphs.clear()


class _Graph:
    """One captured step: buffers that callers fill, a replay, a buffer that callers read."""

    def __init__(self, trunk: nn.Module, cache: KVCache, embeddings: Tensor) -> None:
        self._embeddings = embeddings.clone()
        self._num = embeddings.shape[1]
        self._valid = torch.full_like(cache.lengths, self._num)
        self._positions = cache.lengths.clone()
        own = cache.view(slice(None))  # shares keys and values, counts in its own buffer
        own.truncate(torch.zeros_like(own.lengths))  # its bound must not ask the device meanwhile

        def step() -> Tensor:
            own.lengths = self._positions
            hidden: Tensor = trunk(self._embeddings, lengths=self._valid, cache=own)
            return hidden

        self._hidden, self._replay = capture(step)

    def __call__(self, embeddings: Tensor, lengths: Tensor | None, cache: KVCache) -> Tensor:
        self._embeddings.copy_(embeddings)
        self._positions.copy_(cache.lengths)
        if lengths is None:
            self._valid.fill_(self._num)
        else:
            self._valid.copy_(lengths)
        self._replay()
        cache.advance(lengths, self._num)
        return self._hidden.clone()


def can_capture(cache: KVCache) -> bool:
    """Tell whether a cache lies where graphs can be captured."""
    return cache.keys.device.type == "cuda"


def capture(function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Capture a function of fixed buffers; return its output buffers and the replay.

    It runs three times on a side stream first, as PyTorch asks for: libraries set themselves up.
    The key/value slots that it writes meanwhile are those the first replay writes again.
    """
    make: Any = torch.cuda.Stream
    stream = make()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may encode pictures meanwhile: only this one's calls are captured and judged.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), torch.no_grad():
        output = function()
    return output, graph.replay
