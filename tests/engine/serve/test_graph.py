"""What surrounds a CUDA graph, with capture replaced by a plain call of the captured function."""

import copy

import numpy as np
import pytest
import torch

from engine.serve import graph
from engine.serve.decode import Decoder
from engine.serve.graph import GraphTrunk
from engine.serve.scheduler import Scheduler
from engine.serve.trunk import FusedTrunk
from focus.llm import KVCache
from tests.engine.serve.small import BUCKET, DRAW, edits, read, small


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A graph replays into the same output buffer, from the same input buffers."""
    made: list[torch.Tensor] = []

    def capture(function):
        for _ in range(3):
            function()
        output = function().clone()
        made.append(output)
        return output, lambda: output.copy_(function())

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "can_capture", lambda cache: True)
    return made


def test_steps_are_replayed_and_longer_chunks_are_not(captures: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    focus = small()
    config = focus.config.llm
    plain, trunk = focus.model.trunk, GraphTrunk(FusedTrunk(focus.model.trunk))
    caches = [KVCache(config, 3, 30, whole=True) for _ in range(2)]
    readings = [(5, (5, 3, 4)), (1, None), (2, (2, 1, 0)), (6, None), (1, (1, 0, 1)), (2, None)]
    for num, lengths in readings:
        embeddings = torch.randn(3, num, config.dim)
        valid = None if lengths is None else torch.tensor(lengths)
        expected = plain(embeddings, lengths=valid, cache=caches[0])
        found = trunk(embeddings, lengths=valid, cache=caches[1])
        for row in range(3):
            read = num if lengths is None else lengths[row]
            torch.testing.assert_close(
                found[row, :read], expected[row, :read], rtol=1e-4, atol=1e-4
            )
        assert torch.equal(caches[0].lengths, caches[1].lengths)
    assert len(captures) == 2  # for one token per row and for two
    view = caches[1].view(slice(0, 2))
    trunk(torch.randn(2, 1, config.dim), cache=view)
    assert len(captures) == 3  # and for another number of rows
    trunk.release()
    trunk(torch.randn(2, 1, config.dim), cache=view)
    assert len(captures) == 4


def test_a_scheduler_draws_through_graphs(captures: list[torch.Tensor]) -> None:
    focus = small()
    trunk = GraphTrunk(FusedTrunk(focus.model.trunk))
    scheduler = Scheduler(focus.model, focus.vocabulary, slots=2, trunk=trunk)
    scheduler.cache.whole = True
    try:
        state = read(focus, edits(1))
        (found,) = scheduler.picture(state, [BUCKET], sampling=DRAW, seeds=[4])
    finally:
        scheduler.close()
    alone = Decoder(focus.model, focus.vocabulary)
    (expected,) = alone.picture(read(focus, edits(1)), [BUCKET], sampling=DRAW, seeds=[4])
    assert np.array_equal(found.pixel, expected.pixel)
    assert captures


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_states() -> None:
    focus = small()
    trunk = FusedTrunk(copy.deepcopy(focus.model.trunk).cuda())
    caches = [KVCache(focus.config.llm, 2, 30, device="cuda", whole=True) for _ in range(2)]
    replayed = GraphTrunk(trunk)
    torch.manual_seed(0)
    for num in (4, 1, 1, 3, 1):
        embeddings = torch.randn(2, num, focus.config.llm.dim, device="cuda")
        expected = trunk(embeddings, cache=caches[0])
        torch.testing.assert_close(replayed(embeddings, cache=caches[1]), expected)
