from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from engine.data.dali import DaliDecoder, dali_problem
from engine.data.guard import BadSample, check_picture
from engine.data.layers import encode_map
from engine.data.pil import Copies, Decoder, PilDecoder, Work, open_decoder, resize
from engine.data.views import (
    Augment,
    Sizes,
    View,
    bucket_sizes,
    crop_box,
    make_view,
    may_flip,
    mirror_text,
)
from focus.geometry import letterbox
from tests.engine.data.layouts import encoded, jpeg

dali = pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))
SIZES = Sizes(frame=(96, 96), vit=(42, 56), pixel=(48, 64))
AUGMENT = Augment(flip=0.5, brightness=0.2, contrast=0.2, shift=True)


def levels(size: tuple[int, int], top: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, top, (size[0] // 4 + 1, size[1] // 4 + 1)).astype(np.uint16)
    found = np.kron(blocks, np.ones((4, 4), np.uint16))[: size[0], : size[1]]
    return encode_map(found)


def work(data: bytes, seed: int | None = None, top: int = 0, crop: bool = True) -> Work:
    header = check_picture(data)
    size = header.height, header.width
    view = make_view(size, SIZES, crop=crop, augment=AUGMENT, seed=seed)
    found = levels(size, top, seed or 0) if top else None
    bits = check_picture(found).bits if found else 8
    return Work(data, view, found, bits)


def pictures() -> list[bytes]:
    grey = Image.open(io.BytesIO(jpeg(7, (80, 70)))).convert("L")
    turned = Image.open(io.BytesIO(jpeg(8, (90, 60))))
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    cmyk = Image.open(io.BytesIO(jpeg(9, (70, 90)))).convert("CMYK")
    return [
        jpeg(1, (120, 160)),
        jpeg(2, (333, 217)),
        jpeg(3, (64, 64)),
        encoded(grey, "JPEG"),
        encoded(grey),
        encoded(Image.open(io.BytesIO(jpeg(4, (75, 99)))), "WEBP"),
        encoded(Image.open(io.BytesIO(jpeg(4, (75, 99))))),
        buffer.getvalue(),
        encoded(cmyk, "JPEG"),
    ]


def test_pil_copies_are_what_the_view_says() -> None:
    data = jpeg(1, (120, 160))
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    (found,) = PilDecoder().decode([work(data, crop=False)])
    assert isinstance(found, Copies)
    assert np.abs(found.frame.astype(int) - letterbox(image, (96, 96))[0]).max() <= 2
    assert (found.vit.shape, found.pixel.shape) == ((42, 56, 3), (48, 64, 3))
    assert (found.frame[0] == 255).all()  # the letterbox is white


@pytest.mark.parametrize("size", [(48, 64), (131, 60), (300, 301), (97, 130), (1, 7)])
def test_resampling_is_pillows(size: tuple[int, int]) -> None:
    """Up, down and aside, the vectorised filter gives what Pillow's antialiased bicubic gives."""
    image = np.random.default_rng(0).integers(0, 256, (97, 130, 3), np.uint8)
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    apart = np.abs(resize(image, size).astype(int) - np.asarray(expected))
    assert apart.max() <= 2 and apart.mean() < 0.1
    assert np.array_equal(resize(image, size, flip=True), resize(image, size)[:, ::-1])


def test_threads_change_nothing() -> None:
    works = [work(data, seed, 0) for seed, data in enumerate(pictures())]
    decoder = PilDecoder(threads=3)
    for one, two in zip(PilDecoder().decode(works), decoder.decode(works), strict=True):
        assert isinstance(one, Copies) and isinstance(two, Copies)
        assert np.array_equal(one.frame, two.frame) and np.array_equal(one.vit, two.vit)
    decoder.close()


def test_masks_follow_their_picture() -> None:
    """A map made from the picture itself lies where the picture lies, cropped and mirrored."""
    image = np.full((100, 180, 3), 255, np.uint8)
    image[30:70, 40:110] = 0
    found = np.zeros((100, 180), np.uint16)
    found[30:70, 40:110] = 1
    flipped = 0
    for seed in range(12):
        view = make_view((100, 180), SIZES, augment=Augment(flip=0.5, shift=True), seed=seed)
        flipped += view.flip
        (done,) = PilDecoder().decode(
            [Work(encoded(Image.fromarray(image)), view, encode_map(found))]
        )
        assert isinstance(done, Copies) and done.map is not None
        assert ((done.frame[..., 0] < 128) == (done.map == 1)).mean() > 0.995
    assert 0 < flipped < 12


def test_broken_pictures_are_named_and_the_others_decoded() -> None:
    check_broken(PilDecoder())


def check_broken(decoder: Decoder) -> None:
    whole = jpeg(1, (120, 160))
    good = work(whole)
    broken = bytearray(encoded(Image.open(io.BytesIO(jpeg(5, (64, 64))))))
    broken[60] ^= 0xFF  # inside the pixels: only a decoder notices
    view = work(jpeg(5, (64, 64))).view
    small = Work(jpeg(3, (20, 20)), good.view)
    other_map = Work(whole, good.view, levels((20, 20), 5, 0))
    palette = Work(whole, good.view, encoded(Image.new("P", (160, 120))))
    works = [
        good,
        Work(whole[:-9], good.view),
        Work(b"<html>", good.view),
        good,
        Work(bytes(broken), view),
        small,
        other_map,
        palette,
        good,
    ]
    done = decoder.decode(works)
    told = [one.reason if isinstance(one, BadSample) else "ok" for one in done]
    assert told == [
        "ok",
        "truncated",
        "not_image",
        "ok",
        "undecodable",
        "wrong_size",
        "wrong_size",
        "bad_mask",
        "ok",
    ]
    again = decoder.decode([good, good])
    first = done[0]
    assert isinstance(first, Copies)
    for one in again:
        assert isinstance(one, Copies) and np.array_equal(one.frame, first.frame)


@dali
def test_dali_survives_broken_pictures() -> None:
    decoder = DaliDecoder(threads=1)
    check_broken(decoder)
    assert decoder.rebuilt == 1


@dali
@pytest.mark.parametrize("crop", [True, False])
def test_dali_equals_pil(crop: bool) -> None:
    """Pictures within 3 levels (rounding), maps exactly but for ties; mirrored or not."""
    works = [
        work(data, seed, top, crop)
        for seed, top in ((0, 0), (1, 200), (2, 3000), (3, 200), (4, 0), (5, 7))
        for data in pictures()
    ]
    assert {one.view.flip for one in works} == {True, False}
    assert {one.map_bits for one in works} == {8, 16}
    theirs = DaliDecoder(threads=1, batch=16).decode(works)
    ties: list[float] = []
    for mine, other, given in zip(PilDecoder().decode(works), theirs, works, strict=True):
        assert isinstance(mine, Copies) and isinstance(other, Copies), (mine, other)
        for name in ("frame", "vit", "pixel"):
            a, b = getattr(mine, name), getattr(other, name)
            apart = np.abs(a.astype(int) - b)
            assert apart.max() <= 3 and apart.mean() < 0.3, (name, apart.max(), given.view)
        if given.map is None:
            assert mine.map is None and other.map is None
        else:
            ties.append(float((mine.map != other.map).mean()))
    assert np.mean(np.array(ties) == 0) > 0.9
    assert max(ties) < 0.06  # lines whose centre is on an edge of two pixels


def test_open_decoder_names_its_choices() -> None:
    assert isinstance(open_decoder("pil"), PilDecoder)
    with pytest.raises(ValueError, match="auto, dali, pil"):
        open_decoder("tf")


def test_crop_box_keeps_the_shape_and_the_picture() -> None:
    assert crop_box((100, 200), (1, 1)) == (0, 50, 100, 150)
    assert crop_box((100, 200), (1, 1), (0.0, 1.0)) == (0, 100, 100, 200)
    assert crop_box((200, 100), (384, 768)) == (75, 0, 125, 100)
    assert bucket_sizes(0, (768, 768)).pixel == (512, 512)


def test_views_are_functions_of_their_seed() -> None:
    def view(seed: int | None) -> View:
        return make_view((300, 400), SIZES, augment=AUGMENT, seed=seed)

    assert view(3) == view(3) != view(4)
    plain = view(None)
    assert (plain.flip, plain.brightness, plain.contrast) == (False, 1.0, 1.0)
    drawn = [view(seed) for seed in range(200)]
    assert 0.8 <= min(v.brightness for v in drawn) < 0.83
    assert 1.17 < max(v.contrast for v in drawn) <= 1.2
    assert 70 < sum(v.flip for v in drawn) < 130
    assert not any(
        make_view((9, 9), SIZES, augment=AUGMENT, seed=s, flippable=False).flip for s in range(50)
    )


def test_texts_about_sides_are_mirrored() -> None:
    assert mirror_text("the LEFT cup, left of the Rightmost dog") == (
        "the RIGHT cup, right of the Leftmost dog"
    )
    assert mirror_text("the left-hand man bright") == "the right-hand man bright"
    for text in ("the dog on the left", "second from right", "a red circle"):
        assert may_flip(text)
        assert mirror_text(mirror_text(text)) == text
    for text in ("who has left?", "the clock", "all right", "what does the sign say", "mirror it"):
        assert not may_flip(text), text
