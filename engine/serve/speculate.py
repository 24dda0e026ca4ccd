"""Several tokens of a picture per pass of the trunk, with exactly the tokens of one at a time.

A token is the argmax of logits plus noise that depends on seed and position alone, so a guess can
be checked: a pass reads guesses of the next tokens together, and from its states every guess is
drawn again as if nothing had been guessed. Guesses count up to the first that differs, and that
one is replaced by what was drawn; its key and value, and those after it, are forgotten. Whatever
the guesses were, the picture is the same; good guesses make it cheaper. (Beyond the paper;
speculative decoding with shared noise.)

The guess of a cell is the source's code there (of an edit most cells stay), the code above or the
one on the left, whichever has been right most often in this picture.
"""

# b rows, m states that predict, P tokens of the picture, V ids

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.serve.job import Canvas, Chunk, advance, finish, start
from focus.generate import PICTURE_STEP, Progress
from focus.grammar import Drawing, RowGrammar
from focus.model import FocusModel
from focus.sampling import Sampling, choose, guide
from focus.vocabulary import Vocabulary


class SpeculativeJob:
    """Writes one picture per row, up to `width` tokens per pass; rows move at their own pace.

    drafts: a picture that resembles each row's, or None. `passes` counts calls of the trunk.
    """

    def __init__(
        self,
        model: FocusModel,
        vocabulary: Vocabulary,
        seeds: Tensor,
        canvases: Sequence[Canvas],
        *,
        sampling: Sampling,
        drafts: Sequence[Drawing | None],
        width: int,
        callback: Callable[[Progress], None] | None = None,
    ) -> None:
        self._model, self._seeds, self._sampling = model, seeds, sampling
        self._canvases, self._width, self._callback = list(canvases), width, callback
        self._vocabulary = vocabulary
        self._branches = 1 if sampling.guidance == 1 else 2
        self.rows = self._branches * len(canvases)
        self._guesses = [
            _Guesses(canvas, draft, vocabulary)
            for canvas, draft in zip(canvases, drafts, strict=True)
        ]
        self._picked: list[list[int]] = [[] for _ in canvases]
        self._counts = [1] * len(canvases)  # states of the last pass that predict, per row
        self._watched: list[RowGrammar] | None = None
        self.passes = 0
        self.done = not any(canvas.plan.free for canvas in canvases)

    @property
    def heads(self) -> Sequence[slice]:
        """The codes of the levels that a row may draw next."""
        levels = self._vocabulary.level_ids
        spans = []
        for row, canvas in enumerate(self._canvases):
            drawn = len(self._picked[row])
            spans += [levels[n] for n in canvas.plan.levels[drawn : drawn + self._counts[row]]]
        return (slice(min(s.start for s in spans), max(s.stop for s in spans)),)

    def begin(self) -> Chunk | None:
        """Read the tags, the tokens before the first free cell, and the first guesses."""
        if self.done:
            return None
        starts = [0] * len(self._canvases)
        return self._chunk(starts, back=None)

    def feed(self, logits: Tensor | None) -> Chunk | None:
        """Draw again what was guessed, keep the guesses that hold, guess on."""
        assert logits is not None
        drawn = self._draw(logits)
        back = [0] * len(self._canvases)
        starts = [0] * len(self._canvases)
        for row, canvas in enumerate(self._canvases):
            first, free = len(self._picked[row]), canvas.plan.free
            if first >= len(free):
                starts[row] = len(canvas.plan.tokens)
                continue
            read, guesses = self._end(row), self._guesses[row]
            guessed = guesses.tokens[first : first + self._counts[row]]  # as they were read
            for number in range(first, first + self._counts[row]):
                token = drawn[row][number - first]
                guesses.put(number, token)
                self._picked[row].append(token)
                starts[row] = free[number]
                if guessed[number - first] != token:
                    break
            # the last token drawn was not read, or read wrongly: forget from it on
            back[row] = max(0, read - starts[row])
        if self._callback is not None:
            self._watch(self._callback)
        self.done = all(
            len(picked) == len(canvas.plan.free)
            for picked, canvas in zip(self._picked, self._canvases, strict=True)
        )
        return None if self.done else self._chunk(starts, back)

    def drawings(self) -> list[Drawing]:
        """Return the finished pictures; the grammar checks every token of them."""
        return [
            finish(canvas.plan, self._vocabulary, picked)
            for canvas, picked in zip(self._canvases, self._picked, strict=True)
        ]

    def _end(self, row: int) -> int:
        """Position after the last token of a row that is in the cache."""
        plan = self._canvases[row].plan
        number = len(self._picked[row]) + self._counts[row] - 1  # free token that the pass predicts
        return plan.free[number]

    def _draw(self, logits: Tensor) -> list[list[int]]:
        num, width = len(self._canvases), logits.shape[1]
        (span,) = self.heads
        logits = logits.flatten(0, 1)
        if self._branches == 2:
            half = num * width
            logits = guide(logits[:half], logits[half:], self._sampling.guidance)
        steps, levels = [], []
        forbidden = torch.zeros(num * width, span.stop - span.start, dtype=torch.bool)
        for row, canvas in enumerate(self._canvases):
            for offset in range(width):
                number = len(self._picked[row]) + offset
                inside = offset < self._counts[row] and number < len(canvas.plan.free)
                level = canvas.plan.levels[number] if inside else None
                steps.append(PICTURE_STEP + (canvas.plan.free[number] if inside else 0))
                levels.append(level)
                if level is not None:
                    own = self._vocabulary.level_ids[level]
                    banned = forbidden[row * width + offset]
                    banned[: own.start - span.start] = True
                    banned[own.stop - span.start :] = True
        if bool(forbidden.any()):
            logits = logits.masked_fill(forbidden.to(logits.device), -torch.inf)
        device = logits.device
        ids = torch.arange(span.start, span.stop, device=device)
        seeds = self._seeds.repeat_interleave(width)
        at = torch.tensor(steps, device=device)
        found = choose(logits, ids, self._sampling, levels, seeds, at)
        return [[int(token) for token in row] for row in found.view(num, width).tolist()]

    def _chunk(self, starts: Sequence[int], back: Sequence[int] | None) -> Chunk:
        """Read each row from `starts` up to before its last guessable free token."""
        embedded, at, lengths = [], [], []
        for row, canvas in enumerate(self._canvases):
            free, drawn = canvas.plan.free, len(self._picked[row])
            self._counts[row] = max(1, min(self._width, len(free) - drawn))
            if drawn == len(free):
                embedded.append(canvas.forced[:0])
                at.append([0] * self._width)
                lengths.append(0)
                continue
            end = free[drawn + self._counts[row] - 1]
            self._guesses[row].guess(range(drawn, drawn + self._counts[row]))
            embedded.append(self._embed(row, slice(starts[row], end)))
            where = [free[drawn + n] - starts[row] - 1 for n in range(self._counts[row])]
            at.append(where + [where[-1]] * (self._width - len(where)))
            lengths.append(end - starts[row])
        device, repeat = self._seeds.device, self._branches
        width = max(self._counts)
        self.passes += 1
        valid = None
        if len(set(lengths)) > 1:
            valid = torch.tensor(lengths, device=device).repeat(repeat)
        return Chunk(
            embeddings=torch.nn.utils.rnn.pad_sequence(embedded, True).repeat(repeat, 1, 1),
            lengths=valid,
            at=torch.tensor(at, device=device)[:, :width].repeat(repeat, 1),
            back=[*back] * repeat if back is not None and any(back) else None,
        )

    def _embed(self, row: int, span: slice) -> Tensor:
        """Embed tokens, drawn and guessed ones among the forced."""
        canvas, guesses = self._canvases[row], self._guesses[row]
        numbers = list(guesses.between(span))
        embedded = canvas.forced[span]
        if numbers:
            tokens = torch.tensor([guesses.tokens[n] for n in numbers], device=embedded.device)
            where = torch.tensor([canvas.plan.free[n] for n in numbers], device=embedded.device)
            new = self._model.front.token_embedding(tokens)
            if canvas.offset is not None:
                new = new + canvas.offset[where]
            embedded = embedded.index_copy(0, where - span.start, new.to(embedded.dtype))
        return embedded

    def _watch(self, callback: Callable[[Progress], None]) -> None:
        if self._watched is None:
            self._watched = [start(c.plan, self._vocabulary) for c in self._canvases]
        for grammar, canvas, picked in zip(
            self._watched, self._canvases, self._picked, strict=True
        ):
            written = sum(position < grammar.step for position in canvas.plan.free)
            for token in picked[written:]:
                grammar.push(token)
                advance(grammar, canvas.plan)
        callback(Progress(rows=self._watched))


class _Guesses:
    """Drawn tokens of a row, and guesses where none is drawn yet, by number of the free token.

    A guess is the draft's code, the code above or the code on the left: whichever would have been
    right most often so far.
    """

    def __init__(self, canvas: Canvas, draft: Drawing | None, vocabulary: Vocabulary) -> None:
        plan = canvas.plan
        self._free = plan.free
        cells = [tuple(cell) for cell in plan.cells[list(plan.free)].tolist()]
        numbers = {cell: number for number, cell in enumerate(cells)}
        first = [ids.start for ids in vocabulary.level_ids]
        self.tokens = [first[level] for level, _, _ in cells]
        self._before: dict[str, list[int | None]] = {
            "above": [numbers.get((level, row - 1, column)) for level, row, column in cells],
            "left": [numbers.get((level, row, column - 1)) for level, row, column in cells],
        }
        self._draft: list[int] | None = None
        if draft is not None:
            codes = (draft.semantic, draft.pixel)
            self._draft = [first[n] + int(codes[n][row, column]) for n, row, column in cells]
        self._right = {"draft": 0, "above": 0, "left": 0}

    def between(self, span: slice) -> range:
        """Numbers of the free tokens in a span of positions."""
        inside = [n for n, position in enumerate(self._free) if span.start <= position < span.stop]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def put(self, number: int, token: int) -> None:
        """Set a drawn token."""
        for kind in self._right:
            self._right[kind] += self._suggest(kind, number) == token
        self.tokens[number] = token

    def guess(self, numbers: range) -> None:
        """Guess tokens anew, each from those before it."""
        kinds = sorted(self._right, key=lambda kind: -self._right[kind])
        for number in numbers:
            found = (self._suggest(kind, number) for kind in kinds)
            self.tokens[number] = next((t for t in found if t is not None), self.tokens[number])

    def _suggest(self, kind: str, number: int) -> int | None:
        if kind == "draft":
            return None if self._draft is None else self._draft[number]
        before = self._before[kind][number]
        return None if before is None else self.tokens[before]
