"""Continuous batching: requests of many threads, at different positions, in one trunk call a step.

    engine = Engine(focus, slots=8)        # one of these inside, for any number of threads

Every thread runs its request as if it were alone (`focus.api`); only where it would decode, it
hands its rows over and waits. One loop owns a cache of `slots` rows. Each step asks every job for
the token it draws, reads all of them in one call of the trunk, and lets new jobs in and finished
ones out without stopping the others.
"""

# R rows in use, T positions, D width

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.serve.decode import Decoder, predicting
from engine.serve.job import Chunk, Job
from focus.errors import ShapeError
from focus.generate import State, append
from focus.llm import KVCache
from focus.model import FocusModel
from focus.vocabulary import Vocabulary

LONG = 4  # positions from which a chunk is read apart from the others, who would be padded to it


class Busy(RuntimeError):
    """No more requests are taken: the waiting line is full, or the scheduler is closed."""


class _Place:
    """A job that is being decoded, and the rows that it owns."""

    def __init__(self, job: Job, state: State, future: Future[None]) -> None:
        self.job, self.state, self.future = job, state, future
        self.first = 0
        self.began = [int(n) for n in state.cache.lengths.tolist()]
        self.chunk: Chunk | None = None
        self.predicting: Tensor = state.hidden[:, None]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.job.rows)


class Scheduler(Decoder):
    """A `Decoder` for many threads at once; `text` and `picture` block until theirs is done.

    slots: rows that are decoded together at most (a guided picture takes two). max_length: tokens
    that a row may hold. max_waiting: jobs in line, beyond which `Busy` is raised.
    """

    def __init__(
        self,
        model: FocusModel,
        vocabulary: Vocabulary,
        *,
        slots: int = 8,
        max_length: int | None = None,
        max_waiting: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(model, vocabulary, **options)
        weight = model.front.mask_queries
        length = max_length or model.config.llm.max_length
        self.cache = KVCache(
            model.config.llm,
            slots,
            length,
            weight.dtype,
            weight.device,
            whole=weight.device.type == "cuda",
        )
        self.max_waiting = max_waiting
        self.steps = self.rows_read = 0  # calls of the trunk, and rows that took part in them
        self._places: list[_Place] = []
        self._waiting: deque[_Place] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="focus-decode", daemon=True)
        self._thread.start()

    def run(self, job: Job, state: State) -> None:
        """Let the loop drive a job; returns when it is done. Raises what the job raised, `Busy`."""
        if job.rows > self.cache.batch:
            raise Busy(
                f"at most {self.cache.batch} rows at a time expected, got {job.rows}; "
                "build the Scheduler with more slots"
            )
        future: Future[None] = Future()
        place = _Place(job, state, future)
        with self._changed:
            if self._closed or len(self._waiting) >= self.max_waiting:
                reason = "it is closed" if self._closed else f"{self.max_waiting} jobs are waiting"
                raise Busy(f"the scheduler takes no more requests: {reason}; try again later")
            self._waiting.append(place)
            self._changed.notify()
        future.result()

    def close(self) -> None:
        """Finish what is running, refuse what is waiting, stop the loop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """Rows in use and jobs in line."""
        return sum(place.job.rows for place in self._places), len(self._waiting)

    @torch.no_grad()
    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._places or self._waiting or self._closed):
                    self._changed.wait()
                if self._closed:
                    while self._waiting:
                        refused = self._waiting.popleft()
                        refused.future.set_exception(Busy("the scheduler was closed"))
                    if not self._places:
                        return
                admitted = self._admit()
            for place in admitted:
                self._guard([place], partial(self._begin, place))
            self._guard(self._places, self._step)

    def _admit(self) -> list[_Place]:
        """Take jobs from the line, in order, while there are rows for the first."""
        taken: list[_Place] = []
        used = sum(place.job.rows for place in self._places)
        while self._waiting and used + self._waiting[0].job.rows <= self.cache.batch:
            place = self._waiting.popleft()
            place.first = used
            used += place.job.rows
            self._places.append(place)
            taken.append(place)
        return taken

    def _begin(self, place: _Place) -> None:
        """Copy a job's tokens into its rows."""
        own = place.state.cache
        for row, num in enumerate(place.began):
            if num > self.cache.max_length:
                raise ShapeError(
                    f"prompts of at most {self.cache.max_length} tokens expected, got {num}; "
                    "build the Scheduler with a larger max_length"
                )
            self.cache.write(place.first + row, *own.read(row, 0, num))
        place.chunk = place.job.begin()

    def _step(self) -> None:
        """Read what was drawn, let the finished go, draw for the others."""
        reading = [place for place in self._places if place.chunk is not None]
        short = [p for p in reading if p.chunk is not None and p.chunk.embeddings.shape[1] < LONG]
        for place in reading:
            if place not in short:
                self._read([place])
        if short:
            self._read(short, slice(0, sum(place.job.rows for place in self._places)))
        self._let_go()
        self._draw()
        self._let_go()

    def _draw(self) -> None:
        """Feed logits to every job that waits; jobs with the same heads share a product."""
        groups: dict[tuple[tuple[int, int], ...], list[_Place]] = {}
        for place in self._places:
            if place.chunk is None and not place.job.done:
                heads = tuple((ids.start, ids.stop) for ids in place.job.heads)
                groups.setdefault((*heads, (place.predicting.shape[1], -1)), []).append(place)
        for key, places in groups.items():
            wanted = [slice(*ids) for ids in key[:-1]]
            states = torch.cat([place.predicting for place in places])
            logits = self.logits(states, wanted)
            first = 0
            for place in places:
                own = None if logits is None else logits[first : first + place.job.rows]
                first += place.job.rows
                self._guard([place], partial(_feed, place, own))

    def _let_go(self) -> None:
        for place in [place for place in self._places if place.job.done and place.chunk is None]:
            self._finish(place)

    def _read(self, places: Sequence[_Place], rows: slice | None = None) -> None:
        """Read the chunks of some jobs in one call over `rows`, by default those of one job."""
        rows = rows or places[0].rows
        first, last = rows.start, rows.stop
        chunks = {place: place.chunk for place in places if place.chunk is not None}
        longest = max(chunk.embeddings.shape[1] for chunk in chunks.values())
        example = next(iter(chunks.values())).embeddings
        embeddings = example.new_zeros(last - first, longest, example.shape[2])
        lengths = torch.zeros(last - first, dtype=torch.int64, device=example.device)
        back = torch.zeros_like(lengths)
        for place, chunk in chunks.items():
            own = slice(place.first - first, place.rows.stop - first)
            num = chunk.embeddings.shape[1]
            embeddings[own, :num] = chunk.embeddings
            lengths[own] = num if chunk.lengths is None else chunk.lengths
            if chunk.back is not None:
                back[own] = torch.tensor(chunk.back, device=back.device)
        view = self.cache.view(rows)
        if any(chunk.back is not None for chunk in chunks.values()):
            view.truncate(view.lengths - back)
        state = State(view, example.new_zeros(last - first, example.shape[2]))
        hidden = append(self.model, state, embeddings, lengths)
        self.cache.settle(rows, view)
        self.steps += 1
        self.rows_read += sum(place.job.rows for place in places)
        for place, chunk in chunks.items():
            own = slice(place.first - first, place.rows.stop - first)
            ends = state.hidden[own]
            if chunk.lengths is not None:  # rows that read nothing keep their state
                ends = torch.where((chunk.lengths > 0)[:, None], ends, place.state.hidden)
            place.state.hidden = ends
            place.predicting = predicting(hidden[own], ends, chunk)
            place.chunk = None

    def _finish(self, place: _Place, error: BaseException | None = None) -> None:
        """Hand a job's new tokens back to its own cache and close the gap that it leaves."""
        if error is None:
            own, lengths = place.state.cache, self.cache.lengths[place.rows].tolist()
            for row, (start, stop) in enumerate(zip(place.began, lengths, strict=True)):
                stop = min(stop, own.max_length)
                own.write(row, *self.cache.read(place.first + row, start, stop), start=start)
        self._places.remove(place)
        for later in self._places:
            if later.first > place.first:
                self._move(later, later.first - place.job.rows)
        self.cache.lengths[sum(left.job.rows for left in self._places) :] = 0
        self.cache.truncate(self.cache.lengths)  # counts anew how many slots are attended over
        if error is None:
            place.future.set_result(None)
        else:
            place.future.set_exception(error)

    def _move(self, place: _Place, first: int) -> None:
        for row in range(place.job.rows):
            num = int(self.cache.lengths[place.first + row])
            self.cache.write(first + row, *self.cache.read(place.first + row, 0, num))
        place.first = first

    def _guard(self, places: Sequence[_Place], action: Callable[[], None]) -> None:
        """Let an error end the jobs that it concerns, and no other."""
        try:
            action()
        except Exception as error:
            for place in [place for place in places if place in self._places]:
                self._finish(place, error)


def _feed(place: _Place, logits: Tensor | None) -> None:
    place.chunk = place.job.feed(logits)
