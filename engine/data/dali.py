"""Pictures by DALI, on the CPU or decoded by the GPU's nvJPEG, from one definition.

What DALI 2.4 does not do, and how we get round it: it cannot skip a broken picture (the pipeline
dies; we look for the culprit with PIL, open a new pipeline and decode the others again), it expands
palette pictures to colours (our maps are grey), a grey JPEG read with ANY_DATA ends the process (we
ask for RGB or GRAY), and a decoder with 16-bit output scales 8-bit levels by 257 (we divide).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from engine.data.guard import BadSample, check_picture
from engine.data.pil import WHITE, Copies, Levels, Work, check_box, copies
from engine.data.scene_model import DataError

GREY_SCALE = 257  # an 8-bit level in a 16-bit decode
INPUTS = ("picture", "map", "start", "end", "content", "vit", "pixel", "offset", "frame", "colour")


def dali_problem() -> str | None:
    """Return why DALI cannot be used here, None when it can."""
    if (
        importlib.util.find_spec("nvidia") is None
        or importlib.util.find_spec("nvidia.dali") is None
    ):
        return "nvidia.dali is not installed"
    try:
        importlib.import_module("nvidia.dali.fn")
    except (ImportError, OSError, RuntimeError) as error:
        return f"nvidia.dali does not import: {error}"
    return None


def build(batch: int, threads: int, device: int | None, colour: bool = True) -> Any:
    """Return the pipeline: bytes and a plan in; frame, ViT copy, pixel copy and map out.

    `colour` False leaves brightness and contrast out, which costs a pass over every pixel.
    """
    fn: Any = importlib.import_module("nvidia.dali.fn")
    types: Any = importlib.import_module("nvidia.dali.types")
    dali: Any = importlib.import_module("nvidia.dali")
    pipeline = dali.Pipeline(
        batch_size=batch, num_threads=threads, device_id=device, prefetch_queue_depth=1
    )
    decoder = "cpu" if device is None else "mixed"
    names = INPUTS if colour else INPUTS[:-1]
    with pipeline:
        given = {
            name: fn.external_source(
                name=name,
                dtype=(
                    types.UINT8
                    if name in ("picture", "map")
                    else types.INT32
                    if name in ("offset", "frame")
                    else types.FLOAT
                ),
                ndim=1,
            )
            for name in names
        }
        image = fn.decoders.image(given["picture"], device=decoder, output_type=types.RGB)
        if colour:
            image = fn.brightness_contrast(
                image, brightness=given["colour"][0], contrast=given["colour"][1]
            )
        window = {"roi_start": given["start"], "roi_end": given["end"]}
        smooth = {"interp_type": types.INTERP_CUBIC, "antialias": True, **window}
        levels = fn.decoders.image(
            given["map"], device="cpu", output_type=types.GRAY, dtype=types.UINT16
        )
        levels = fn.resize(
            levels, size=given["content"], interp_type=types.INTERP_NN, antialias=False, **window
        )
        placed = {"axes": [0, 1], "out_of_bounds_policy": "pad"}
        spot = given["offset"], given["frame"]
        frame = fn.resize(image, size=given["content"], **smooth)
        pipeline.set_outputs(
            fn.slice(frame, *spot, fill_values=WHITE, **placed),
            fn.resize(image, size=given["vit"], **smooth),
            fn.resize(image, size=given["pixel"], **smooth),
            fn.slice(levels, *spot, fill_values=0, **placed),
        )
    pipeline.build()
    return pipeline


class DaliDecoder:
    """Decodes lists of pictures; survives the ones that end a pipeline."""

    def __init__(self, threads: int = 2, device: int | None = None, batch: int = 64) -> None:
        problem = dali_problem()
        if problem is not None:
            raise DataError(f"DALI cannot be used: {problem}")
        self.threads = threads
        self.device = device
        self.batch = batch
        self.rebuilt = 0  # pipelines lost to pictures that the guard had let pass
        self._pipelines: dict[bool, Any] = {}

    def decode(self, works: Sequence[Work]) -> list[Copies | BadSample]:
        """See `Decoder`."""
        found: list[Copies | BadSample] = []
        for first in range(0, len(works), self.batch):
            found += self._decode(works[first : first + self.batch])
        return found

    def _decode(self, works: Sequence[Work]) -> list[Copies | BadSample]:
        refused = {n: error for n, work in enumerate(works) if (error := _check(work)) is not None}
        sound = [n for n in range(len(works)) if n not in refused]
        results: dict[int, Copies | BadSample] = dict(refused)
        if sound:
            try:
                done: Sequence[Copies | BadSample] = self._run([works[n] for n in sound])
            except RuntimeError as error:
                self._pipelines.clear()
                self.rebuilt += 1
                done = self._one_by_one([works[n] for n in sound], error)
            results.update(zip(sound, done, strict=True))
        return [results[n] for n in range(len(works))]

    def _one_by_one(self, works: Sequence[Work], cause: Exception) -> list[Copies | BadSample]:
        """Find the pictures that no decoder reads; decode the others again."""
        found: list[Copies | BadSample] = []
        for work in works:
            try:
                copies(work)
                found.extend(self._run([work]))
            except BadSample as error:
                found.append(error)
            except RuntimeError as error:
                self._pipelines.clear()
                found.append(BadSample("undecodable", f"DALI: {_last_line(error)}"))
        if not any(isinstance(one, BadSample) for one in found) and len(works) == 1:
            raise DataError(f"DALI fails on sound pictures: {_last_line(cause)}") from cause
        return found

    def _run(self, works: Sequence[Work]) -> list[Copies]:
        colour = any(w.view.brightness != 1 or w.view.contrast != 1 for w in works)
        if colour not in self._pipelines:
            self._pipelines[colour] = build(self.batch, self.threads, self.device, colour)
        pipeline = self._pipelines[colour]
        for name, values in zip(INPUTS, zip(*map(_feed, works), strict=True), strict=True):
            if colour or name != "colour":
                pipeline.feed_input(name, list(values))
        outputs = [_to_cpu(output) for output in pipeline.run()]
        return list(_collect(works, outputs))

    def close(self) -> None:
        """Drop the pipeline."""
        self._pipelines.clear()


def _check(work: Work) -> BadSample | None:
    try:
        header = work.header or check_picture(work.picture)
        check_box(work.view, (header.height, header.width))
        if work.map is not None:
            own = check_picture(work.map)
            if (own.height, own.width) != (header.height, header.width):
                told = f"a map of {header.height} x {header.width} expected, got {own}"
                return BadSample("wrong_size", told)
            with Pillow.open(io.BytesIO(work.map)) as opened:
                if opened.mode not in ("L", "I;16", "I"):
                    return BadSample("bad_mask", f"a grey map expected, got mode {opened.mode}")
    except BadSample as error:
        return error
    return None


def _blank() -> bytes:
    buffer = io.BytesIO()
    Pillow.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


_BLANK = np.frombuffer(_blank(), np.uint8)


def _feed(work: Work) -> tuple[npt.NDArray[Any], ...]:
    """One sample's inputs in the order of `INPUTS`; a mirrored box runs from right to left."""
    view = work.view
    top, left, bottom, right = view.box
    near, far = (right, left) if view.flip else (left, right)
    content = np.array(view.content, np.float32)
    return (
        np.frombuffer(work.picture, np.uint8),
        _BLANK if work.map is None else np.frombuffer(work.map, np.uint8),
        np.array([top, near], np.float32),
        np.array([bottom, far], np.float32),
        content,
        np.array(view.sizes.vit, np.float32),
        np.array(view.sizes.pixel, np.float32),
        -np.array(view.offset, np.int32),
        np.array(view.sizes.frame, np.int32),
        np.array([view.brightness, view.contrast], np.float32),
    )


def _to_cpu(output: Any) -> Any:
    return output.as_cpu() if hasattr(output, "as_cpu") else output


def _collect(works: Sequence[Work], outputs: Sequence[Any]) -> Iterator[Copies]:
    frames, vits, pixels, maps = outputs
    for number, work in enumerate(works):
        levels: Levels | None = None
        if work.map is not None:
            levels = np.array(maps.at(number)[..., 0])
            if work.map_bits == 8:
                levels //= GREY_SCALE
        yield Copies(
            frame=np.array(frames.at(number)),
            vit=np.array(vits.at(number)),
            pixel=np.array(pixels.at(number)),
            map=levels,
        )


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
