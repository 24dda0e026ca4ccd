import numpy as np
import pytest
import torch

from focus.buckets import BUCKETS, Bucket, bucket_of
from focus.grammar import (
    Choice,
    Drawing,
    GrammarError,
    Keep,
    RowGrammar,
    keep_outside,
    parse,
)
from focus.presets import focus_3b, focus_tiny
from focus.prompts import Prompt, build, prompt_only, training_texts
from focus.vocabulary import Vocabulary

NUM_SEMANTIC, NUM_PIXEL = 50, 70
SIZES = pytest.mark.parametrize("bucket", BUCKETS, ids=lambda b: f"{b.size[0]}x{b.size[1]}")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.train(training_texts(), 300, NUM_SEMANTIC, NUM_PIXEL)


def random_drawing(bucket: Bucket, seed: int = 0) -> Drawing:
    rng = np.random.default_rng(seed)
    return Drawing(
        bucket=bucket,
        semantic=rng.integers(0, NUM_SEMANTIC, bucket.semantic_grid),
        pixel=rng.integers(0, NUM_PIXEL, bucket.pixel_grid),
    )


def written(drawing: Drawing, vocabulary: Vocabulary) -> list[int]:
    """The picture's tokens as training writes them, <|im_end|> included."""
    prompt = Prompt(task="generation", text="a", image=False)
    codes = (drawing.semantic, drawing.pixel)
    full = build(prompt, vocabulary, focus_3b(), bucket_out=drawing.bucket, codes=codes)
    return full.input_ids[len(prompt_only(prompt, vocabulary, focus_3b())) :].tolist()


@SIZES
def test_random_choices_give_a_block_that_parses(vocabulary, bucket):
    rng = np.random.default_rng(bucket.size[0])
    row = RowGrammar(vocabulary)
    while not row.done:
        choice = row.next()
        if isinstance(choice, int):
            row.push(choice)
        elif choice.only:
            index = row.step
            tags = (vocabulary.height_id(bucket.size[0]), vocabulary.width_id(bucket.size[1]))
            row.push(tags[index])
        else:
            row.push(int(rng.integers(choice.ids.start, choice.ids.stop)))
    assert row.bucket == bucket
    assert row.total == row.step == bucket.block_length + 3
    drawing = parse(row.tokens, vocabulary)
    assert drawing.bucket == bucket
    assert written(drawing, vocabulary) == row.tokens
    assert drawing.semantic.min() >= 0
    np.testing.assert_array_equal(drawing.pixel, row.drawing().pixel)


@SIZES
def test_parse_reads_what_training_writes(vocabulary, bucket):
    drawing = random_drawing(bucket)
    tokens = written(drawing, vocabulary)
    for ids in (tokens, tokens[:-1]):  # with and without <|im_end|>
        found = parse(ids, vocabulary)
        np.testing.assert_array_equal(found.semantic, drawing.semantic)
        np.testing.assert_array_equal(found.pixel, drawing.pixel)


def test_forced_runs_and_cells_are_those_of_training(vocabulary):
    drawing = random_drawing(BUCKETS[2])
    prompt = Prompt(task="generation", text="a", image=False)
    full = build(prompt, vocabulary, focus_3b(), bucket_out=drawing.bucket)
    cells = [tuple(c) for c in full.grid[-(drawing.bucket.block_length + 3) :].tolist()]
    tokens = written(drawing, vocabulary)
    row = RowGrammar(vocabulary, drawing.bucket)
    fed: list[tuple[int, tuple[int, int, int]]] = row.take_forced()
    assert len(fed) == 4  # two tags, start of image, start of level 0
    num_free = 0
    while not row.done:
        choice = row.next()
        assert isinstance(choice, Choice)
        num_free += 1
        fed.append((tokens[row.step], row.cell))
        row.push(tokens[row.step])
        fed += row.take_forced()
    assert num_free == drawing.bucket.num_visual
    assert [token for token, _ in fed] == tokens
    assert [cell for _, cell in fed] == cells


def test_free_tags_allow_only_sizes_that_exist(vocabulary):
    row = RowGrammar(vocabulary)
    heights = row.next()
    assert isinstance(heights, Choice)
    assert heights.only == tuple(
        vocabulary.height_id(h) for h in sorted({b.size[0] for b in BUCKETS})
    )
    row.push(vocabulary.height_id(384))
    widths = row.next()
    assert isinstance(widths, Choice)
    assert widths.only == tuple(vocabulary.width_id(w) for w in (512, 576, 768))
    assert not widths.allows(vocabulary.width_id(640))
    single = RowGrammar(vocabulary)
    single.push(vocabulary.height_id(960))
    assert single.next() == vocabulary.width_id(320)
    own = bucket_of(focus_tiny())
    only = RowGrammar(vocabulary, buckets=(own,))
    assert [token for token, _ in only.take_forced()][:2] == [
        vocabulary.height_id(64),
        vocabulary.width_id(64),
    ]
    assert only.bucket == own


def test_illegal_tokens_are_refused_with_place_and_expectation(vocabulary):
    tokens = written(random_drawing(BUCKETS[0]), vocabulary)
    wrong = [*tokens[:4], vocabulary.pixel(3), *tokens[5:]]
    with pytest.raises(
        GrammarError, match=r"token 4: a level 0 code expected, got <\|image_level1"
    ):
        parse(wrong, vocabulary)
    with pytest.raises(GrammarError, match="token 13: <end_of_line> expected"):
        parse([*tokens[:13], tokens[12], *tokens[13:]], vocabulary)
    with pytest.raises(GrammarError, match=r"token 1: one of <width_256> <width_1024> expected"):
        parse([tokens[0], vocabulary.width_id(512)], vocabulary)
    with pytest.raises(GrammarError, match=r"370 tokens up to <end_of_image> expected, got 100"):
        parse(tokens[:100], vocabulary)
    with pytest.raises(GrammarError, match="complete; nothing can follow"):
        parse([*tokens, tokens[-1]], vocabulary)
    with pytest.raises(GrammarError, match="not known yet"):
        RowGrammar(vocabulary).drawing()


def test_keep_outside_frees_only_touched_cells(vocabulary):
    source = random_drawing(BUCKETS[0])
    edit = torch.zeros(128, 128, dtype=torch.bool)
    edit[40, 100] = True  # pixel cell 16 / 128 * (40, 100) = (5, 12)
    keep = keep_outside(edit, source)
    assert np.argwhere(~keep.keep_pixel).tolist() == [[5, 12]]
    # 9 does not divide 128: cells overlap by a pixel, but one cell holds this one
    assert np.argwhere(~keep.keep_semantic).tolist() == [[2, 7]]
    wider = keep_outside(edit, source, margin=1)
    assert (~wider.keep_pixel).sum() == 9
    row = RowGrammar(vocabulary, source.bucket, keep=keep)
    num_free = 0
    row.take_forced()
    while not row.done:
        choice = row.next()
        assert isinstance(choice, Choice)
        row.push(choice.ids.start)
        num_free += 1
        row.take_forced()
    assert num_free == 2
    drawn = row.drawing()
    expected = source.pixel.copy()
    expected[5, 12] = 0
    np.testing.assert_array_equal(drawn.pixel, expected)
    assert parse(row.tokens, vocabulary).semantic[2, 7] == 0


def test_keep_that_does_not_fit_is_refused(vocabulary):
    small, large = random_drawing(BUCKETS[0]), random_drawing(BUCKETS[1])
    keep = keep_outside(torch.zeros(9, 9, dtype=torch.bool), small)
    with pytest.raises(GrammarError, match=r"level 0 of keep: arrays \(18, 18\) expected"):
        RowGrammar(vocabulary, large.bucket, keep=keep)
    with pytest.raises(GrammarError, match="keep needs a bucket"):
        RowGrammar(vocabulary, keep=keep)
    foreign = Keep(
        semantic=small.semantic + NUM_SEMANTIC,
        pixel=small.pixel,
        keep_semantic=keep.keep_semantic,
        keep_pixel=keep.keep_pixel,
    )
    with pytest.raises(GrammarError, match="level 0 of keep: no such code"):
        RowGrammar(vocabulary, small.bucket, keep=foreign)
