from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine.data.guard import DataError
from engine.data.manifest import Dataset
from engine.data.mixture import PERIOD, TABLE_5, Mixture, Part, shares, table_5
from engine.data.sampler import Stream, shuffle
from engine.data.schema import Item
from tests.engine.data.layouts import jpeg
from tests.engine.data.test_shards import write


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two datasets: 60 captioned pictures of three shapes, 25 dialogues."""
    root = tmp_path_factory.mktemp("sets")
    sizes = ((32, 32), (24, 32), (64, 32))
    pictures = [jpeg(n, size) for n, size in enumerate(sizes)]
    seen = [
        Item(key=f"p{n}", task="vqa", text="what?", answer=str(n), image=pictures[n % 3])
        for n in range(60)
    ]
    said = [
        Item(key=f"t{n}", task="text", turns=(("user", "hi"), ("assistant", str(n))))
        for n in range(25)
    ]
    write(root / "seen", seen)
    write(root / "said", said)
    return str(root / "seen"), str(root / "said")


def mixture(folders: tuple[str, str], seed: int = 0, size: int = 4) -> Mixture:
    parts = [
        Part(dataset=folders[0], task="vqa", weight=3, size=size),
        Part(dataset=folders[1], task="text", weight=1, size=2),
    ]
    return Mixture(parts, seed)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_shuffle_is_a_permutation_that_depends_on_its_seed(count: int) -> None:
    positions = np.arange(count)
    found = shuffle(positions, count, 5)
    assert sorted(found.tolist()) == positions.tolist()
    one_by_one = [int(shuffle(np.array([p]), count, 5)[0]) for p in range(min(count, 50))]
    assert one_by_one == found[:50].tolist()
    if count > 60:
        assert (found != shuffle(positions, count, 6)).mean() > 0.9
        assert abs(np.corrcoef(positions, found)[0, 1]) < 0.3


def test_an_epoch_holds_every_sample_once_in_batches_of_one_bucket() -> None:
    groups = {0: np.arange(0, 50), 4: np.arange(50, 73), 7: np.arange(73, 75)}
    stream = Stream(groups, 8, seed=1, last="keep")
    orders = []
    for epoch in range(3):
        slots = [stream.slot(epoch * stream.per_epoch + n) for n in range(stream.per_epoch)]
        numbers = [n for slot in slots for n in slot.numbers.tolist()]
        assert sorted(numbers) == list(range(75))
        assert all(set(s.numbers.tolist()) <= set(groups[s.bucket].tolist()) for s in slots)
        assert {slot.epoch for slot in slots} == {epoch}
        orders.append(numbers)
    assert orders[0] != orders[1] != orders[2]


def test_dropping_leaves_out_only_what_fills_no_batch() -> None:
    stream = Stream({0: np.arange(50), 1: np.arange(50, 73), 2: np.arange(73, 75)}, 8, 1)
    assert (stream.per_epoch, stream.left_out) == (8, 2 + 7 + 2)
    numbers = [n for p in range(8) for n in stream.slot(p).numbers.tolist()]
    assert len(set(numbers)) == 64
    with pytest.raises(DataError, match="the largest has 50"):
        Stream({0: np.arange(50)}, 51, 1)


def test_far_positions_cost_what_near_ones_do() -> None:
    """Resuming anywhere in a dataset of 20 million takes well under a second."""
    stream = Stream({0: np.arange(20_000_000, dtype=np.uint32)}, 32, seed=3)
    began = time.process_time()
    for position in (0, 10**6, 10**9, 10**12):
        assert len(set(stream.slot(position).numbers.tolist())) == 32
    assert time.process_time() - began < 0.5


def test_parts_come_in_exact_proportion(folders: tuple[str, str]) -> None:
    mixed = mixture(folders)
    picks = [mixed.pick(index) for index in range(PERIOD + 100)]
    assert Counter(pick.part for pick in picks[:PERIOD]) == {0: 750, 1: 250}
    first = Counter(pick.part for pick in picks[:100])
    assert 55 < first[0] < 92  # mixed within a period too
    for part in (0, 1):  # a part's own positions are 0, 1, 2, ...
        own = [pick.slot.position for pick in picks if pick.part == part]
        assert own == list(range(len(own)))


def test_any_order_of_asking_gives_the_same(folders: tuple[str, str]) -> None:
    mixed, again = mixture(folders), mixture(folders)
    for index in (1999, 3, 1000, 999, 0):
        a, b = mixed.pick(index), again.pick(index)
        assert a.slot.numbers.tolist() == b.slot.numbers.tolist()
    assert mixed.fingerprint == again.fingerprint != mixture(folders, seed=1).fingerprint


def test_resume_at_other_numbers_of_ranks_goes_on_exactly(folders: tuple[str, str]) -> None:
    """1 rank, then 2, then 4: together they see what one rank alone would have seen."""

    def numbers(picks: list[object]) -> list[list[int]]:
        return [pick.slot.numbers.tolist() for pick in picks]  # type: ignore[attr-defined]

    alone = mixture(folders, seed=9)
    expected = numbers([alone.pick(index) for index in range(8 + 16 + 32)])
    seen: list[list[int]] = []
    state = mixture(folders, seed=9).state()
    for ranks, steps in ((1, 8), (2, 8), (4, 8)):
        together: dict[int, list[int]] = {}
        for rank in range(ranks):
            own = mixture(folders, seed=9)
            own.load_state(json.loads(json.dumps(state)))
            for _, pick in zip(range(steps), own.picks(rank, ranks), strict=False):
                assert pick.index not in together
                together[pick.index] = pick.slot.numbers.tolist()
        seen += [together[index] for index in sorted(together)]
        own.advance(ranks * steps)
        state = own.state()
    assert seen == expected
    assert len(json.dumps(state)) < 200


def test_state_of_other_data_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    state = mixture(folders).state()
    with pytest.raises(DataError, match="shards, weights, sizes or seed"):
        mixture(folders, size=5).load_state(state)
    with pytest.raises(DataError, match="shards, weights, sizes or seed"):
        mixture(folders, seed=4).load_state(state)


def test_denied_samples_never_come(folders: tuple[str, str]) -> None:
    bad = Path(folders[1]) / "bad.json"
    try:
        bad.write_text(json.dumps({"00000": {"3": "truncated", "7": "empty"}}))
        dataset = Dataset(folders[1])
        assert len(dataset.groups("text")[-1]) == 23
        mixed = mixture(folders)
        seen = {
            n
            for index in range(200)
            if (pick := mixed.pick(index)).part == 1
            for n in pick.slot.numbers.tolist()
        }
        assert seen == set(range(25)) - {3, 7}
    finally:
        bad.unlink()


def test_shares_are_whole_and_exact() -> None:
    assert shares([3, 1]) == [750, 250]
    assert sum(shares([1, 1, 1])) == PERIOD
    with pytest.raises(DataError, match="1 in 1000"):
        shares([1, 100_000])


def test_table_5_weighs_what_exists(folders: tuple[str, str], tmp_path: Path) -> None:
    for stage, lines in TABLE_5.items():
        assert all(millions > 0 and names for millions, _, names in lines), stage
    root = tmp_path / "sets"
    root.mkdir()
    for name in ("magpie", "openorca"):
        (root / name).symlink_to(folders[1])
    parts = table_5("pretrain", root, {"text": 5})
    assert [(Path(p.dataset).name, p.task, p.weight, p.size) for p in parts] == [
        ("magpie", "text", 1.0, 5),
        ("openorca", "text", 1.0, 5),
    ]
    with pytest.raises(DataError, match="ultraedit"):
        table_5("pretrain", tmp_path / "none", {})


def test_unknown_tasks_and_ranks_are_refused(folders: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="a known task"):
        Mixture([Part(dataset=folders[0], task="dance", weight=1, size=1)])
    with pytest.raises(DataError, match="task editing"):
        Mixture([Part(dataset=folders[0], task="editing", weight=1, size=1)])
    with pytest.raises(DataError, match="a rank below 2"):
        next(mixture(folders).picks(2, 2))
