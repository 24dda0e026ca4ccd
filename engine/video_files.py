"""Clips on disk: video files (PyAV or imageio-ffmpeg, whichever is installed) and frame folders.

Neither package is needed for folders of pictures and for GIF files. Frames are uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from focus.folder import beside, fresh_folder
from focus.pictures import PictureError, read_frames, read_picture

Frame = npt.NDArray[np.uint8]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
DEFAULT_FPS = 8.0
MAX_FRAMES = 4096  # held in memory at once


class VideoError(ValueError):
    """A clip that cannot be read or written."""


@dataclass(frozen=True, kw_only=True)
class VideoClip:
    """Frames of one size and how many of them make a second."""

    frames: list[Frame]
    fps: float


def read_clip(
    path: str | Path, *, every: int = 1, limit: int = MAX_FRAMES, backend: str | None = None
) -> VideoClip:
    """Read a video file, a GIF or a folder of pictures (in the order of their names).

    every: keep one frame in so many. limit: at most this many are kept. backend: "av" or
    "imageio_ffmpeg"; default: the first that is installed. Raises `VideoError`.
    """
    path = Path(path)
    if every < 1 or limit < 1:
        raise VideoError(f"every and limit of at least 1 expected, got {every} and {limit}")
    try:
        frames, fps = _open(path, backend)
        kept = _keep(path, frames, every, limit)
    except PictureError as error:
        raise VideoError(str(error)) from error
    return VideoClip(frames=kept, fps=fps / every)


def _open(path: Path, backend: str | None) -> tuple[Iterator[Frame], float]:
    if path.is_dir():
        return _folder(path), DEFAULT_FPS
    if not path.is_file():
        raise VideoError(f"{path}: a video file or a folder of pictures expected, found nothing")
    if path.suffix.lower() == ".gif":
        return _gif(path)
    return _read_av(path) if find_backend(backend) == "av" else _read_ffmpeg(path)


def _keep(path: Path, frames: Iterator[Frame], every: int, limit: int) -> list[Frame]:
    """Take one frame in `every`, at most `limit`; all of one size."""
    kept: list[Frame] = []
    for number, frame in enumerate(frames):
        if number % every:
            continue
        if kept and frame.shape != kept[0].shape:
            raise VideoError(
                f"{path}: frames of one size expected, got {kept[0].shape[:2]} and "
                f"{frame.shape[:2]}; crop or resize them first"
            )
        kept.append(frame)
        if len(kept) == limit:
            break
    if not kept:
        raise VideoError(f"{path}: at least one frame expected, found none")
    return kept


def write_clip(
    path: str | Path, frames: Sequence[Frame], fps: float = DEFAULT_FPS, backend: str | None = None
) -> Path:
    """Write a video file, a GIF, or, for a path without suffix, a folder of PNG files.

    Video codecs want even sides: an odd last row or column is doubled. The clip is there whole or
    not at all; a folder of frames takes the place of an earlier one. Raises `VideoError` and
    `OSError`.
    """
    path = check_writable(path, backend)
    if not len(frames):
        raise VideoError("at least one frame to write expected, got none")
    if len({frame.shape for frame in frames}) != 1 or frames[0].dtype != np.uint8:
        raise VideoError("uint8 frames [H, W, 3] of one size expected")
    if not fps > 0:
        raise VideoError(f"a positive number of frames per second expected, got {fps}")
    if not path.suffix:
        with fresh_folder(path) as folder:
            for number, frame in enumerate(frames):
                Image.fromarray(frame).save(folder / f"{number:05d}.png")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path, "tmp").with_suffix(path.suffix)
    try:
        if path.suffix.lower() == ".gif":
            _write_gif(temporary, frames, fps)
        elif find_backend(backend) == "av":
            _write_av(temporary, frames, fps)
        else:
            _write_ffmpeg(temporary, frames, fps)
        os.replace(temporary, path)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_writable(path: str | Path, backend: str | None = None) -> Path:
    """Return the path of a clip that `write_clip` can write; to be asked before hours of work.

    Raises `VideoError`: a suffix of no format, no package for it, or a folder with other files than
    frames, which would be lost.
    """
    path = Path(path)
    if not path.suffix:
        check_frames(path)
    elif path.suffix.lower() != ".gif":
        if path.suffix.lower() not in VIDEOS:
            raise VideoError(f"{path}: one of {', '.join(VIDEOS)}, .gif or no suffix expected")
        find_backend(backend)
    return path


def check_frames(folder: Path) -> None:
    """Raise `VideoError` unless `folder` may be replaced: new, or with numbered PNGs only."""
    if not folder.is_dir():
        if folder.exists():
            raise VideoError(f"{folder}: a folder expected, got a file; give another name")
        return
    other = sorted(p.name for p in folder.iterdir() if not re.fullmatch(r"\d{5,}\.png", p.name))
    if other:
        raise VideoError(
            f"{folder}: a new folder or one of frames (00000.png, ...) expected, got {other[:3]}; "
            "give another name"
        )


def find_backend(name: str | None = None) -> str:
    """Return the package that reads and writes video files; raises `VideoError` without one."""
    choices = ("av", "imageio_ffmpeg") if name is None else (name,)
    for choice in choices:
        if choice in ("av", "imageio_ffmpeg") and importlib.util.find_spec(choice):
            return choice
    raise VideoError(
        f"video files need {' or '.join(choices)}, which is not installed: pip install "
        "'focus-vl[video]', or use a folder of pictures or a GIF"
    )


def _folder(path: Path) -> Iterator[Frame]:
    for name in sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES):
        yield np.asarray(read_picture(name).image)


def _gif(path: Path) -> tuple[Iterator[Frame], float]:
    pictures = read_frames(path)
    first = next(pictures)
    frames = (np.asarray(picture.image) for picture in itertools.chain([first], pictures))
    return frames, 1 / first.seconds if first.seconds > 0 else DEFAULT_FPS


def _read_av(path: Path) -> tuple[Iterator[Frame], float]:
    import av

    try:
        container = av.open(str(path))
        stream = container.streams.video[0]
    except (av.FFmpegError, IndexError) as error:
        raise VideoError(f"{path}: a video file expected: {error}") from error

    def decode() -> Iterator[Frame]:
        with container:
            try:
                for frame in container.decode(stream):
                    yield frame.to_ndarray(format="rgb24")
            except av.FFmpegError as error:
                raise VideoError(f"{path}: a whole video expected: {error}") from error

    return decode(), float(stream.average_rate or DEFAULT_FPS)


def _write_gif(path: Path, frames: Sequence[Frame], fps: float) -> None:
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
    )


def _write_av(path: Path, frames: Sequence[Frame], fps: float) -> None:
    import av

    try:
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(
                "libx264" if "libx264" in av.codecs_available else "mpeg4",
                rate=Fraction(fps).limit_denominator(1000),
            )
            height, width = _even(frames[0]).shape[:2]
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = {"crf": "12"}
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(_even(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise VideoError(f"cannot be written: {error.strerror or error}") from error


def _read_ffmpeg(path: Path) -> tuple[Iterator[Frame], float]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        meta = next(reader)
    except (OSError, StopIteration) as error:
        raise VideoError(f"{path}: a video file expected: {error}") from error
    width, height = meta["size"]
    frames = (np.frombuffer(raw, np.uint8).reshape(height, width, 3) for raw in reader)
    return frames, float(meta.get("fps") or DEFAULT_FPS)


def _write_ffmpeg(path: Path, frames: Sequence[Frame], fps: float) -> None:
    import imageio_ffmpeg

    height, width = _even(frames[0]).shape[:2]
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, quality=9, macro_block_size=1
    )
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(_even(frame)))
    finally:
        writer.close()
    try:  # the writer says nothing of an ffmpeg that failed at the end
        written = imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    except RuntimeError:
        written = 0
    if written != len(frames):
        raise VideoError(
            f"{len(frames)} frames expected, ffmpeg wrote {written}; is the disk full?"
        )


def _even(frame: Frame) -> Frame:
    rows, columns = frame.shape[0] % 2, frame.shape[1] % 2
    return np.ascontiguousarray(np.pad(frame, ((0, rows), (0, columns), (0, 0)), mode="edge"))
