"""Clips on disk: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import importlib.util
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.data.scenes import clip
from engine.video_files import DEFAULT_FPS, VideoError, find_backend, read_clip, write_clip

FRAMES = list(clip("train", 0, 0, 5, (48, 64)).frames)
BACKENDS = ("av", "imageio_ffmpeg")


def test_folders_keep_every_pixel(tmp_path: Path) -> None:
    write_clip(tmp_path / "frames", FRAMES)
    (tmp_path / "frames" / "notes.txt").write_text("not a picture")
    found = read_clip(tmp_path / "frames")
    assert found.fps == DEFAULT_FPS
    assert all(np.array_equal(a, b) for a, b in zip(found.frames, FRAMES, strict=True))
    some = read_clip(tmp_path / "frames", every=2, limit=2)
    assert len(some.frames) == 2 and np.array_equal(some.frames[1], FRAMES[2])
    assert some.fps == DEFAULT_FPS / 2


def test_gifs_keep_frames_and_pace(tmp_path: Path) -> None:
    found = read_clip(write_clip(tmp_path / "clip.gif", FRAMES, fps=10))
    assert len(found.frames) == 5 and found.fps == 10
    worst = max(
        float(np.abs(a.astype(int) - b.astype(int)).mean())
        for a, b in zip(found.frames, FRAMES, strict=True)
    )
    assert worst < 8  # 256 colours


@pytest.mark.parametrize("backend", BACKENDS)
def test_video_files_keep_frames_and_pace(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    odd = [frame[:47, :63] for frame in FRAMES]
    path = write_clip(tmp_path / "clip.mp4", odd, fps=12.5, backend=backend)
    found = read_clip(path, backend=backend)
    assert len(found.frames) == 5 and found.fps == pytest.approx(12.5)
    assert found.frames[0].shape == (48, 64, 3)
    for a, b in zip(found.frames, odd, strict=True):
        assert np.abs(a[:47, :63].astype(int) - b.astype(int)).mean() < 6
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"broken\.mp4: a video file expected"):
        read_clip(tmp_path / "broken.mp4", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_disk_leaves_the_earlier_video(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    noise = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "clip.mp4", FRAMES[:2], backend=backend)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(VideoError, match=r"/clip\.mp4: (cannot be written: File too|8 frames)"):
            write_clip(path, list(noise), backend=backend)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert len(read_clip(path, backend=backend).frames) == 2


def test_without_a_package_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VideoError, match=r"pip install 'focus-vl\[video\]'"):
        find_backend()
    with pytest.raises(VideoError, match="a GIF"):
        write_clip(tmp_path / "clip.mp4", FRAMES)


def test_frames_are_read_with_the_care_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    Image.fromarray(np.asarray([[0, 257, 65_535]], np.uint16)).save(folder / "0.png")
    Image.new("RGBA", (3, 1), (9, 9, 9, 0)).save(folder / "1.png")
    first, second = read_clip(folder).frames
    assert first[0, :, 0].tolist() == [0, 1, 255]
    assert (second == 255).all()


def _bomb(path: Path) -> None:
    """A GIF that says it has 400 million pixels."""
    Image.new("P", (1, 1)).save(path, format="GIF")
    content = bytearray(path.read_bytes())
    content[6:10] = (20_000).to_bytes(2, "little") * 2
    path.write_bytes(content)


def _cut(path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(path, format="GIF")
    path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_bomb, r"million pixels are read"),
        (_cut, "damaged or truncated"),
        (lambda path: path.write_text("no picture"), "not a picture"),
    ],
)
@pytest.mark.parametrize("place", ["clip.gif", "frames"])
def test_dangerous_and_broken_frames_are_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str, place: str
) -> None:
    clip, file = tmp_path / "clip.gif", tmp_path / "clip.gif"
    if place == "frames":
        clip, file = tmp_path / "frames", tmp_path / "frames" / "0.png"
        clip.mkdir()
    make(file)
    with pytest.raises(VideoError, match=message) as caught:
        read_clip(clip)
    assert str(file) in str(caught.value)


def test_a_folder_of_frames_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    write_clip(tmp_path / "frames", FRAMES)
    write_clip(tmp_path / "frames", FRAMES[:2])
    assert sorted(p.name for p in (tmp_path / "frames").iterdir()) == ["00000.png", "00001.png"]
    (tmp_path / "frames" / "notes.txt").write_text("mine")
    with pytest.raises(VideoError, match=r"one of frames .* expected, got \['notes\.txt'\]"):
        write_clip(tmp_path / "frames", FRAMES)
    assert (tmp_path / "frames" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VideoError, match="a folder expected, got a file"):
        write_clip(tmp_path / "file", FRAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "frames"]


@pytest.mark.parametrize("name", ["clip.gif", "frames"])
def test_a_failed_clip_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_clip(tmp_path / name, FRAMES[:2])
    save = Image.Image.save

    def full(picture: Image.Image, *given: Any, **named: Any) -> None:
        save(picture, *given, **named)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space left"):
            write_clip(path, FRAMES)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert len(read_clip(path).frames) == 2


def test_wrong_clips_are_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="found nothing"):
        read_clip(tmp_path / "none.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="at least one frame expected"):
        read_clip(tmp_path / "empty")
    write_clip(tmp_path / "mixed", FRAMES)
    write_clip(tmp_path / "mixed" / "sub", [FRAMES[0][:20]])
    (tmp_path / "mixed" / "sub" / "00000.png").rename(tmp_path / "mixed" / "99999.png")
    with pytest.raises(VideoError, match="frames of one size expected"):
        read_clip(tmp_path / "mixed")
    for frames, fps, match in (([], 8, "at least one frame"), (FRAMES, 0, "positive number")):
        with pytest.raises(VideoError, match=match):
            write_clip(tmp_path / "x", frames, fps)
    with pytest.raises(VideoError, match="no suffix expected"):
        write_clip(tmp_path / "clip.txt", FRAMES)
