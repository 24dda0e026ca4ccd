"""Continuous batching: many threads, one trunk; everybody gets what he would get alone."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engine.serve.decode import Decoder
from engine.serve.engine import Engine
from engine.serve.scheduler import Busy, Scheduler
from focus.errors import ShapeError
from focus.generate import Progress
from tests.engine.serve.small import BUCKET, DRAW, edits, read, small


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    focus = small()
    made = Scheduler(focus.model, focus.vocabulary, slots=4)
    yield made
    made.close()


def test_threads_get_what_they_get_alone_and_share_passes() -> None:
    """Edits, guided pictures, masks and answers, more than there are rows."""
    plain, engine = small(), Engine(small(), slots=4)
    image = edits(1)[0].image
    assert image is not None
    wishes = [
        lambda model: model.edit(image, "remove the red circle", seed=1).raw,
        lambda model: model.generate("a red star", seed=2),
        lambda model: model.chat(image, "what is it?", seed=3),
        lambda model: model.segment(image, "the star").masks[0],
        lambda model: model.edit(image, "make the star blue", seed=4).raw,
        lambda model: model.generate("two blue squares", seed=5),
    ]
    try:
        with ThreadPoolExecutor(len(wishes)) as pool:
            found = list(pool.map(lambda wish: wish(engine), wishes))
        for wish, got in zip(wishes, found, strict=True):
            expected = wish(plain)
            if isinstance(expected, str):
                assert got == expected
            else:
                assert np.array_equal(np.asarray(got), np.asarray(expected))
        assert isinstance(engine.decoder, Scheduler)
        assert engine.decoder.rows_read > 1.5 * engine.decoder.steps
        assert engine.decoder.load == (0, 0)
    finally:
        engine.close()


def test_jobs_of_different_lengths_come_and_go(scheduler: Scheduler) -> None:
    """A later, shorter job leaves first; the rows behind it move down and go on."""
    focus = small()
    alone = Decoder(focus.model, focus.vocabulary)
    started, release = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        if progress.fraction > 0.3:
            started.set()
            release.wait(20)

    def draw(row: int, callback=None):
        state = read(focus, edits(4)[row : row + 1])
        return scheduler.picture(state, [BUCKET], sampling=DRAW, seeds=[row], callback=callback)[0]

    def talk(row: int):
        state = read(focus, edits(4)[row : row + 1])
        stop = [focus.vocabulary.seg_id]
        return scheduler.text(state, stop=stop, max_tokens=3 + row), state

    with ThreadPoolExecutor(4) as pool:
        words = [pool.submit(talk, row) for row in (0, 1)]
        pictures = [pool.submit(draw, 2, hold), pool.submit(draw, 3)]
        assert started.wait(30)
        release.set()
        for row, future in zip((2, 3), pictures, strict=True):
            state = read(focus, edits(4)[row : row + 1])
            (expected,) = alone.picture(state, [BUCKET], sampling=DRAW, seeds=[row])
            assert np.array_equal(future.result().pixel, expected.pixel)
        for row, said in zip((0, 1), words, strict=True):
            got, state = said.result()
            own = read(focus, edits(4)[row : row + 1])
            stop = [focus.vocabulary.seg_id]
            assert got == alone.text(own, stop=stop, max_tokens=3 + row)
            # the words are in the caller's own cache: what follows goes on from them
            assert state.cache.lengths.tolist() == own.cache.lengths.tolist()
            keys, expected_keys = (
                s.cache.read(0, 0, int(s.cache.lengths[0]))[0] for s in (state, own)
            )
            np.testing.assert_allclose(keys, expected_keys, rtol=1e-4, atol=1e-4)


def test_guesses_work_among_other_jobs() -> None:
    focus = small()
    scheduler = Scheduler(focus.model, focus.vocabulary, slots=3, speculate=4)
    alone = Decoder(focus.model, focus.vocabulary)

    def draw(decoder: Decoder, row: int):
        state = read(focus, edits(3)[row : row + 1])
        return decoder.picture(state, [BUCKET], sampling=DRAW, seeds=[row])[0]

    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda row: draw(scheduler, row), range(3)))
    finally:
        scheduler.close()
    for row, drawing in enumerate(found):
        assert np.array_equal(drawing.pixel, draw(alone, row).pixel)


def test_an_error_ends_its_own_job_only(scheduler: Scheduler) -> None:
    focus = small()

    def fail(progress: Progress) -> None:
        if progress.fraction > 0.2:
            raise RuntimeError("the page was closed")

    def draw(row: int, callback=None):
        state = read(focus, edits(2)[row : row + 1])
        return scheduler.picture(state, [BUCKET], sampling=DRAW, seeds=[row], callback=callback)[0]

    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.submit(draw, 0, fail), pool.submit(draw, 1)
        with pytest.raises(RuntimeError, match="the page was closed"):
            bad.result()
        state = read(focus, edits(2)[1:2])
        alone = Decoder(focus.model, focus.vocabulary)
        (expected,) = alone.picture(state, [BUCKET], sampling=DRAW, seeds=[1])
        assert np.array_equal(good.result().pixel, expected.pixel)


def test_a_full_or_closed_scheduler_says_so() -> None:
    focus = small()
    scheduler = Scheduler(focus.model, focus.vocabulary, slots=1, max_length=40, max_waiting=1)
    state = read(focus, edits(2))
    with pytest.raises(Busy, match="at most 1 rows at a time expected, got 2"):
        scheduler.text(state, stop=[1])
    with pytest.raises(ShapeError, match="prompts of at most 40 tokens"):
        scheduler.text(read(focus, edits(1)), stop=[1])
    scheduler.close()
    with pytest.raises(Busy, match="it is closed"):
        scheduler.text(read(focus, edits(1)), stop=[1])
