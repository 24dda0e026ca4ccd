"""Pictures and masks out of files, with every guard a stranger's file needs.

Reading accepts any size, mode and orientation and returns upright 8-bit RGB; whatever was done to
the picture on the way is told in `Picture.notes`.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from focus.request import RequestError

# H rows, W columns

Mask = npt.NDArray[np.bool_]

# No format that runs a program (EPS) or has no signature (TGA).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
MAX_PIXELS = 89_478_485  # 256 MiB of RGB
MAX_BYTES = 512 << 20


class PictureError(RequestError):
    """A file that is not a usable picture, or a place where none can be written."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An upright 8-bit RGB picture, where it came from and what reading it involved."""

    image: Image.Image
    path: Path
    notes: tuple[str, ...] = ()
    seconds: float = 0.0  # of a frame of an animation, how long it is shown

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Read the first frame of a picture file as upright RGB; alpha goes over white.

    Raises:
        PictureError: missing, not a regular file, not a picture, damaged, or more than
            `MAX_PIXELS` pixels.
    """
    path = Path(path)
    notes: list[str] = []
    image = _decode(path, notes)
    image = _upright(image, notes)
    return Picture(image=to_rgb(image, path, notes), path=path, notes=tuple(notes))


def read_frames(path: str | os.PathLike[str]) -> Iterator[Picture]:
    """Read every frame of an animation (GIF, WebP, PNG) as RGB, one at a time; alpha over white.

    `Picture.seconds` is how long a frame is shown. Raises `PictureError` as `read_picture` does, at
    the frame that is damaged.
    """
    path = Path(path)
    _check_file(path)
    with _guard(path):
        image = _open(path)
    with image:
        number = 0
        while True:
            notes: list[str] = []
            with _guard(path):
                try:
                    image.seek(number)
                except EOFError:
                    return
                _check_size(image.size, path)
                image.load()
                seconds = float(image.info.get("duration") or 0) / 1000
                rgb = to_rgb(image, path, notes)
            yield Picture(image=rgb, path=path, notes=tuple(notes), seconds=seconds)
            number += 1


def read_mask(path: str | os.PathLike[str], size: tuple[int, int], what: str = "mask") -> Mask:
    """Read a mask file of exactly `size` (width, height) as bool [H, W].

    With an alpha channel that varies, opaque is inside; otherwise light (128 and up) is inside.

    Raises:
        PictureError: what `read_picture` raises, another size, or nothing inside.
    """
    path = Path(path)
    image = _upright(_decode(path, []), [])
    if image.size != size:
        raise PictureError(
            f"{path}: the {what} must have the picture's size, {size[0]}x{size[1]}, "
            f"got {image.size[0]}x{image.size[1]}; draw it on a copy of the picture"
        )
    mask = _inside(image, path)
    if not mask.any():
        raise PictureError(f"{path}: the {what} is empty; paint the inside white")
    return mask


def rgb_of(image: Image.Image) -> Image.Image:
    """Return a picture in memory as 8-bit RGB, by the rules of `read_picture`.

    It is not turned: whoever holds it counts pixels as it lies. Raises `PictureError`.
    """
    name = Path(str(getattr(image, "filename", "") or "the picture"))
    with _guard(name):
        _check_size(image.size, name)
        image.load()
        return to_rgb(image, name, [])


def _decode(path: Path, notes: list[str]) -> Image.Image:
    """Open and fully load the first frame, whatever its mode."""
    _check_file(path)
    with _guard(path):
        image = _open(path)
        frames = int(getattr(image, "n_frames", 1))
        image.seek(0)
        image.load()
    if frames > 1:
        notes.append(f"{frames} frames, the first is used")
    return image


def _open(path: Path) -> Image.Image:
    image = Image.open(path, formats=_readable())
    _check_size(image.size, path)
    return image


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises on a stranger's file into a `PictureError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(_too_large(path, "more")) from error
    except UnidentifiedImageError as error:
        names = ", ".join(FORMATS[:6])
        raise PictureError(f"{path}: not a picture ({names}, ...)") from error
    except (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError) as error:
        raise PictureError(f"{path}: damaged or truncated picture: {error}") from error
    except (MemoryError, OverflowError, ArithmeticError, AttributeError) as error:
        raise PictureError(f"{path}: cannot be decoded: {type(error).__name__}") from error


def _readable() -> tuple[str, ...]:
    """The formats that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_file(path: Path) -> None:
    try:
        info = path.stat()
    except OSError as error:
        raise PictureError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except ValueError as error:  # a null byte in the name
        raise PictureError(f"{str(path)!r}: not a file name") from error
    if stat.S_ISDIR(info.st_mode):
        raise PictureError(f"{path}: a folder, not a picture")
    if not stat.S_ISREG(info.st_mode):
        raise PictureError(f"{path}: not a regular file")
    if info.st_size == 0:
        raise PictureError(f"{path}: the file is empty")
    if info.st_size > MAX_BYTES:
        raise PictureError(f"{path}: {info.st_size >> 20} MiB; at most {MAX_BYTES >> 20} are read")


def _check_size(size: tuple[int, int], path: Path) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise PictureError(_too_large(path, f"{size[0]}x{size[1]}"))
    if min(size) < 1:
        raise PictureError(f"{path}: the picture has no pixels ({size[0]}x{size[1]})")


def _too_large(path: Path, got: str) -> str:
    return (
        f"{path}: at most {MAX_PIXELS / 1e6:.0f} million pixels are read, got {got}; scale it down"
    )


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """Apply the EXIF orientation; a damaged EXIF block is ignored."""
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises a zoo of types here, and the pixels are fine
        notes.append("damaged EXIF data ignored")
        return image
    if turned.size != image.size or turned.getexif() != image.getexif():
        notes.append("turned upright as its EXIF data say")
    return turned


def to_rgb(image: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    """Convert a loaded picture of any mode to 8-bit RGB, telling in `notes` what was lost."""
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        notes.append(f"mode {mode} reduced to 8 bits")
        return Image.fromarray(_eight_bits(np.asarray(image), path)).convert("RGB")
    if "A" in mode or "a" in mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() == (255, 255):
            return rgba.convert("RGB")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        notes.append("transparency laid over white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode == "RGB":
        return image.copy()
    notes.append(f"mode {mode} converted to RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise PictureError(f"{path}: pictures of mode {mode} cannot be read: {error}") from error


def _eight_bits(values: npt.NDArray[Any], path: Path) -> npt.NDArray[np.uint8]:
    """Scale 16-bit, 32-bit or float grey to 0..255 by the smallest range that holds it."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise PictureError(f"{path}: grey values must be finite and not negative")
    peak = values.max()
    is_fraction = peak <= 1 and (values % 1).any()
    for full in (1.0,) if is_fraction else (255.0, 65_535.0, 2.0**32 - 1):
        if peak <= full:
            return np.round(values * (255 / full)).astype(np.uint8)
    raise PictureError(f"{path}: grey values up to {peak:.3g}; at most 32 bits are read")


def _inside(image: Image.Image, path: Path) -> Mask:
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() != alpha.max():
            return np.asarray(alpha >= 128)
    if image.mode == "1":
        return np.asarray(image, dtype=bool)
    grey = np.asarray(to_rgb(image, path, []).convert("L"))
    # Label pictures number the inside 1, 2, ...: too dark to see, but not black.
    return np.asarray(grey >= 128 if grey.max() >= 128 else grey > 0)
