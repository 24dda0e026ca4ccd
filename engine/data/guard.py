"""Is this member a picture that may be decoded? Cheap checks first, a full decode on request.

DALI has no way to skip a bad sample: one broken picture ends its pipeline, and a bomb takes the
machine's memory. So nothing reaches a decoder that these few microseconds refuse.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from engine.data.records import Image
from engine.data.scene_model import DataError

MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MAX_BYTES = 64 << 20
TAIL = 64  # bytes at the end of a PNG in which its IEND must stand

# Every reason for which a sample can be left out; logs and TensorBoard count by these names.
REASONS = (
    "empty",  # a member of no bytes
    "not_image",  # no signature or no header that we know
    "truncated",  # the end is missing
    "bomb",  # header promises more pixels than the limit, or a longer side
    "too_large",  # more bytes than the limit
    "undecodable",  # the header is fine, the data are not
    "wrong_size",  # map, target or frame of another size than the picture
    "missing_member",
    "bad_json",
    "bad_schema",
    "bad_mask",
    "stale_index",  # the index names another place than the shard holds
    "shard_truncated",
    "shard_missing",
)


class BadSample(DataError):
    """A sample that is left out; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, text: str, key: str = "") -> None:
        super().__init__(f"{key}: {reason}: {text}" if key else f"{reason}: {text}")
        self.reason = reason
        self.text = text
        self.key = key

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str]]:
        """Pickle by what it was made of: workers hand it to the training process."""
        return BadSample, (self.reason, self.text, self.key)

    def named(self, key: str) -> BadSample:
        """The same, with the sample's key."""
        return BadSample(self.reason, self.text, key)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a picture says of itself; height and width are those after EXIF orientation."""

    format: str
    height: int
    width: int
    bits: int  # per channel
    turned: bool = False  # EXIF asks for a rotation or mirroring


def extension(data: bytes) -> str:
    """File name ending that fits the bytes; raises `BadSample`."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if not data:
        raise BadSample("empty", "a picture of no bytes")
    raise BadSample("not_image", f"JPEG, PNG or WebP expected, got bytes {data[:8]!r}")


def check_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Read the header of an encoded picture; nothing is decoded. Raises `BadSample`."""
    kind = extension(data)
    if len(data) > MAX_BYTES:
        raise BadSample("too_large", f"at most {MAX_BYTES} bytes expected, got {len(data)}")
    _check_end(kind, data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)
            with Pillow.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
                width, height = opened.size
                turn = opened.getexif().get(0x0112, 1) if kind == "jpg" else 1
    except Pillow.DecompressionBombError as error:
        raise BadSample("bomb", str(error)) from error
    except Exception as error:  # whatever a stranger's header makes Pillow raise
        raise BadSample("not_image", f"unreadable header: {error}") from error
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise BadSample("bomb", f"at most {max_pixels} pixels expected, got {width} x {height}")
    if turn in (5, 6, 7, 8):
        width, height = height, width
    bits = data[24] if kind == "png" else 8
    return Header(format=kind, height=height, width=width, bits=bits, turned=turn not in (0, 1))


def _check_end(kind: str, data: bytes) -> None:
    if kind == "jpg":
        whole = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") > 0
    elif kind == "png":
        whole = b"IEND" in data[-TAIL:]
    else:
        whole = int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if not whole:
        raise BadSample("truncated", f"the end of the {kind} is missing ({len(data)} bytes)")


def decode_picture(data: bytes, header: Header | None = None) -> Image:
    """Decode to upright RGB uint8 [H, W, 3]; raises `BadSample`.

    `header` is what `check_picture` said of the same bytes, which then are not checked again.
    """
    turned = (header or check_picture(data)).turned
    try:
        with Pillow.open(io.BytesIO(data)) as opened:
            upright = ImageOps.exif_transpose(opened) if turned else opened
            # Both calls copy the whole picture, so they are left out where nothing would change.
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except Exception as error:
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from error


def decode_map(data: bytes) -> np.ndarray:
    """Decode an index map, an 8-bit or 16-bit greyscale PNG, to integers [H, W].

    Palette pictures are refused: decoders disagree about them. Raises `BadSample`.
    """
    if check_picture(data).format != "png":
        raise BadSample("bad_mask", "an index map is a PNG")
    try:
        with Pillow.open(io.BytesIO(data)) as opened:
            if opened.mode not in ("L", "I;16", "I"):
                raise BadSample("bad_mask", f"a grey index map expected, got mode {opened.mode}")
            return np.asarray(opened).astype(np.uint16)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from error
