"""Letterboxing there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from focus.geometry import GeometryError, Letterbox, letterbox


def picture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    red = 255 * rows / height
    green = 255 * columns / width
    return np.stack([red, green, np.full_like(red, 80)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("source", "content", "offset"),
    [
        ((50, 100), (64, 128), (32, 0)),
        ((100, 50), (128, 64), (0, 32)),
        ((7, 7), (128, 128), (0, 0)),
        ((1, 1000), (1, 128), (63, 0)),
    ],
)
def test_fit_keeps_aspect_and_centres(
    source: tuple[int, int], content: tuple[int, int], offset: tuple[int, int]
) -> None:
    box = Letterbox.fit(source, (128, 128))
    assert (box.content, box.offset) == (content, offset)


def test_letterbox_fills_white_around_the_picture() -> None:
    framed, box = letterbox(picture(32, 64), (64, 64))
    assert framed.shape == (64, 64, 3)
    assert (framed[:16] == 255).all()
    assert (framed[48:] == 255).all()
    np.testing.assert_array_equal(framed[16:48], picture(32, 64))
    filled, _ = letterbox(picture(32, 64), (64, 64), fill=(1, 2, 3))
    assert filled[0, 0].tolist() == [1, 2, 3]
    assert box.offset == (16, 0)


@pytest.mark.parametrize("size", [(37, 91), (200, 64), (64, 64)])
def test_image_back_inverts_letterbox(size: tuple[int, int]) -> None:
    original = picture(*size)
    framed, box = letterbox(original, (128, 128))
    back = box.image_back(framed)
    assert back.shape == original.shape
    inner = np.s_[4:-4, 4:-4]
    error = np.abs(back[inner].astype(int) - original[inner].astype(int))
    assert error.mean() < 3


def test_image_back_takes_outputs_of_another_size() -> None:
    original = picture(32, 64)
    framed, box = letterbox(original, (64, 64))
    doubled = framed.repeat(2, axis=0).repeat(2, axis=1)
    back = box.image_back(doubled)
    assert np.abs(back.astype(int) - original.astype(int))[2:-2, 2:-2].mean() < 3
    with pytest.raises(GeometryError, match="aspect of the frame"):
        box.image_back(doubled[:64])


@pytest.mark.parametrize("size", [(37, 91), (200, 64)])
def test_mask_back_inverts_letterbox(size: tuple[int, int]) -> None:
    mask = np.zeros(size, np.bool_)
    mask[size[0] // 4 : size[0] // 2, size[1] // 3 : size[1] // 2] = True
    white = mask[..., None].repeat(3, axis=-1).astype(np.uint8) * 255
    framed, box = letterbox(white, (128, 128), fill=0)
    back = box.mask_back(framed[..., 0] > 127)
    assert back.dtype == np.bool_
    overlap = (back & mask).sum() / (back | mask).sum()
    assert overlap > 0.84  # one pixel all round at the smaller scale


def test_mask_back_reads_any_grid_and_passes_gradients() -> None:
    box = Letterbox.fit((32, 64), (64, 64))
    logits = torch.zeros(2, 16, 16)
    logits[:, 4:12, 8:] = 1.0  # right half of the content
    logits.requires_grad_()
    back = box.mask_back(logits)
    assert back.shape == (2, 32, 64)
    assert back[0, :, :30].eq(0).all()
    assert back[0, 2:-2, 34:].eq(1).all()
    back[0].sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].sum().item() == pytest.approx(32 * 64)
    assert box.mask_back(torch.zeros(0, 16, 16)).shape == (0, 32, 64)


def test_points_land_where_the_picture_does() -> None:
    box = Letterbox.fit((50, 100), (128, 128))
    found = box.points([(0, 0), (100, 50), (50, 25)])
    np.testing.assert_allclose(found, [[0, 0.25], [1, 0.75], [0.5, 0.5]], atol=1e-6)


def test_pictures_of_another_kind_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"\[H, W, 3\] uint8 expected, got \(4, 4\) uint8"):
        letterbox(np.zeros((4, 4), np.uint8), (8, 8))
    with pytest.raises(GeometryError, match="float32"):
        letterbox(np.zeros((4, 4, 3), np.float32), (8, 8))  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="at least 1 x 1"):
        Letterbox.fit((0, 4), (8, 8))
