import pytest

from focus.buckets import BUCKETS, bucket_of, match_bucket
from focus.presets import focus_3b, focus_tiny


def test_buckets_have_sizes_that_their_encoders_divide():
    assert len({b.size for b in BUCKETS}) == 12
    for bucket in BUCKETS:
        assert all(pixels % 64 == 0 for pixels in bucket.size)
        assert tuple(n * 28 for n in bucket.semantic_grid) == bucket.vit_size
        assert tuple(n * 16 for n in bucket.pixel_grid) == bucket.size
    wide = {b.size: b for b in BUCKETS}
    for (height, width), bucket in wide.items():
        turned = wide[width, height]
        assert turned.semantic_grid == bucket.semantic_grid[::-1]


def test_configs_own_sizes_are_buckets():
    assert bucket_of(focus_3b()) == BUCKETS[0]
    assert bucket_of(focus_tiny()).block_length == 150


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (512, 512)),
        ((300, 300), (256, 256)),
        ((2000, 2000), (512, 512)),
        ((480, 640), (384, 512)),
        ((1080, 1920), (384, 768)),
        ((3000, 400), (1024, 256)),
    ],
)
def test_match_bucket_takes_the_nearest_ratio_then_size(size, expected):
    assert match_bucket(*size).size == expected


def test_match_bucket_refuses_an_empty_picture():
    with pytest.raises(ValueError, match="at least 1 x 1 expected, got 0 x 5"):
        match_bucket(0, 5)
