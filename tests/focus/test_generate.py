"""Decoding on the cache against plain full forwards of the sequences that training builds."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.batch import Source
from focus.buckets import Bucket
from focus.config import FocusConfig, LLMConfig
from focus.generate import (
    Decodable,
    GenerationError,
    Progress,
    State,
    append,
    decode_picture,
    decode_text,
    picture_room,
    prefill,
)
from focus.grammar import Drawing, Keep, keep_outside
from focus.llm import Qwen2Trunk
from focus.presets import focus_tiny
from focus.prompts import Prompt, build, training_texts
from focus.sampling import GREEDY, Sampling, guide
from focus.sequence import Sequence, collate
from focus.vocabulary import Vocabulary

NUM_SEMANTIC, NUM_PIXEL, NUM_QUERIES, DIM = 20, 30, 5, 32
SMALL = Bucket(size=(64, 128), vit_size=(28, 84), semantic_grid=(1, 3), pixel_grid=(2, 4))
SQUARE = Bucket(size=(64, 64), vit_size=(56, 56), semantic_grid=(2, 2), pixel_grid=(3, 3))
TALL = Bucket(size=(128, 64), vit_size=(84, 28), semantic_grid=(3, 1), pixel_grid=(4, 2))
CHOICES = (SMALL, SQUARE, TALL)
PROMPTS = [
    Prompt(task="generation", text="a red circle left of the star", image=False),
    Prompt(task="generation", text="star", image=False),
    Prompt(task="generation", text="the picture of a heart and of a star", image=False),
]
DRAW = Sampling(temperature=1.0, top_k=(15, 20), top_p=0.95)


class Toy(nn.Module):
    """Token table, positions of cells, a random trunk and a random head: `Decodable`, no more."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.dim)
        self.cells = nn.Parameter(torch.randn(2, 3, 70, config.dim) * 0.5)
        self.queries = nn.Parameter(torch.randn(NUM_QUERIES, config.dim))
        self.trunk = Qwen2Trunk(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.6)

    def embed_tokens(self, input_ids: Tensor, grid: Tensor, next_grid: Tensor) -> Tensor:
        embedded: Tensor = self.table(input_ids)
        for which, cell in enumerate((grid, next_grid)):
            for axis in range(3):
                part = self.cells[which, axis][cell[..., axis].clamp(min=0)]
                embedded = embedded + part * (cell[..., :1] >= 0)
        return embedded

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        return F.linear(hidden, self.head.weight if ids is None else self.head.weight[ids])

    def embed(self, sequence: Sequence) -> Tensor:
        """The embeddings of a training sequence [1, T, D]."""
        row = collate([sequence])
        grid = row["grid"].long()
        embedded = self.embed_tokens(
            row["input_ids"], grid, F.pad(grid[:, 1:], (0, 0, 0, 1), value=-1)
        )
        queries = row["source"] == Source.MASK_QUERY
        if queries.any():
            embedded[queries] = self.queries
        return embedded


@dataclasses.dataclass(frozen=True)
class Setting:
    model: Toy
    vocabulary: Vocabulary
    config: FocusConfig

    def read(self, prompts: list[Prompt], until: str = "answer", room: int = 120) -> State:
        """Prefill prompts as one padded batch."""
        rows = [build(p, self.vocabulary, self.config, until=until) for p in prompts]
        embedded = [self.model.embed(row)[0] for row in rows]
        batch = nn.utils.rnn.pad_sequence(embedded, batch_first=True, padding_value=9.0)
        lengths = torch.tensor([len(row) for row in rows])
        return prefill(self.model, batch, lengths, room=room)

    def logits(self, prompt: Prompt, drawing: Drawing) -> tuple[Tensor, Sequence]:
        """All next-token logits [T, V] of the whole training sequence, without a cache."""
        codes = (drawing.semantic, drawing.pixel)
        row = build(prompt, self.vocabulary, self.config, bucket_out=drawing.bucket, codes=codes)
        return self.model.logits(self.model.trunk(self.model.embed(row)))[0], row


@pytest.fixture(scope="module")
def setting() -> Setting:
    vocabulary = Vocabulary.train(training_texts(), 330, NUM_SEMANTIC, NUM_PIXEL)
    tiny = focus_tiny()
    llm = dataclasses.replace(
        tiny.llm,
        num_layers=2,
        dim=DIM,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        vocab_size=vocabulary.size + 5,
    )
    segment = dataclasses.replace(tiny.segment, num_queries=NUM_QUERIES)
    torch.manual_seed(1)
    model = Toy(llm).requires_grad_(False)
    return Setting(model, vocabulary, dataclasses.replace(tiny, llm=llm, segment=segment))


def is_same(first: Drawing, second: Drawing) -> bool:
    return (
        first.bucket == second.bucket
        and np.array_equal(first.semantic, second.semantic)
        and np.array_equal(first.pixel, second.pixel)
    )


def test_toy_is_decodable(setting):
    model: Decodable = setting.model
    assert model.trunk.config.dim == DIM


def test_greedy_picture_is_the_argmax_of_the_training_sequence(setting):
    buckets = [SMALL, SQUARE, TALL]
    drawings = decode_picture(
        setting.model, setting.read(PROMPTS), setting.vocabulary, buckets, sampling=GREEDY
    )
    for prompt, drawing, bucket in zip(PROMPTS, drawings, buckets, strict=True):
        assert drawing.bucket == bucket
        logits, row = setting.logits(prompt, drawing)
        found = np.flatnonzero(row.grid[:, 0] >= 0)
        assert len(found) == bucket.num_visual
        for position in found:
            ids = setting.vocabulary.level_ids[row.grid[position, 0]]
            best = int(logits[position - 1, ids].argmax()) + ids.start
            assert row.input_ids[position] == best
        assert len(np.unique(drawing.pixel)) > 2  # the toy does not repeat itself


def test_guided_picture_follows_the_formula(setting):
    prompt, other = PROMPTS[0], PROMPTS[0].unconditional()
    sampling = Sampling(temperature=0.0, guidance=2.5)
    (guided,) = decode_picture(
        setting.model,
        setting.read([prompt]),
        setting.vocabulary,
        [SQUARE],
        sampling=sampling,
        unconditional=setting.read([other], room=100),
    )
    (plain,) = decode_picture(
        setting.model, setting.read([prompt]), setting.vocabulary, [SQUARE], sampling=GREEDY
    )
    given, row = setting.logits(prompt, guided)
    free, _ = setting.logits(other, guided)
    logits = guide(given[-len(free) :], free, 2.5)[: len(free)]
    for back in np.flatnonzero(row.grid[:, 0] >= 0) - len(row):
        ids = setting.vocabulary.level_ids[row.grid[back, 0]]
        assert row.input_ids[back] == int(logits[back - 1, ids].argmax()) + ids.start
    assert not is_same(guided, plain)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_batch_gives_what_its_rows_give_one_by_one(setting, guidance):
    sampling = dataclasses.replace(DRAW, guidance=guidance)
    others = [p.unconditional() for p in PROMPTS]
    # fixed sizes and one that the model chooses
    buckets, seeds = [TALL, None, SQUARE], [11, 12, 13]

    def decode(rows: list[int]) -> list[Drawing]:
        return decode_picture(
            setting.model,
            setting.read([PROMPTS[i] for i in rows]),
            setting.vocabulary,
            [buckets[i] for i in rows],
            sampling=sampling,
            unconditional=setting.read([others[i] for i in rows]) if guidance != 1 else None,
            seeds=[seeds[i] for i in rows],
            choices=CHOICES,
        )

    together = decode([0, 1, 2])
    alone = [decode([row])[0] for row in (0, 1, 2)]
    shuffled = decode([2, 0])
    for row in range(3):
        assert is_same(together[row], alone[row])
    assert is_same(shuffled[0], together[2])
    assert is_same(shuffled[1], together[0])


def test_seeds_repeat_and_differ(setting):
    def decode(seeds: list[int]) -> list[Drawing]:
        state = setting.read(PROMPTS[:1]).select([0] * len(seeds))
        return decode_picture(
            setting.model,
            state,
            setting.vocabulary,
            [SQUARE] * len(seeds),
            sampling=DRAW,
            seeds=seeds,
        )

    first = decode([4, 5, 4, 6])
    assert is_same(first[0], first[2])
    assert not is_same(first[0], first[1])
    assert not is_same(first[1], first[3])
    assert is_same(decode([6])[0], first[3])


def test_words_then_masks_then_picture_run_on_one_cache(setting):
    """The whole edit: what the cache holds at the end is the training sequence."""
    model, vocabulary = setting.model, setting.vocabulary
    prompt = Prompt(task="editing", text="make it green")
    start = build(prompt, vocabulary, setting.config, until="answer")
    state = prefill(model, model.embed(start), room=150)
    (words,) = decode_text(model, state, vocabulary, stop=[vocabulary.seg_id], max_tokens=6)
    states = append(model, state, model.queries)
    (drawing,) = decode_picture(model, state, vocabulary, [SQUARE], sampling=GREEDY)
    assert len(words.ids) > 1

    codes = (drawing.semantic, drawing.pixel)
    full = build(prompt, vocabulary, setting.config, bucket_out=SQUARE, codes=codes)
    full = insert_words(full, len(start), words.ids)
    hidden = model.trunk(model.embed(full))
    where = torch.from_numpy(full.source == Source.MASK_QUERY)
    torch.testing.assert_close(states[0], hidden[0, where], rtol=0, atol=1e-5)
    logits = model.logits(hidden)[0]
    written = np.flatnonzero((full.grid[:, 0] >= 0) & (full.source == Source.TOKEN))
    assert len(written) == SQUARE.num_visual
    for position in written:
        ids = vocabulary.level_ids[full.grid[position, 0]]
        assert full.input_ids[position] == int(logits[position - 1, ids].argmax()) + ids.start


def insert_words(sequence: Sequence, at: int, ids: list[int]) -> Sequence:
    """Put plain tokens into a sequence."""
    fillers = {"input_ids": ids, "labels": -100, "source": 0, "grid": -1, "condition": -1}
    arrays = {
        name: np.insert(getattr(sequence, name), [at] * len(ids), filler, axis=0)
        for name, filler in fillers.items()
    }
    return dataclasses.replace(sequence, **arrays)


def test_words_are_the_greedy_continuation_of_a_full_recompute(setting):
    model, vocabulary = setting.model, setting.vocabulary
    stop = [vocabulary.seg_id, vocabulary.eos_id]
    state = setting.read(PROMPTS)
    together = decode_text(model, state, vocabulary, stop=stop, max_tokens=12)
    allowed = torch.full((setting.config.llm.vocab_size,), -torch.inf)
    allowed[: vocabulary.text_size] = 0
    allowed[sorted(vocabulary.special_ids - set(stop))] = -torch.inf
    allowed[vocabulary.seg_id] = 0
    for row, (prompt, words) in enumerate(zip(PROMPTS, together, strict=True)):
        embedded = model.embed(build(prompt, vocabulary, setting.config, until="answer"))
        said: list[int] = []
        while len(said) < 12:
            token = int((model.logits(model.trunk(embedded)[:, -1])[0] + allowed).argmax())
            nowhere = torch.full((1, 1, 3), -1)
            new = model.embed_tokens(torch.tensor([[token]]), nowhere, nowhere)
            embedded = torch.cat([embedded, new], 1)
            if token in stop:
                break
            said.append(token)
        assert words.ids == said
        assert words.ended == (len(said) < 12)
        assert words.stop in stop
        # the stop id is in the cache: the row goes on behind it
        if words.ended:
            expected = model.trunk(embedded)[0, -1]
            torch.testing.assert_close(state.hidden[row], expected, rtol=0, atol=1e-5)


def test_sampled_words_do_not_depend_on_the_batch(setting):
    model, vocabulary = setting.model, setting.vocabulary
    sampling = Sampling(temperature=1.2, top_k=(40, None), top_p=0.9)

    def decode(rows: list[int]) -> list[list[int]]:
        words = decode_text(
            model,
            setting.read([PROMPTS[i] for i in rows]),
            vocabulary,
            stop=[vocabulary.seg_id],
            sampling=sampling,
            max_tokens=10,
            seeds=[50 + i for i in rows],
        )
        return [w.ids for w in words]

    together = decode([0, 1, 2])
    assert [decode([row])[0] for row in range(3)] == together
    assert len({tuple(ids) for ids in together}) == 3


def test_words_hold_text_only_and_end_in_the_first_stop(setting):
    """A head that loves structural and visual ids must not get its way."""
    model, vocabulary = setting.model, setting.vocabulary
    weight = model.head.weight.clone()
    try:
        model.head.weight[vocabulary.text_size : vocabulary.seg_id] *= 50
        model.head.weight[vocabulary.im_start] *= 50
        model.head.weight[vocabulary.seg_id] = 0
        seen: list[tuple[int, int]] = []
        words = decode_text(
            model,
            setting.read(PROMPTS),
            vocabulary,
            stop=[vocabulary.seg_id],
            max_tokens=5,
            callback=lambda row, token: seen.append((row, token)),
        )
    finally:
        model.head.weight.copy_(weight)
    for row, found in enumerate(words):
        assert len(found.ids) <= 5
        assert max(found.ids) < vocabulary.text_size
        assert not set(found.ids) & vocabulary.special_ids
        assert found.stop == vocabulary.seg_id
        assert [t for r, t in seen if r == row] == [*found.ids, vocabulary.seg_id]
    assert any(not found.ended for found in words)


def test_kept_cells_are_copied_and_read(setting):
    vocabulary = setting.vocabulary
    rng = np.random.default_rng(0)
    source = Drawing(
        bucket=SQUARE,
        semantic=rng.integers(0, NUM_SEMANTIC, (2, 2)),
        pixel=rng.integers(0, NUM_PIXEL, (3, 3)),
    )
    edit = torch.zeros(6, 6, dtype=torch.bool)
    edit[:2, :2] = True
    keep = keep_outside(edit, source)
    (drawn,) = decode_picture(
        setting.model, setting.read(PROMPTS[:1]), vocabulary, [SQUARE], sampling=GREEDY, keep=[keep]
    )
    np.testing.assert_array_equal(drawn.pixel[keep.keep_pixel], source.pixel[keep.keep_pixel])
    assert (~keep.keep_pixel).sum() == 1
    logits, row = setting.logits(PROMPTS[0], drawn)
    for level, row_, column in ((0, 0, 0), (1, 0, 0)):
        where = np.flatnonzero((row.grid == (level, row_, column)).all(1))[0]
        ids = vocabulary.level_ids[level]
        assert row.input_ids[where] == int(logits[where - 1, ids].argmax()) + ids.start
    everything = Keep(
        semantic=source.semantic,
        pixel=source.pixel,
        keep_semantic=np.ones((2, 2), bool),
        keep_pixel=np.ones((3, 3), bool),
    )
    (copy,) = decode_picture(
        setting.model,
        setting.read(PROMPTS[:1]),
        vocabulary,
        [SQUARE],
        sampling=GREEDY,
        keep=[everything],
    )
    assert is_same(copy, source)


def test_progress_streams_codes_and_can_stop_the_decoding(setting):
    fractions: list[float] = []
    counts: list[int] = []

    def watch(progress: Progress) -> None:
        fractions.append(progress.fraction)
        drawing = progress.drawings()[0]
        assert drawing is not None
        counts.append(int((drawing.semantic >= 0).sum() + (drawing.pixel >= 0).sum()))

    def run(callback):
        return decode_picture(
            setting.model,
            setting.read(PROMPTS[:1]),
            setting.vocabulary,
            [SQUARE],
            sampling=DRAW,
            callback=callback,
        )

    run(watch)
    assert counts == list(range(1, SQUARE.num_visual + 1))
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0

    def cancel(progress: Progress) -> None:
        if progress.fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cancel)


def test_picture_fits_the_room_that_is_named(setting):
    state = setting.read(PROMPTS[1:2], room=picture_room(SQUARE))
    decode_picture(setting.model, state, setting.vocabulary, [SQUARE], sampling=GREEDY)


def test_requests_that_contradict_themselves_are_refused(setting):
    model, vocabulary = setting.model, setting.vocabulary
    state = setting.read(PROMPTS)
    with pytest.raises(GenerationError, match="unconditional state of 3 rows, got none"):
        decode_picture(model, state, vocabulary, [SQUARE] * 3, sampling=Sampling(guidance=2.0))
    with pytest.raises(GenerationError, match="got 1 rows"):
        decode_picture(
            model,
            state,
            vocabulary,
            [SQUARE] * 3,
            sampling=Sampling(guidance=2.0),
            unconditional=setting.read(PROMPTS[:1]),
        )
    with pytest.raises(GenerationError, match="3 buckets and keeps expected, got 2 and 3"):
        decode_picture(model, state, vocabulary, [SQUARE] * 2, sampling=GREEDY)
    with pytest.raises(GenerationError, match="3 seeds expected, got 1"):
        decode_picture(model, state, vocabulary, [SQUARE] * 3, sampling=GREEDY, seeds=[1])
    with pytest.raises(GenerationError, match="at least one stop id"):
        decode_text(model, state, vocabulary, stop=[])
