"""Decoding on the key/value cache: words, mask queries, then a picture from the same cache.

    state = prefill(model, embeddings, lengths, room=...)
    words = decode_text(model, state, vocabulary, stop=[vocabulary.seg_id])
    states = append(model, state, mask_queries)          -> E_Q for the segmentation predictor
    pictures = decode_picture(model, state, vocabulary, buckets)

Rows are independent throughout: each stands at its own position, stops by itself, follows its own
grammar and draws from its own seed, so a batch gives what its rows give one by one.
"""

# B rows, T positions, D width, N appended states, V ids

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from focus.buckets import BUCKETS, Bucket
from focus.config import LLMConfig
from focus.grammar import NOWHERE, Cell, Choice, Drawing, Keep, RowGrammar
from focus.llm import KVCache
from focus.sampling import GREEDY, Sampling, choose, guide
from focus.vocabulary import Vocabulary

PICTURE_STEP = 1 << 20  # keeps the noise of pictures apart from that of words


class GenerationError(ValueError):
    """A decoding request that contradicts itself."""


class Trunk(Protocol):
    """The language model of `focus.llm`, or one that behaves like it."""

    @property
    def config(self) -> LLMConfig:
        """Its sizes, for the cache."""

    def __call__(
        self, embeddings: Tensor, *, lengths: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return final-normed hidden states; append to the cache."""


class Decodable(Protocol):
    """What decoding needs of a model; `focus.model.FocusModel` has it."""

    @property
    def trunk(self) -> Trunk:
        """The language model."""

    def embed_tokens(self, input_ids: Tensor, grid: Tensor, next_grid: Tensor) -> Tensor:
        """Embed ids [B, T] with their cells [B, T, 3] and the cells of what follows them."""

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        """Return logits [..., V] over all ids or a slice of them."""


@dataclass
class State:
    """Where each row stands. Functions of this module move it on in place."""

    cache: KVCache
    hidden: Tensor  # [B, D] last state of each row: it predicts the row's next token

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """Return the rows of several states, in order, as copies."""
        return State(
            KVCache.join([state.cache for state in states]),
            torch.cat([state.hidden for state in states]),
        )

    def select(self, rows: Sequence[int]) -> State:
        """Return copies of rows, which may repeat (several pictures from one prompt)."""
        index = torch.tensor(list(rows), device=self.hidden.device)
        return State(self.cache.select(index), self.hidden.index_select(0, index))


@dataclass(frozen=True, kw_only=True)
class Words:
    """What one row said. `ended` is False if it had to be cut off; `stop` ended it either way."""

    ids: list[int]
    text: str
    stop: int
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of a picture batch after a step, for streaming."""

    rows: Sequence[RowGrammar]

    @property
    def fraction(self) -> float:
        """Share of the tokens that are written."""
        written = sum(row.step for row in self.rows)
        return written / sum(row.total or row.step + 1 for row in self.rows)

    def drawings(self) -> list[Drawing | None]:
        """Return the codes so far, None for rows whose size is not known yet."""
        return [None if row.bucket is None else row.drawing() for row in self.rows]


@torch.no_grad()
def prefill(
    model: Decodable, embeddings: Tensor, lengths: Tensor | None = None, *, room: int
) -> State:
    """Read right-padded prompts [B, T, D] of `lengths` [B] into a new cache.

    room: positions that may follow: words, mask queries and the picture (`picture_room`).
    """
    batch, num = embeddings.shape[:2]
    cache = KVCache(model.trunk.config, batch, num + room, embeddings.dtype, embeddings.device)
    state = State(cache, embeddings.new_zeros(batch, embeddings.shape[2]))
    append(model, state, embeddings, lengths)
    return state


@torch.no_grad()
def append(
    model: Decodable, state: State, embeddings: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Append embeddings [B, N, D] or [N, D] (the mask queries) in one pass; return their states.

    lengths: [B] valid positions; rows of length 0 stay where they are.
    """
    if embeddings.ndim == 2:
        embeddings = embeddings.expand(state.hidden.shape[0], -1, -1)
    hidden = model.trunk(embeddings, lengths=lengths, cache=state.cache)
    if lengths is None:
        state.hidden = hidden[:, -1]
        return hidden
    last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
    moved = hidden.gather(1, last)[:, 0]
    state.hidden = torch.where((lengths > 0)[:, None], moved, state.hidden.to(moved.dtype))
    return hidden


def append_tokens(
    model: Decodable,
    state: State,
    rows: Sequence[Sequence[tuple[int, Cell]]],
    following: Sequence[Cell] | None = None,
) -> None:
    """Append tokens with their cells; rows may be of different lengths, empty ones included.

    following: for each row, the cell of the token that will be written next.
    """
    longest = max(len(row) for row in rows)
    if not longest:
        return
    ends = following or [NOWHERE] * len(rows)
    ids = [[token for token, _ in row] + [0] * (longest - len(row)) for row in rows]
    cells = [
        [*(cell for _, cell in row), end, *[NOWHERE] * (longest - len(row))]
        for row, end in zip(rows, ends, strict=True)
    ]
    device = state.hidden.device
    grid = torch.tensor(cells, device=device)
    embeddings = model.embed_tokens(torch.tensor(ids, device=device), grid[:, :-1], grid[:, 1:])
    lengths = torch.tensor([len(row) for row in rows], device=device)
    repeat = state.hidden.shape[0] // len(rows)  # both branches of guidance read the same tokens
    append(model, state, embeddings.repeat(repeat, 1, 1), lengths.repeat(repeat))


@torch.no_grad()
def decode_text(
    model: Decodable,
    state: State,
    vocabulary: Vocabulary,
    *,
    stop: Sequence[int],
    sampling: Sampling = GREEDY,
    max_tokens: int = 64,
    seeds: Sequence[int] | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> list[Words]:
    """Write words until a `stop` id ([SEG], <|im_end|>); visual and structural ids cannot appear.

    The stop id is read into the cache as well. A row that reaches `max_tokens` gets `stop[0]`, so
    that masks can follow in any case. `callback(row, id)` sees every token as it is written.
    `seeds` default to 0 in every row.
    """
    batch, device = state.hidden.shape[0], state.hidden.device
    if not stop:
        raise GenerationError("at least one stop id expected, got none; see Vocabulary.seg_id")
    seed = _seeds(seeds, batch, device)
    text = range(vocabulary.text_size)
    ids = torch.tensor([*text, *(i for i in stop if i not in text)], device=device)
    banned = torch.tensor(sorted(vocabulary.special_ids.difference(stop)), device=device)
    written: list[list[int]] = [[] for _ in range(batch)]
    stops: list[int | None] = [None] * batch
    cut: set[int] = set()
    for step in range(max_tokens + 1):
        running = [row for row, found in enumerate(stops) if found is None]
        if not running:
            break
        if step < max_tokens:
            logits = _text_logits(model, state.hidden, ids, vocabulary.text_size)
            logits = logits.index_fill(1, banned, -torch.inf)
            steps = torch.full_like(seed, step)
            picked = choose(logits, ids, sampling, [0] * batch, seed, steps).tolist()
        else:
            picked = [stop[0]] * batch
            cut.update(running)
        for row in running:
            if picked[row] in stop:
                stops[row] = picked[row]
            else:
                written[row].append(picked[row])
            if callback is not None:
                callback(row, picked[row])
        live = set(running)
        append_tokens(
            model, state, [[(picked[row], NOWHERE)] * (row in live) for row in range(batch)]
        )
    return [
        Words(ids=said, text=vocabulary.decode(said), stop=found, ended=row not in cut)
        for row, (said, found) in enumerate(zip(written, stops, strict=True))
        if found is not None
    ]


def picture_room(bucket: Bucket) -> int:
    """Return the positions that a picture takes: tags, block and <|im_end|>."""
    return bucket.block_length + 3


@torch.no_grad()
def decode_picture(
    model: Decodable,
    state: State,
    vocabulary: Vocabulary,
    buckets: Sequence[Bucket | None],
    *,
    sampling: Sampling,
    unconditional: State | None = None,
    seeds: Sequence[int] | None = None,
    keep: Sequence[Keep | None] | None = None,
    choices: Sequence[Bucket] = BUCKETS,
    callback: Callable[[Progress], None] | None = None,
) -> list[Drawing]:
    """Write one picture per row, from its resolution tags on; uses the state up.

    buckets: the size of each row, or None to let the model choose among `choices`.
    unconditional: with guidance, where the other branch stands; both run as one batch.
    seeds: one per row, default 0; the result of a row depends on nothing else of its batch.
    keep: cells to copy instead of writing them (`focus.grammar.keep_outside`).
    callback: sees the progress after every step; what it raises ends the decoding.

    Raises:
        GenerationError: guidance without an unconditional state, or uneven numbers of rows.
    """
    batch = state.hidden.shape[0]
    kept = keep or [None] * batch
    if len(buckets) != batch or len(kept) != batch:
        raise GenerationError(
            f"{batch} buckets and keeps expected, got {len(buckets)} and {len(kept)}"
        )
    seed = _seeds(seeds, batch, state.hidden.device)
    if sampling.guidance != 1:
        state = pair(state, unconditional)
    rows = [
        RowGrammar(vocabulary, bucket, buckets=choices, keep=cells)
        for bucket, cells in zip(buckets, kept, strict=True)
    ]
    fed = [row.take_forced() for row in rows]
    while not all(row.done for row in rows):
        append_tokens(model, state, fed, [row.cell for row in rows])
        picked = _pick(model, state, rows, sampling, seed)
        fed = []
        for row, token in zip(rows, picked, strict=True):
            fed.append([])
            if not row.done:
                cell = row.cell
                row.push(token)
                fed[-1] = [(token, cell), *row.take_forced()]
        if callback is not None:
            callback(Progress(rows=rows))
    return [row.drawing() for row in rows]


def _pick(
    model: Decodable, state: State, rows: Sequence[RowGrammar], sampling: Sampling, seed: Tensor
) -> list[int]:
    """Draw the next token of every unfinished row; only the rows of the head in use are read."""
    found = [None if row.done else row.next() for row in rows]
    free = [choice for choice in found if isinstance(choice, Choice)]
    span = slice(min(c.ids.start for c in free), max(c.ids.stop for c in free))
    logits = model.logits(state.hidden, span)
    if sampling.guidance != 1:
        logits = guide(logits[: len(rows)], logits[len(rows) :], sampling.guidance)
    per_row = [choice if isinstance(choice, Choice) else free[0] for choice in found]
    if any(choice.only or choice.ids != span for choice in per_row):
        logits = logits.masked_fill(_forbidden(per_row, span, logits.device), -torch.inf)
    ids = torch.arange(span.start, span.stop, device=logits.device)
    levels = [c.level if c.level >= 0 else None for c in per_row]
    steps = torch.tensor([PICTURE_STEP + row.step for row in rows], device=seed.device)
    picked: list[int] = choose(logits, ids, sampling, levels, seed, steps).tolist()
    return picked


def _forbidden(choices: Sequence[Choice], span: slice, device: torch.device) -> Tensor:
    """Return [B, V] bool: ids of the span that a row may not write."""
    forbidden = torch.ones(len(choices), span.stop - span.start, dtype=torch.bool)
    for row, choice in zip(forbidden, choices, strict=True):
        if choice.only:
            row[torch.tensor(choice.only) - span.start] = False
        else:
            row[choice.ids.start - span.start : choice.ids.stop - span.start] = False
    return forbidden.to(device)


def pair(state: State, unconditional: State | None) -> State:
    """Join both branches of guidance into one batch; raises `GenerationError` without the other."""
    if unconditional is None or unconditional.hidden.shape != state.hidden.shape:
        got = "none" if unconditional is None else f"{unconditional.hidden.shape[0]} rows"
        raise GenerationError(
            f"guidance needs an unconditional state of {state.hidden.shape[0]} rows, got {got}; "
            "prefill Prompt.unconditional() or set guidance=1"
        )
    return State.join([state, unconditional])


def _text_logits(model: Decodable, hidden: Tensor, ids: Tensor, text_size: int) -> Tensor:
    """Logits over the text and the stop ids beyond it: [B, V]."""
    parts = [model.logits(hidden, slice(0, text_size))]
    parts += [model.logits(hidden, slice(i, i + 1)) for i in ids[text_size:].tolist()]
    return torch.cat(parts, -1)


def _seeds(seeds: Sequence[int] | None, batch: int, device: torch.device) -> Tensor:
    if seeds is not None and len(seeds) != batch:
        raise GenerationError(f"{batch} seeds expected, got {len(seeds)}")
    values = [0] * batch if seeds is None else [seed % (1 << 63) for seed in seeds]
    return torch.tensor(values, dtype=torch.int64, device=device)
