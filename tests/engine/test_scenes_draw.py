"""Pixels of the built-in world against areas, depths and positions worked out by hand."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from engine.data.scene_draw import RING_HOLE, full_mask
from engine.data.scenes import (
    BACKGROUND_COLOURS,
    COLOURS,
    SHAPES,
    Background,
    DataError,
    Scene,
    SceneObject,
    random_scene,
    render,
    stream,
)

PLAIN = Background(kind="plain", first="beige", second="beige")
AREAS = {  # of a shape of radius 1
    "circle": math.pi * 0.95**2,
    "square": 1.68**2,
    "ring": math.pi * (1 - RING_HOLE**2),
    "diamond": 2 * 0.68,
    "cross": 2 * 1.9 * 0.6 - 0.6**2,
    "triangle": 3 * math.sqrt(3) * 0.55**2,
    "star": 5 * 0.45 * math.sin(math.pi / 5),
    # two half discs beyond the diagonals of a square, the square's lower half, to the scale 1.72
    "heart": 1.72**2 * (2 * math.pi / 16 + 0.5),
}


def item(shape: str, **changes: object) -> SceneObject:
    base = SceneObject(
        colour="red", shape=shape, size="large", x=0.5, y=0.5, radius=0.2, depth=0, tilt=0.1
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_cover_their_exact_area(shape: str) -> None:
    mask = full_mask(item(shape), (400, 400))
    assert mask.sum() / (0.2 * 400) ** 2 == pytest.approx(AREAS[shape], rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_are_the_object_inside_and_the_backdrop_outside(shape: str) -> None:
    image, instances = render(Scene(objects=(item(shape),), background=PLAIN), (96, 96))
    whole = {COLOURS["red"], BACKGROUND_COLOURS["beige"]}
    pure = np.array([tuple(p) in whole for p in image.reshape(-1, 3)]).mean()
    assert pure > 0.9  # all but the antialiased rim
    nearer_red = np.linalg.norm(image - np.array(COLOURS["red"], float), axis=-1)
    nearer_red = nearer_red < np.linalg.norm(
        image - np.array(BACKGROUND_COLOURS["beige"], float), axis=-1
    )
    assert (nearer_red == (instances == 1)).mean() > 0.995


def test_deeper_objects_are_covered() -> None:
    back, front = item("circle", depth=1), item("square", colour="blue", depth=2, radius=0.1)
    for objects in ((back, front), (front, back)):
        image, instances = render(Scene(objects=objects, background=PLAIN), (64, 64))
        assert tuple(image[32, 32]) == COLOURS["blue"]
        assert instances[32, 32] == objects.index(front) + 1


def test_the_same_scene_agrees_across_sizes() -> None:
    for index in range(12):
        scene = random_scene(stream("sizes", index), "train")
        fine, fine_map = render(scene, (256, 256))
        coarse, coarse_map = render(scene, (64, 64))
        averaged = fine.reshape(64, 4, 64, 4, 3).astype(float).mean((1, 3))
        assert np.abs(averaged - coarse).mean() < 2.0
        assert (fine_map[1::4, 1::4] == coarse_map).mean() > 0.96


def test_oblong_pictures_keep_shapes_round() -> None:
    _, instances = render(Scene(objects=(item("circle"),), background=PLAIN), (60, 120))
    rows, columns = np.nonzero(instances)
    assert np.ptp(rows) == np.ptp(columns)
    assert (rows.mean(), columns.mean()) == (29.5, 59.5)


def test_backdrops_are_faint_and_far_from_object_colours() -> None:
    muted = np.array(list(BACKGROUND_COLOURS.values()), float)
    vivid = np.array(list(COLOURS.values()), float)
    assert np.linalg.norm(vivid[:, None] - muted, axis=-1).min() > 75
    apart = np.linalg.norm(vivid[:, None] - vivid, axis=-1)[~np.eye(len(vivid), dtype=bool)]
    assert apart.min() > 80
    for kind in ("stripes", "checker", "noise"):
        back = Background(kind=kind, first="beige", second="beige", contrast=10.0, seed=3)
        image, _ = render(Scene(objects=(), background=back), (64, 64))
        change = np.abs(image.astype(float) - BACKGROUND_COLOURS["beige"])
        assert 2 < change.max() <= 11


def test_objects_stay_visible_and_inside() -> None:
    for index in range(60):
        scene = random_scene(stream("visible", index), "train")
        _, instances = render(scene, (96, 96))
        for i, each in enumerate(scene.objects):
            whole = full_mask(each, (96, 96))
            assert (instances == i + 1).sum() >= 0.65 * whole.sum()
            fine = full_mask(each, (240, 240)).sum()
            centred = full_mask(replace(each, x=0.5, y=0.5), (240, 240)).sum()
            assert abs(fine - centred) < 0.03 * centred  # nothing is cut off


def test_four_objects_take_at_most_four_milliseconds() -> None:
    scenes = [random_scene(stream("speed", i), "train", num=4) for i in range(20)]
    times = []
    for scene in scenes * 3:
        start = time.process_time()
        render(scene, (128, 128))
        times.append(time.process_time() - start)
    assert sorted(times)[len(times) // 4] < 0.004


def test_bad_requests_say_what_was_expected() -> None:
    scene = Scene(objects=(item("circle"),), background=PLAIN)
    with pytest.raises(DataError, match="sides of at least 8 pixels, got \\(4, 64\\)"):
        render(scene, (4, 64))
    with pytest.raises(DataError, match="expected a known shape, got 'blob'"):
        render(Scene(objects=(item("blob"),), background=PLAIN), (32, 32))
    with pytest.raises(DataError, match=r"expected a split of train, .*, got 'dev'"):
        random_scene(stream(1), "dev")
