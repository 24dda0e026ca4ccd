"""Sessions and what the engine remembers: the same answers, each picture read once."""

import numpy as np
import pytest
import torch

from engine.serve.engine import Engine
from engine.serve.prefix import Memory, Seen, key_of, row_of, stack, tensors
from engine.serve.session import Session
from focus import Box, Click
from focus.request import Request, RequestError
from tests.engine.serve.small import edits, picture, small


class Count:
    """Calls of the encoders, and positions that the trunk reads."""

    def __init__(self, engine: Engine) -> None:
        self.encoded = self.read = 0
        front, trunk = engine.model.front, engine.decoder.model.trunk
        self._hooks = [
            front.vanilla.register_forward_hook(self._encode),
            trunk.register_forward_hook(self._read),
        ]

    def _encode(self, module, inputs, output) -> None:
        self.encoded += len(output)

    def _read(self, module, inputs, output) -> None:
        self.read += output.shape[0] * output.shape[1]

    def __enter__(self) -> "Count":
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()


def same_edit(first, second) -> bool:
    return (
        first.text == second.text
        and np.array_equal(first.mask, second.mask)
        and np.array_equal(np.asarray(first.raw), np.asarray(second.raw))
    )


def test_requests_about_one_picture_agree_with_the_plain_model() -> None:
    plain, engine = small(), Engine(small())
    image = picture(4)
    with Count(engine) as count:
        assert same_edit(
            engine.edit(image, "remove the circle", seed=2),
            plain.edit(image, "remove the circle", seed=2),
        )
        encoded = count.encoded
        for region in (Click(10, 12), Box(4, 4, 30, 40)):
            expected = plain.edit(image, "make it blue", region, seed=3)
            before = count.encoded  # the plain model shares the encoder that is counted
            assert same_edit(engine.edit(image, "make it blue", region, seed=3), expected)
            assert count.encoded == before
    assert encoded > 0
    expected = plain.segment(image, "star, circle", task="class")
    found = engine.segment(image, "star, circle", task="class")
    assert found.names == expected.names
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert engine.chat(image, "how many?") == plain.chat(image, "how many?")


def test_the_second_request_reads_its_own_words_only() -> None:
    engine, image = Engine(small()), picture(5)
    with Count(engine) as count:
        engine.pipeline().open([edits(1)[0]])
        first = count.read
        engine.pipeline().open([edits(1)[0]])
        assert count.read == first + 1  # nothing new but the state of the last position
        engine.pipeline().open(
            [Request(task="editing", text="add a star", image=edits(1)[0].image)]
        )
        assert count.read - first < first / 2
        assert count.encoded == 1
        engine.pipeline().open([Request(task="editing", text="add a star", image=image)])
        assert count.encoded == 2


def test_a_batch_mixes_known_and_new_pictures() -> None:
    plain, engine = small(), Engine(small())
    engine.pipeline().open(edits(3)[1:2])
    with Count(engine) as count:
        session = engine.pipeline().open(edits(3))
        assert count.encoded == 2
    expected = plain.pipeline().open(edits(3))
    torch.testing.assert_close(session.state.hidden, expected.state.hidden, rtol=1e-4, atol=1e-4)
    for row, num in enumerate(expected.batch.lengths.tolist()):
        torch.testing.assert_close(
            session.hidden[row, :num], expected.hidden[row, :num], rtol=1e-4, atol=1e-4
        )
    assert torch.equal(session.state.cache.lengths, expected.state.cache.lengths)


def test_guided_edits_and_drafts_give_the_same_picture() -> None:
    import dataclasses

    focus = small()
    guided = dataclasses.replace(focus.settings.editing, guidance=1.5)
    settings = dataclasses.replace(focus.settings, editing=guided, keep_tokens=True)
    plain = type(focus)(focus.model, focus.vocabulary, settings)
    expected = plain.edit(picture(6), "remove the circle", seed=8)
    for speculate in (1, 6):
        engine = Engine(plain, speculate=speculate)
        for _ in range(2):
            assert same_edit(engine.edit(picture(6), "remove the circle", seed=8), expected)


def test_a_session_goes_from_edit_to_edit_and_back() -> None:
    session = Session(small()).open(picture(7))
    with Count(session.model) as count:
        result = session.edit("remove the circle", seed=1, apply=False)
        assert count.encoded == 0  # open() has read the picture
        assert session.history == 0
    edited = session.edit("remove the circle", seed=1)
    assert np.array_equal(session.image, np.asarray(edited.image))
    assert same_edit(edited, result)
    after = session.edit("add a star", Click(3, 3), seed=2)
    assert session.history == 2
    assert np.array_equal(session.undo(), np.asarray(edited.image))
    assert np.array_equal(session.undo(), picture(7))
    with pytest.raises(RequestError, match="got none; the picture is as opened"):
        session.undo()
    session.redo()
    assert np.array_equal(session.redo(), np.asarray(after.image))
    with pytest.raises(RequestError, match="taken back expected, got none"):
        session.redo()
    assert session.segment("the star").masks[0].shape == (48, 64)


def test_a_dialogue_is_read_as_a_whole_but_only_once() -> None:
    plain, session = small(), Session(small()).open(picture(8))
    first = session.chat("what is there?")
    assert first == plain.chat(picture(8), "what is there?")
    with Count(session.model) as count:
        second = session.chat("and how many?")
        read = count.read
    history = [("what is there?", first)]
    assert second == plain.chat(picture(8), "and how many?", history=history)
    fresh = Engine(small())
    with Count(fresh) as count:
        fresh.chat(picture(8), "and how many?", history=history)
        assert read < count.read / 2


def test_a_session_needs_a_picture() -> None:
    with pytest.raises(RequestError, match=r"call open\(image\) first"):
        Session(small()).segment("the star")


def test_memory_forgets_the_oldest_picture_first() -> None:
    focus = small()
    features = focus.pipeline().open(edits(3)).features
    assert features is not None
    seen = [Seen(features=row_of(features, row)) for row in range(3)]
    memory = Memory(max_bytes=2 * seen[0].num_bytes)
    keys = [key_of(picture(row)) for row in range(3)]
    memory.put(keys[0], seen[0])
    memory.put(keys[1], seen[1])
    assert memory.find(keys[0]) is seen[0]
    memory.put(keys[2], seen[2])
    assert len(memory) == 2
    assert memory.find(keys[1]) is None
    assert memory.find(keys[0]) is seen[0]
    assert (memory.hits, memory.misses) == (2, 1)
    joined = stack([entry.features for entry in seen])
    for whole, again in zip(tensors(features), tensors(joined), strict=True):
        assert torch.equal(whole, again)


def test_pictures_are_told_apart_by_size_and_pixels() -> None:
    image = picture(1)
    assert key_of(image) == key_of(image.copy())
    assert key_of(image) != key_of(image.reshape(64, 48, 3))
    assert key_of(image[:, ::-1]) != key_of(image)
    assert key_of(image[:, ::-1]) == key_of(np.ascontiguousarray(image[:, ::-1]))
