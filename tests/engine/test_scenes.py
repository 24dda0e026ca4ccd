"""Samples of every task: deterministic, split apart, and true of the picture."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.records import TASKS, Record
from engine.data.scenes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SPLITS,
    DataError,
    clip,
    draft,
    requested,
    sample,
    texts,
    write_samples,
)

SIZE = (64, 64)
DIGEST = """
import hashlib, sys
from tests.engine.test_scenes import digest
print(digest())
"""


def digest() -> str:
    """Hash of everything in a few samples of all tasks."""
    total = hashlib.sha256()
    for task in TASKS:
        for index in range(3):
            r = sample(task, "val", 5, index, SIZE)
            total.update(repr((r.id, r.text, r.answer, r.classes, r.labels, r.kind)).encode())
            for picture in (r.image, r.target, *r.masks, *r.regions):
                total.update(b"-" if picture is None else picture.tobytes())
    return total.hexdigest()


def test_samples_are_the_same_in_another_process() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", DIGEST], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == digest(), done.stderr


def test_split_seed_and_index_give_other_scenes() -> None:
    keys = [(s, seed, i) for s in SPLITS for seed in (0, 1) for i in (0, 1)]
    drawn = {str(draft("generation", *key)[0].scene) for key in keys}
    assert len(drawn) == len(keys)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test_unseen"])
def test_records_keep_the_schema(task: str, split: str) -> None:
    for index in range(25):
        check_record(sample(task, split, 0, index, SIZE))  # type: ignore[arg-type]


def check_record(r: Record) -> None:
    segments = r.task in ("class", "referring", "reasoning", "interactive", "editing")
    assert (r.image is None) == (r.task == "generation")
    assert (r.target is None) == (r.task not in ("generation", "editing"))
    assert len(r.masks) == len(r.labels) and len(r.regions) == len(r.region_kinds)
    assert r.kind and bool(r.text) == (r.task not in ("class", "interactive"))
    assert bool(r.answer) == (r.task != "generation")
    assert bool(r.classes) == (r.task == "class")
    assert r.text.count("<region>") == (len(r.regions) if r.task == "editing" else 0)
    for mask in (*r.masks, *r.regions):
        assert mask.shape == SIZE and mask.dtype == np.bool_ and mask.any()
    if r.task in ("referring", "reasoning", "editing"):
        assert r.labels == (0,)
    if r.task == "interactive":
        assert r.labels == tuple(range(len(r.regions))) and set(r.region_kinds) == {r.kind}
    if segments and r.task not in ("class", "editing"):
        assert len(r.answer.split(", ")) <= len(r.masks)
    if r.task == "class":
        assert 3 <= len(r.classes) <= 8 and len(set(r.classes)) == len(r.classes)
        named = [r.classes[k] for k in dict.fromkeys(r.labels)]
        assert r.answer == (", ".join(named) or "nothing")


def test_held_out_pairs_never_occur_in_train_val_or_test() -> None:
    pairs = [f"{colour} {shape}" for colour, shape in HELD_OUT]
    for split in ("train", "val", "test"):
        for line in texts(split, 3, 210):
            assert not any(pair in line for pair in pairs), line
        for number in range(140):
            plan, _ = draft(TASKS[number % 7], split, 3, number)
            shown = (*plan.scene.objects, *(plan.after.objects if plan.after else ()))
            assert not {o.pair for o in shown} & HELD_OUT
        for index in range(10):
            assert not {o.pair for o in clip(split, 0, index, 2, 32).scenes[0].objects} & HELD_OUT


def test_held_out_pairs_leave_every_colour_and_shape_to_training() -> None:
    assert {c for c, _ in HELD_OUT} == set(COLOURS) and {s for _, s in HELD_OUT} == set(SHAPES)
    assert len(HELD_OUT) == 8 and len(COLOURS) * len(SHAPES) == 64


def test_unseen_samples_ask_about_held_out_pairs() -> None:
    for task in TASKS:
        for index in range(40):
            plan, _ = draft(task, "test_unseen", 0, index)
            pairs = [o.pair for o in plan.scene.objects]
            if task in ("class", "generation") or plan.kind in ("background", "describe"):
                assert set(pairs) <= HELD_OUT
            elif task == "vqa":
                assert set(pairs) & HELD_OUT and not plan.kind.startswith("background")
            else:
                asked = [i for i, _ in plan.targets] or [plan.changed]
                assert all(pairs[i] in HELD_OUT for i in asked if i is not None)


def test_class_masks_are_every_instance_of_the_listed_names() -> None:
    for index in range(40):
        plan, _ = draft("class", "val", 1, index)
        r = sample("class", "val", 1, index, SIZE)
        expected = [
            (i, k)
            for k, name in enumerate(r.classes)
            for i, o in enumerate(plan.scene.objects)
            if name in (o.shape, f"{o.colour} {o.shape}")
        ]
        assert list(plan.targets) == expected
        for mask, (i, _) in zip(r.masks, expected, strict=True):
            assert r.image is not None
            middle = np.median(r.image[mask], axis=0)
            assert np.abs(middle - COLOURS[plan.scene.objects[i].colour]).max() < 3


def test_edits_change_their_mask_and_nothing_else() -> None:
    kinds = set()
    for index in range(50):
        r = sample("editing", "train", 2, index, SIZE)
        assert r.image is not None and r.target is not None
        kinds.add(r.kind)
        change = np.abs(r.image.astype(int) - r.target).max(-1)
        grown = np.pad(r.masks[0], 1)
        near = np.zeros(SIZE, bool)
        for dy in (0, 1, 2):
            for dx in (0, 1, 2):
                near |= grown[dy : dy + SIZE[0], dx : dx + SIZE[1]]
        fringe = change[~near]  # a sharp tip may cover less than half of two pixels in a row
        assert (fringe > 0).sum() <= 4 and fringe.max(initial=0) < 128
        assert (change[r.masks[0]] > 0).mean() > (0.2 if r.kind == "replace" else 0.9)
    assert kinds == {"remove", "replace", "recolour", "move", "background"}


def test_edit_results_are_what_the_words_say() -> None:
    for index in range(120):
        plan, _ = draft("editing", "val", 4, index)
        assert plan.after is not None
        before, after, i = plan.scene.objects, plan.after.objects, plan.changed
        if i is None:
            assert plan.after.background.first in plan.text
            assert plan.after.background.kind == "plain" and after == before
        elif plan.kind == "remove":
            assert after == before[:i] + before[i + 1 :]
        else:
            old, new = before[i], after[i]
            assert after[:i] + after[i + 1 :] == before[:i] + before[i + 1 :]
            if plan.kind == "recolour":
                assert new.colour in plan.text and new.shape == old.shape
            elif plan.kind == "replace":
                words = f"{new.colour} {new.shape}"
                same = f"{new.shape} of the same colour"
                assert (same if new.colour == old.colour else words) in plan.text
            else:
                assert new.pair == old.pair and (new.x, new.y) != (old.x, old.y)


def test_generation_records_tell_what_they_request() -> None:
    for index in range(20):
        r = sample("generation", "test", 9, index, SIZE)
        wanted = requested(r.id)
        assert 1 <= len(wanted) <= 4
        for each in wanted:
            assert f"{each.size} {each.colour} {each.shape}" in r.text
            assert r.target is not None
            x, y = int(each.x * 64), int(each.y * 64)
            around = r.target[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8].reshape(-1, 3)
            gaps = np.abs(around.astype(int) - COLOURS[each.colour]).max(-1)
            assert gaps.min() < 3


def test_requested_refuses_other_records() -> None:
    for name in ("test-0-vqa-3", "photo.png", "test-0-generation-x"):
        with pytest.raises(DataError, match="expected an id like 'test-0-generation-7'"):
            requested(name)
    with pytest.raises(DataError, match=r"expected a task of class, .*, got 'paint'"):
        sample("paint", "train", 0, 0)  # type: ignore[arg-type]


def test_texts_are_plain_words_of_a_small_language() -> None:
    lines = list(texts("train", 0, 490))
    assert len(lines) == 490 and len(set(lines)) > 450
    words = {w for line in lines for w in re.findall(r"[a-z]+", line.lower())}
    assert not any("region" in line or "  " in line for line in lines)
    assert 250 < len(words) < 600


def test_sheets_hold_the_truth(tmp_path: Path) -> None:
    written = write_samples(tmp_path, num=2, seed=3, size=48)
    assert {p.name for p in written} == {*(f"{t}.png" for t in TASKS), "clip.png", "samples.json"}
    report = json.loads((tmp_path / "samples.json").read_text())
    assert len(report["samples"]) == 2 * len(TASKS) + 1
    first = sample("class", "val", 3, 0, (48, 48))
    assert report["samples"][0]["answer"] == first.answer
    assert report["samples"][0]["mask_pixels"] == [int(m.sum()) for m in first.masks]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in written)
