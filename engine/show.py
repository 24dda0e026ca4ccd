"""Pictures for people: masks over a picture, before and after, labelled panels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

# H rows, W columns

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.float32]
Colour = tuple[int, int, int]

# Eight hues that stay apart for colour-blind eyes too (Okabe and Ito), brightest first.
COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
    (150, 150, 150),
)
PAPER: Colour = (250, 249, 246)
INK: Colour = (38, 36, 33)
MIN_SIDE = 384  # smaller pictures are enlarged, without smoothing, so that a person sees the mask
MAX_SIDE = 1600
OPACITY = 0.5


def overlay(
    image: Image.Image,
    masks: Sequence[Mask],
    captions: Sequence[str] = (),
    opacity: float = OPACITY,
    enlarge: bool = True,
) -> Image.Image:
    """Return the picture with each bool [H, W] mask tinted, outlined and listed below."""
    scaled = presentable(image) if enlarge else image.convert("RGB")
    pixels = np.asarray(scaled, dtype=np.float32)
    for number, mask in enumerate(masks):
        colour = np.asarray(COLOURS[number % len(COLOURS)], dtype=np.float32)
        inside = _resize(mask, scaled.size)
        pixels = np.where(inside[..., None], (1 - opacity) * pixels + opacity * colour, pixels)
        pixels = _draw_outline(pixels, inside, colour)
    shown = Image.fromarray(pixels.round().astype(np.uint8))
    return _with_legend(shown, captions) if captions else shown


def spotlight(image: Image.Image, masks: Sequence[Mask]) -> Image.Image:
    """Return the picture with the masks in their own colours, outlined, and the rest faded."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    inside = np.any(masks, axis=0) if len(masks) else np.zeros(pixels.shape[:2], dtype=bool)
    grey = pixels.mean(axis=2, keepdims=True)
    faded = 0.25 * (0.4 * pixels + 0.6 * grey) + 0.75 * np.asarray(PAPER, dtype=np.float32)
    pixels = np.where(inside[..., None], pixels, faded)
    for mask in masks:
        pixels = _draw_outline(pixels, mask, np.asarray(INK, dtype=np.float32))
    return Image.fromarray(pixels.round().astype(np.uint8))


def before_after(
    before: Image.Image, after: Image.Image, mask: Mask | None = None, title: str = ""
) -> Image.Image:
    """Return before, the mask over it (if given) and after, side by side under a title."""
    panels = [("before", presentable(before))]
    if mask is not None:
        panels.append(("mask", presentable(spotlight(before, [mask]))))
    return strip([*panels, ("after", presentable(after))], title)


def strip(panels: Sequence[tuple[str, Image.Image]], title: str = "") -> Image.Image:
    """Return captioned pictures side by side, each scaled to the height of the first."""
    height = panels[0][1].height
    fitted = [
        (name, image.resize((max(1, round(image.width * height / image.height)), height)))
        for name, image in panels
    ]
    size = max(14, height // 28)
    gap, line = size, round(size * 1.6)
    font = ImageFont.load_default(size)
    width = sum(image.width for _, image in fitted) + gap * (len(fitted) + 1)
    top = gap + (line if title else 0)
    sheet = Image.new("RGB", (width, top + height + line + gap // 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap // 2), _shorten(title, font, width - 2 * gap), fill=INK, font=font)
    left = gap
    for name, image in fitted:
        sheet.paste(image, (left, top))
        text = _shorten(name, font, image.width)
        draw.text((left, top + height + size // 4), text, fill=INK, font=font)
        left += image.width + gap
    return sheet


def presentable(image: Image.Image) -> Image.Image:
    """Scale so that the longer side lies between `MIN_SIDE` and `MAX_SIDE`."""
    longest = max(image.size)
    if longest < MIN_SIDE:
        factor = -(-MIN_SIDE // longest)
        size = (image.width * factor, image.height * factor)
        return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    if longest > MAX_SIDE:
        size = (
            max(1, round(image.width * MAX_SIDE / longest)),
            max(1, round(image.height * MAX_SIDE / longest)),
        )
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return image.convert("RGB")


def _resize(mask: Mask, size: tuple[int, int]) -> Mask:
    picture = Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255)
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST)) > 127


def _grow(mask: Mask, width: int) -> Mask:
    """Dilate by `width` pixels (city-block distance)."""
    for _ in range(width):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        mask = grown
    return mask


def _outline(mask: Mask, width: int) -> Mask:
    """The inner border of a mask, `width` pixels wide."""
    return mask & _grow(~mask, width)


def _draw_outline(pixels: Pixels, inside: Mask, colour: Pixels) -> Pixels:
    """Draw the border of a mask in its colour, with a white halo around it."""
    width = max(1, round(max(inside.shape) / 250))
    halo = _outline(_grow(inside, width), width) & ~inside
    pixels = np.where(halo[..., None], np.float32(255), pixels)
    return np.where(_outline(inside, width)[..., None], colour, pixels)


def _with_legend(image: Image.Image, captions: Sequence[str]) -> Image.Image:
    size = max(14, image.width // 32)
    line = round(size * 1.6)
    font = ImageFont.load_default(size)
    sheet = Image.new("RGB", (image.width, image.height + line * len(captions) + size // 2), PAPER)
    sheet.paste(image, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for number, caption in enumerate(captions):
        top = image.height + size // 3 + number * line
        box = (size // 2, top + size // 4, size // 2 + size, top + size // 4 + size)
        draw.rectangle(box, fill=COLOURS[number % len(COLOURS)], outline=INK)
        text = _shorten(caption, font, image.width - 3 * size)
        draw.text((2 * size, top), text, fill=INK, font=font)
    return sheet


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a text with an ellipsis so that it fits into `width` pixels."""
    text = " ".join(text.split())[:400]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
