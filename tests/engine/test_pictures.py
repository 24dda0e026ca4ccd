"""Reading strangers' pictures, and writing ours whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.pictures import (
    PictureError,
    read_mask,
    read_picture,
    write_bytes,
    write_json,
    write_mask,
    write_picture,
)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def gradient(height: int = 20, width: int = 30) -> Image.Image:
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0] = np.arange(width) * 8
    values[..., 1] = np.arange(height)[:, None] * 12
    return Image.fromarray(values)


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def test_rgb_png_is_read_unchanged(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert picture.image.mode == "RGB"
    assert picture.notes == ()
    np.testing.assert_array_equal(pixels(picture.image), pixels(gradient()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = gradient()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(picture.image), pixels(upright))
    assert bool(picture.notes) == (orientation > 1)


def test_palette_with_transparency_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    found = pixels(read_picture(tmp_path / "a.png").image)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == [0, 0, 200]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 128), (127, 127, 127)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ],
)
def test_grey_and_alpha_modes(
    tmp_path: Path, mode: str, value: object, expected: tuple[int, int, int]
) -> None:
    Image.new(mode, (3, 3), value).save(tmp_path / "a.png")  # type: ignore[arg-type]
    assert read_picture(tmp_path / "a.png").image.getpixel((1, 1)) == expected


def test_sixteen_bit_png_keeps_its_range(tmp_path: Path) -> None:
    values = np.asarray([[0, 257, 32_896, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert pixels(picture.image)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert "8 bits" in picture.notes[0]


def test_float_tiff_in_zero_to_one(tmp_path: Path) -> None:
    Image.fromarray(np.asarray([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "a.tiff")
    assert pixels(read_picture(tmp_path / "a.tiff").image)[0, :, 2].tolist() == [0, 128, 255]


def test_float_tiff_with_nan_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.asarray([[0.0, np.nan]], np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(PictureError, match="finite"):
        read_picture(tmp_path / "a.tiff")


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = read_picture(tmp_path / "a.jpg").image.getpixel((8, 8))
    assert red > 245
    assert max(green, blue) < 12


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / "a.gif")
    assert picture.image.getpixel((4, 4)) == (255, 0, 0)
    assert picture.notes[0] == "3 frames, the first is used"


def test_one_pixel_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").image.getpixel((0, 0)) == (1, 2, 3)


def _bomb(path: Path) -> None:
    path.write_bytes(header_only_png(20_000, 20_000))


def _large(path: Path) -> None:
    path.write_bytes(header_only_png(10_000, 10_000))


def _cut(path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:1500])


def _cut_jpeg(path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:900])


def _cut_header(path: Path) -> None:
    path.write_bytes(header_only_png(8, 8)[:20])


def _text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def _eps(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


def _missing(path: Path) -> None:
    pass


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_bomb, "million pixels"),
        (_large, "10000x10000"),
        (_cut, "damaged or truncated"),
        (_cut_jpeg, "damaged or truncated"),
        (_cut_header, "not a picture|damaged"),
        (_text, "not a picture"),
        (_eps, "not a picture"),
        (_missing, "No such file"),
        (_loop, "symbolic links"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.mkdir(), "folder"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_an_unusable_file_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(PictureError, match=message) as caught:
        read_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_with_a_null_byte_is_refused() -> None:
    with pytest.raises(PictureError, match="not a file name"):
        read_picture("a\0b.png")


def test_every_cut_of_a_picture_is_read_or_refused(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        path = tmp_path / f"a.{kind.lower()}"
        gradient().save(path, format=kind)
        whole = path.read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:length])
            try:
                size = read_picture(path).size
            except PictureError:
                continue
            assert size == (30, 20)


def test_mask_reads_light_as_inside(tmp_path: Path) -> None:
    expected = np.zeros((20, 30), bool)
    expected[5:9, 7:20] = True
    write_mask(expected, tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (30, 20)), expected)


def test_mask_reads_label_numbers_and_alpha(tmp_path: Path) -> None:
    expected = np.zeros((4, 6), bool)
    expected[1, 2:4] = True
    Image.fromarray(expected.astype(np.uint8)).save(tmp_path / "label.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "label.png", (6, 4)), expected)
    painted = np.zeros((4, 6, 4), np.uint8)
    painted[expected] = (10, 0, 0, 255)
    Image.fromarray(painted).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "alpha.png", (6, 4)), expected)


def test_mask_of_another_size_or_empty_is_refused(tmp_path: Path) -> None:
    write_mask(np.ones((4, 6), bool), tmp_path / "m.png")
    with pytest.raises(PictureError, match="size, 30x20, got 6x4"):
        read_mask(tmp_path / "m.png", (30, 20))
    write_mask(np.zeros((4, 6), bool), tmp_path / "m.png")
    with pytest.raises(PictureError, match="is empty"):
        read_mask(tmp_path / "m.png", (6, 4))


def test_written_picture_reads_back(tmp_path: Path) -> None:
    path = write_picture(gradient(), tmp_path / "deep" / "er" / "a.png")
    np.testing.assert_array_equal(pixels(read_picture(path).image), pixels(gradient()))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_json_takes_paths_and_numpy_and_refuses_nan(tmp_path: Path) -> None:
    path = write_json(
        {"a": np.float32(0.5), "b": Path("x"), "c": np.arange(2)}, tmp_path / "a.json"
    )
    assert json.loads(path.read_text()) == {"a": 0.5, "b": "x", "c": [0, 1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text())["a"] == 0.5


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(PictureError, match="cannot be written: File too large"):
            write_bytes(b"x" * (1 << 21), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PictureError, match=r"a\.png: cannot be written: No space left on device"):
        write_picture(gradient(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_writing_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PictureError, match="cannot be written"):
        write_picture(gradient(), tmp_path / "file" / "a.png")
