"""Decoding as jobs: what a call of the trunk should read next, and whose logits it wants back.

A job owns some rows of a batch. The loop (`engine.serve.decode`) asks for `heads`, hands over the
logits of those ids and gets the next `Chunk` to read, until the job is done. Several jobs may share
one call of the trunk (`engine.serve.scheduler`); none sees the others.

The tokens of a job are those that `focus.generate` writes with the same seeds: the same grammar,
the same noise, the same arithmetic of choosing.
"""

# b rows of a job (guidance: 2b states), T positions, D width, m states that predict, V ids

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.serve.plan import Plan
from focus.generate import PICTURE_STEP, Progress, Words
from focus.grammar import NOWHERE, Drawing, RowGrammar
from focus.model import FocusModel
from focus.sampling import Sampling, choose, guide, gumbel
from focus.vocabulary import Vocabulary

NOISE_ELEMENTS = 1 << 20  # noise that is drawn ahead at most


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What to read next.

    embeddings: [b, T, D], for guidance both branches. lengths: [b] valid ones, None for all.
    at: [b, m] positions whose states predict, None for the last valid one of each row.
    back: tokens of each row to forget before reading.
    """

    embeddings: Tensor
    lengths: Tensor | None = None
    at: Tensor | None = None
    back: Sequence[int] | None = None


class Job(Protocol):
    """One decoding request of some rows."""

    rows: int  # of the cache; with guidance two for each picture
    done: bool  # no more logits are wanted

    @property
    def heads(self) -> Sequence[slice]:
        """Ids whose logits come next, in order; none where nothing is drawn."""

    def begin(self) -> Chunk | None:
        """Return what is read before the first token is drawn."""

    def feed(self, logits: Tensor | None) -> Chunk | None:
        """Draw from logits [rows, m, V] and return what to read next, None at the end."""


class TextJob:
    """Writes words up to a stop id; see `focus.generate.decode_text`."""

    def __init__(
        self,
        model: FocusModel,
        vocabulary: Vocabulary,
        seeds: Tensor,
        *,
        stop: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        callback: Callable[[int, int], None] | None = None,
    ) -> None:
        self.rows, self.done = len(seeds), False
        self._model, self._vocabulary, self._seeds = model, vocabulary, seeds
        self._stop, self._sampling, self._max = list(stop), sampling, max_tokens
        self._callback = callback
        size, device = vocabulary.text_size, seeds.device
        self._beyond = [i for i in self._stop if i >= size]
        self._ids = torch.tensor([*range(size), *self._beyond], device=device)
        banned = sorted(vocabulary.special_ids.difference(stop))
        self._banned = torch.tensor(banned, device=device)
        self._nowhere = torch.tensor([[NOWHERE]], device=device)
        self._written: list[list[int]] = [[] for _ in range(self.rows)]
        self._ends: list[int | None] = [None] * self.rows
        self._cut: set[int] = set()
        self._step = 0

    @property
    def heads(self) -> Sequence[slice]:
        """All text, and the stop ids beyond it."""
        if self._step == self._max:
            return ()
        return slice(0, self._vocabulary.text_size), *(slice(i, i + 1) for i in self._beyond)

    def begin(self) -> Chunk | None:
        """Nothing is read first: the prompt predicts the first word."""
        return None

    def feed(self, logits: Tensor | None) -> Chunk | None:
        """Draw one token for every running row."""
        running = [row for row, end in enumerate(self._ends) if end is None]
        if logits is None:
            picked = [self._stop[0]] * self.rows
            self._cut.update(running)
        else:
            allowed = logits[:, -1].index_fill(1, self._banned, -torch.inf)
            steps = torch.full_like(self._seeds, self._step)
            levels = [0] * self.rows
            found = choose(allowed, self._ids, self._sampling, levels, self._seeds, steps)
            picked = found.tolist()
        self._step += 1
        for row in running:
            if picked[row] in self._stop:
                self._ends[row] = picked[row]
            else:
                self._written[row].append(picked[row])
            if self._callback is not None:
                self._callback(row, picked[row])
        self.done = all(end is not None for end in self._ends)
        return self._chunk(picked, running)

    def _chunk(self, picked: list[int], running: list[int]) -> Chunk:
        device = self._seeds.device
        where = self._nowhere.expand(self.rows, -1, -1)
        tokens = torch.tensor(picked, device=device)[:, None]
        embedded = self._model.embed_tokens(tokens, where, where)
        if len(running) == self.rows:
            return Chunk(embeddings=embedded)
        lengths = [int(row in running) for row in range(self.rows)]
        return Chunk(embeddings=embedded, lengths=torch.tensor(lengths, device=device))

    def words(self) -> list[Words]:
        """Return what each row said."""
        return [
            Words(
                ids=said, text=self._vocabulary.decode(said), stop=end, ended=row not in self._cut
            )
            for row, (said, end) in enumerate(zip(self._written, self._ends, strict=True))
            if end is not None
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """A plan, embedded: all that does not depend on the tokens drawn."""

    plan: Plan
    forced: Tensor  # [P, D] embeddings of the forced tokens
    offset: Tensor | None  # [P, D] what their cells add to free tokens

    @classmethod
    def of(cls, model: FocusModel, plan: Plan, device: torch.device) -> Canvas:
        """Embed a plan in one go."""
        front = model.front
        cells, following = plan.cells.to(device), plan.following.to(device)
        forced = front.embed_tokens(plan.tokens.to(device)[None], cells[None], following[None])[0]
        offset = None
        if front.position is not None and front.next_position is not None:
            offset = front.position(cells) + front.next_position(following)
        return cls(plan=plan, forced=forced, offset=offset)

    def embed(self, model: FocusModel, tokens: Tensor, position: int) -> Tensor:
        """Embed tokens [n] drawn at one position -> [n, D]."""
        embedded: Tensor = model.front.token_embedding(tokens)
        return embedded if self.offset is None else embedded + self.offset[position]


class PictureJob:
    """Writes one picture per row; see `focus.generate.decode_picture`.

    Nothing comes back from the device before the end, unless a callback wants to watch.
    """

    def __init__(
        self,
        model: FocusModel,
        vocabulary: Vocabulary,
        seeds: Tensor,
        canvases: Sequence[Canvas],
        *,
        sampling: Sampling,
        callback: Callable[[Progress], None] | None = None,
    ) -> None:
        self._model, self._vocabulary, self._seeds = model, vocabulary, seeds
        self._canvases, self._sampling, self._callback = list(canvases), sampling, callback
        self._branches = 1 if sampling.guidance == 1 else 2
        self.rows = self._branches * len(canvases)
        self._alike = all(canvas is canvases[0] for canvas in canvases)
        self._steps = max(len(canvas.plan.free) for canvas in canvases)
        self._step = 0
        self._picked: list[Tensor] = []
        self._watched: list[RowGrammar] | None = None
        self._noise: tuple[int, Tensor] | None = None  # first step and noise [n, b, V]
        self.done = self._steps == 0

    @property
    def heads(self) -> Sequence[slice]:
        """The codes of the level that is written; rows on both levels need both."""
        ids = self._vocabulary.level_ids
        spans = [ids[level] for level in self._levels(self._step) if level is not None]
        return (slice(min(s.start for s in spans), max(s.stop for s in spans)),)

    def begin(self) -> Chunk | None:
        """Read the tags and tokens before the first free cell."""
        return None if self.done else self._chunk([c.plan.lead for c in self._canvases], None)

    def feed(self, logits: Tensor | None) -> Chunk | None:
        """Draw one token for every unfinished row."""
        assert logits is not None
        picked = self._choose(logits[:, -1])
        self._picked.append(picked)
        self._step += 1
        self.done = self._step == self._steps
        if self._callback is not None:
            self._watch(picked, self._callback)
        if self.done:
            return None
        return self._chunk([c.plan.chunk(self._step - 1) for c in self._canvases], picked)

    def drawings(self) -> list[Drawing]:
        """Return the finished pictures; the grammar checks every token of them."""
        picked = torch.stack(self._picked, 1).tolist() if self._picked else None
        return [
            finish(canvas.plan, self._vocabulary, [] if picked is None else picked[row])
            for row, canvas in enumerate(self._canvases)
        ]

    def _levels(self, step: int) -> list[int | None]:
        plans = [canvas.plan for canvas in self._canvases]
        return [plan.levels[step] if step < len(plan.levels) else None for plan in plans]

    def _choose(self, logits: Tensor) -> Tensor:
        num = len(self._canvases)
        (span,) = self.heads
        if self._branches == 2:
            logits = guide(logits[:num], logits[num:], self._sampling.guidance)
        ids = torch.arange(span.start, span.stop, device=logits.device)
        levels = self._levels(self._step)
        noise = None
        if self._alike:
            noise = self._noise_of(self._step, ids)
        else:
            logits = logits.masked_fill(self._forbidden(levels, span).to(ids.device), -torch.inf)
        return choose(logits, ids, self._sampling, levels, self._seeds, self._at(self._step), noise)

    def _at(self, step: int) -> Tensor:
        """Number of the token that each row draws: the noise depends on it."""
        free = [canvas.plan.free for canvas in self._canvases]
        found = [PICTURE_STEP + (f[step] if step < len(f) else 0) for f in free]
        return torch.tensor(found, device=self._seeds.device)

    def _noise_of(self, step: int, ids: Tensor) -> Tensor | None:
        """Draw noise for as many steps of one level at a time as memory allows."""
        if self._sampling.greedy:
            return None
        if self._noise is None or not 0 <= step - self._noise[0] < len(self._noise[1]):
            num, plan = len(self._seeds), self._canvases[0].plan
            same = plan.levels[step:].count(plan.levels[step])
            ahead = min(same, max(1, NOISE_ELEMENTS // (num * len(ids))))
            steps = torch.cat([self._at(step + i) for i in range(ahead)])
            drawn = gumbel(self._seeds.repeat(ahead), steps, ids)
            self._noise = (step, drawn.view(ahead, num, -1))
        return self._noise[1][step - self._noise[0]]

    def _forbidden(self, levels: Sequence[int | None], span: slice) -> Tensor:
        forbidden = torch.ones(len(levels), span.stop - span.start, dtype=torch.bool)
        for row, level in zip(forbidden, levels, strict=True):
            own = span if level is None else self._vocabulary.level_ids[level]
            row[own.start - span.start : own.stop - span.start] = False
        return forbidden

    def _chunk(self, spans: Sequence[slice], picked: Tensor | None) -> Chunk:
        """Embed the tokens of each row's span; the first of them is the one just picked."""
        if self._alike:
            embedded = self._embed(spans[0], picked, 0, len(spans))
            if self._branches == 2:
                embedded = torch.cat([embedded, embedded])
            return Chunk(embeddings=embedded)
        rows = [
            self._embed(span, None if picked is None else picked[row : row + 1], row, 1)[0]
            for row, span in enumerate(spans)
        ]
        lengths = torch.tensor([len(row) for row in rows], device=self._seeds.device)
        embedded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Chunk(
            embeddings=embedded.repeat(self._branches, 1, 1),
            lengths=lengths.repeat(self._branches),
        )

    def _embed(self, span: slice, picked: Tensor | None, row: int, num: int) -> Tensor:
        canvas = self._canvases[row]
        if picked is None or span.stop == span.start:
            return canvas.forced[span].expand(num, -1, -1)
        first = canvas.embed(self._model, picked, span.start)[:, None]
        if span.stop == span.start + 1:
            return first
        rest = canvas.forced[span.start + 1 : span.stop].expand(num, -1, -1)
        return torch.cat([first, rest], 1)

    def _watch(self, picked: Tensor, callback: Callable[[Progress], None]) -> None:
        if self._watched is None:
            self._watched = [start(c.plan, self._vocabulary) for c in self._canvases]
        step = self._step - 1
        for grammar, canvas, token in zip(
            self._watched, self._canvases, picked.tolist(), strict=True
        ):
            if step < len(canvas.plan.free):
                grammar.push(token)
                advance(grammar, canvas.plan)
        callback(Progress(rows=self._watched))


def start(plan: Plan, vocabulary: Vocabulary) -> RowGrammar:
    """Return the grammar of a plan, up to its first free token."""
    grammar = RowGrammar(vocabulary, plan.bucket)
    advance(grammar, plan)
    return grammar


def advance(grammar: RowGrammar, plan: Plan) -> None:
    """Push the plan's own tokens up to the next free one."""
    free = set(plan.free)
    tokens = plan.tokens.tolist()
    while not grammar.done and grammar.step not in free:
        grammar.push(tokens[grammar.step])


def finish(plan: Plan, vocabulary: Vocabulary, picked: Sequence[int]) -> Drawing:
    """Return the picture of a plan whose free tokens are `picked`, in order."""
    tokens = plan.tokens.tolist()
    for position, token in zip(plan.free, picked, strict=False):
        tokens[position] = token
    grammar = RowGrammar(vocabulary, plan.bucket)
    for token in tokens:
        grammar.push(token)
    return grammar.drawing()
