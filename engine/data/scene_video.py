"""Short clips: objects that drift, bounce off the edges and pass in front of one another."""

# T frames, N objects, H, W picture

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.data.records import Image, Mask
from engine.data.scene_draw import Instances, render
from engine.data.scene_expression import askable, refer
from engine.data.scene_model import DataError, Scene, check_split, choose, random_scene, stream
from engine.data.scene_tasks import as_size
from engine.data.scene_text import name, say

SPEED = (0.015, 0.05)  # of the picture's side, per frame


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip and its truth.

    frames, instances: uint8 [H, W, 3] and int32 [H, W] (i + 1 = object i, in every frame) each.
    scenes: the scene of every frame. tracks: float32 [T, N, 2], centres (x, y) in [0, 1].
    text: an expression that means object `target` in every frame; answer: its name.
    """

    id: str
    frames: tuple[Image, ...]
    instances: tuple[Instances, ...]
    scenes: tuple[Scene, ...]
    tracks: npt.NDArray[np.float32]
    text: str
    answer: str
    target: int

    def masks(self, index: int | None = None) -> tuple[Mask, ...]:
        """Mask of one object (default: the target) in every frame; empty where it is hidden."""
        number = (self.target if index is None else index) + 1
        return tuple(np.asarray(frame == number) for frame in self.instances)


def _drift(rng: np.random.Generator, scene: Scene, frames: int) -> npt.NDArray[np.float64]:
    """Tracks [T, N, 2] at constant speed, mirrored at the edges.

    x(t) = low + |((x0 - low + v t) mod 2 w) folded to [0, w]|,  w = high - low
    """
    start = np.array([(o.x, o.y) for o in scene.objects])
    low = 1.1 * np.array([o.radius for o in scene.objects])[:, None]
    width = 1 - 2 * low
    angle = rng.uniform(0, 2 * np.pi, len(start))
    pace = rng.uniform(*SPEED, len(start))
    velocity = (pace * (np.cos(angle), np.sin(angle))).T
    way = (start - low + velocity * np.arange(frames)[:, None, None]) % (2 * width)
    return np.asarray(low + np.minimum(way, 2 * width - way))


def _apart(scene: Scene, tracks: npt.NDArray[np.float64]) -> bool:
    """Whether objects of one colour never touch, so that no two melt into one."""
    for i, a in enumerate(scene.objects):
        for j, b in enumerate(scene.objects[:i]):
            gap = np.hypot(*(tracks[:, i] - tracks[:, j]).T).min()
            if a.colour == b.colour and gap < 1.1 * (a.radius + b.radius):
                return False
    return True


def clip(
    split: str,
    seed: int,
    index: int,
    frames: int = 8,
    size: int | tuple[int, int] = (128, 128),
) -> Clip:
    """Clip number `index` of a split: a pure function of its arguments.

    The target is of a held-out pair in `test_unseen` and never less than a third visible in the
    first frame; later it may pass behind others.

    Raises: DataError for an unknown split, fewer than one frame or sides under 8 pixels.
    """
    check_split(split)
    if frames < 1:
        raise DataError(f"expected at least one frame, got {frames}; ask for more")
    rng = stream("clip", split, seed, index)
    while True:
        scene = random_scene(rng, split, num=int(rng.integers(2, 6)), hosting=0.0)
        target = choose(rng, askable(rng, scene, split))
        query = refer(rng, scene, target, "attribute")
        tracks = _drift(rng, scene, frames)
        if query is not None and _apart(scene, tracks):
            break
    scenes = tuple(
        replace(
            scene,
            objects=tuple(
                replace(o, x=float(x), y=float(y))
                for o, (x, y) in zip(scene.objects, places, strict=True)
            ),
        )
        for places in tracks
    )
    drawn = [render(each, as_size(size)) for each in scenes]
    return Clip(
        id=f"{split}-{seed}-clip-{index}",
        frames=tuple(image for image, _ in drawn),
        instances=tuple(instances for _, instances in drawn),
        scenes=scenes,
        tracks=tracks.astype(np.float32),
        text=say(rng, query),
        answer=name(scene, target),
        target=target,
    )
