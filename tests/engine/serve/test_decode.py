"""The engine writes what `focus.generate` writes: words, pictures, copies, guesses."""

import dataclasses

import numpy as np
import pytest
import torch

from engine.serve.decode import Decoder
from engine.serve.plan import make_plan
from focus.generate import GenerationError, Progress, decode_picture, decode_text
from focus.grammar import Drawing, keep_outside
from focus.sampling import GREEDY, Sampling
from tests.engine.serve.small import (
    BUCKET,
    DRAW,
    GUIDED,
    edits,
    num_positions,
    read,
    small,
    unconditional,
)

WORDS = Sampling(temperature=1.1, top_k=(40, None), top_p=0.9)
SEEDS = [5, 6, 7]


def decoder(speculate: int = 1) -> Decoder:
    focus = small()
    return Decoder(focus.model, focus.vocabulary, speculate=speculate)


def is_same(first: Drawing, second: Drawing) -> bool:
    return np.array_equal(first.semantic, second.semantic) and np.array_equal(
        first.pixel, second.pixel
    )


def source(seed: int) -> Drawing:
    rng = np.random.default_rng(seed)
    semantic, pixel = (rng.integers(0, 200, grid) for grid in BUCKET.grids)
    return Drawing(bucket=BUCKET, semantic=semantic, pixel=pixel)


def test_prompts_of_the_tests_stand_at_different_positions() -> None:
    assert len(set(num_positions(small(), edits(3)))) > 1


@pytest.mark.parametrize("sampling", [GREEDY, WORDS])
def test_words_are_those_of_the_plain_loop(sampling: Sampling) -> None:
    focus = small()
    stop = [focus.vocabulary.seg_id, focus.vocabulary.eos_id]
    expected_state, state = read(focus, edits(3)), read(focus, edits(3))
    expected = decode_text(
        focus.model,
        expected_state,
        focus.vocabulary,
        stop=stop,
        sampling=sampling,
        max_tokens=7,
        seeds=SEEDS,
    )
    seen: list[tuple[int, int]] = []
    words = decoder().text(
        state,
        stop=stop,
        sampling=sampling,
        max_tokens=7,
        seeds=SEEDS,
        callback=lambda row, token: seen.append((row, token)),
    )
    assert words == expected
    assert len({tuple(said.ids) for said in words}) > 1
    for row, said in enumerate(words):
        assert [token for r, token in seen if r == row] == [*said.ids, said.stop]
    torch.testing.assert_close(state.hidden, expected_state.hidden, rtol=1e-4, atol=1e-4)
    assert torch.equal(state.cache.lengths, expected_state.cache.lengths)


@pytest.mark.parametrize("speculate", [1, 5])
@pytest.mark.parametrize("sampling", [GREEDY, DRAW, GUIDED])
def test_pictures_are_those_of_the_plain_loop(sampling: Sampling, speculate: int) -> None:
    focus = small()

    def arguments() -> dict:
        other = unconditional(focus, edits(3)) if sampling.guidance != 1 else None
        return {"sampling": sampling, "unconditional": other, "seeds": SEEDS}

    expected = decode_picture(
        focus.model, read(focus, edits(3)), focus.vocabulary, [BUCKET] * 3, **arguments()
    )
    found = decoder(speculate).picture(read(focus, edits(3)), [BUCKET] * 3, **arguments())
    assert all(is_same(a, b) for a, b in zip(expected, found, strict=True))
    assert len(np.unique(found[0].pixel)) > 4
    # alone, each row is what it is in the batch
    alone = decoder(speculate).picture(
        read(focus, edits(3)[1:2]),
        [BUCKET],
        sampling=sampling,
        unconditional=unconditional(focus, edits(3)[1:2]) if sampling.guidance != 1 else None,
        seeds=SEEDS[1:2],
    )
    assert is_same(alone[0], expected[1])


@pytest.mark.parametrize("speculate", [1, 4])
def test_rows_with_different_plans_share_a_batch(speculate: int) -> None:
    """Kept cells make runs of forced tokens of different lengths; one row copies everything."""
    focus = small()
    edit = torch.zeros(64, 64, dtype=torch.bool)
    edit[10:30, 20:50] = True
    keep = [keep_outside(edit, source(1)), None, keep_outside(torch.zeros_like(edit), source(2))]
    options = {"sampling": DRAW, "seeds": SEEDS, "keep": keep}
    expected = decode_picture(
        focus.model, read(focus, edits(3)), focus.vocabulary, [BUCKET] * 3, **options
    )
    found = decoder(speculate).picture(read(focus, edits(3)), [BUCKET] * 3, **options)
    assert all(is_same(a, b) for a, b in zip(expected, found, strict=True))
    assert is_same(found[2], source(2))
    assert keep[0] is not None
    kept = keep[0].keep_pixel
    assert np.array_equal(found[0].pixel[kept], source(1).pixel[kept])
    assert not np.array_equal(found[0].pixel[~kept], source(1).pixel[~kept])


def test_good_guesses_save_passes_and_bad_ones_change_nothing() -> None:
    focus = small()
    request = edits(1)
    (plain,) = decoder().picture(read(focus, request), [BUCKET], sampling=DRAW, seeds=[9])
    fast, num = decoder(speculate=8), BUCKET.num_visual
    passes: dict[str, int] = {}
    for name, draft in (("right", plain), ("wrong", source(3)), ("none", None)):
        state = read(focus, request)
        calls = count_calls(fast)
        (found,) = fast.picture(state, [BUCKET], sampling=DRAW, seeds=[9], drafts=[draft])
        passes[name] = calls()
        assert is_same(found, plain)
    assert passes["right"] == num // 8  # of one picture all 8 guesses hold every time
    assert passes["right"] < passes["none"] <= num
    assert passes["right"] < passes["wrong"] <= num


def count_calls(decoder: Decoder):
    calls = []
    handle = decoder.model.trunk.register_forward_hook(lambda *_: calls.append(1))

    def stop() -> int:
        handle.remove()
        return len(calls)

    return stop


def test_forced_tokens_cost_no_pass_of_their_own() -> None:
    """One pass for what leads to the first cell, one for every cell but the last."""
    focus = small()
    state, engine = read(focus, edits(1)), decoder()
    calls = count_calls(engine)
    engine.picture(state, [BUCKET], sampling=GREEDY)
    assert calls() == BUCKET.num_visual


def test_a_model_may_choose_the_size_of_its_picture() -> None:
    focus = small()
    options = {"sampling": DRAW, "seeds": [1], "choices": [BUCKET]}
    state = [read(focus, edits(1)) for _ in range(2)]
    expected = decode_picture(focus.model, state[0], focus.vocabulary, [None], **options)
    assert is_same(decoder().picture(state[1], [None], **options)[0], expected[0])


@pytest.mark.parametrize("speculate", [1, 6])
def test_progress_streams_and_can_stop(speculate: int) -> None:
    fractions: list[float] = []

    def watch(progress: Progress) -> None:
        fractions.append(progress.fraction)
        if progress.fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder(speculate).picture(read(small(), edits(1)), [BUCKET], sampling=DRAW, callback=watch)
    assert fractions == sorted(fractions)
    assert len(fractions) > 3


def test_a_plan_lists_what_is_forced() -> None:
    plan = make_plan(small().vocabulary, BUCKET)
    assert len(plan.tokens) == BUCKET.block_length + 3
    assert len(plan.free) == BUCKET.num_visual
    assert plan.levels == (0,) * 16 + (1,) * 16
    assert plan.lead == slice(0, 4)
    assert plan.chunk(0) == slice(4, 5)
    assert plan.chunk(3) == slice(7, 9)  # the cell and the end of its line
    assert plan.chunk(31) == slice(0, 0)


def test_requests_that_contradict_themselves_are_refused() -> None:
    focus = small()
    state = read(focus, edits(2))
    guided = dataclasses.replace(DRAW, guidance=2.0)
    with pytest.raises(GenerationError, match="unconditional state of 2 rows, got none"):
        decoder().picture(state, [BUCKET] * 2, sampling=guided)
    with pytest.raises(GenerationError, match="2 buckets, keeps and drafts expected, got 1"):
        decoder().picture(state, [BUCKET], sampling=DRAW)
    with pytest.raises(GenerationError, match="2 seeds expected, got 1"):
        decoder().picture(state, [BUCKET] * 2, sampling=DRAW, seeds=[1])
    with pytest.raises(GenerationError, match="at least one stop id"):
        decoder().text(state, stop=[])
    with pytest.raises(GenerationError, match="speculate of at least 1"):
        decoder(speculate=0)
