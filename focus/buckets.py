"""The twelve picture sizes of the language model and the grids that go with them, as data.

A picture is written as a block of tokens whose shape depends on its bucket only: resolution tags,
a semantic grid (one token per merged ViT patch) and a pixel grid (one per 16 x 16 pixels). The ViT
copy of a picture is smaller than the bucket, because 256 is no multiple of 28 (facts, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from focus.config import FocusConfig


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One picture size; every pair is (height, width)."""

    size: tuple[int, int]  # pixels
    vit_size: tuple[int, int]  # pixels of the vanilla encoder's copy
    semantic_grid: tuple[int, int]  # tokens
    pixel_grid: tuple[int, int]  # tokens

    @property
    def num_visual(self) -> int:
        """Visual tokens of the block."""
        return (
            self.semantic_grid[0] * self.semantic_grid[1] + self.pixel_grid[0] * self.pixel_grid[1]
        )

    @property
    def block_length(self) -> int:
        """Tokens from <start_of_image> to <end_of_image>; two resolution tags come before."""
        return 6 + sum(rows * (columns + 1) for rows, columns in self.grids)

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The grid of level 0 (semantic) and of level 1 (pixel)."""
        return self.semantic_grid, self.pixel_grid


def _bucket(height: int, width: int, vit_height: int, vit_width: int) -> Bucket:
    return Bucket(
        size=(height, width),
        vit_size=(vit_height, vit_width),
        semantic_grid=(vit_height // 28, vit_width // 28),
        pixel_grid=(height // 16, width // 16),
    )


BUCKETS: tuple[Bucket, ...] = (
    _bucket(256, 256, 252, 252),
    _bucket(512, 512, 504, 504),
    _bucket(512, 384, 448, 336),
    _bucket(384, 512, 336, 448),
    _bucket(576, 384, 504, 336),
    _bucket(384, 576, 336, 504),
    _bucket(768, 384, 728, 364),
    _bucket(384, 768, 364, 728),
    _bucket(960, 320, 924, 308),
    _bucket(320, 960, 308, 924),
    _bucket(1024, 256, 1008, 252),
    _bucket(256, 1024, 252, 1008),
)


def bucket_of(config: FocusConfig) -> Bucket:
    """Return the one bucket that a config's own picture sizes describe."""
    return Bucket(
        size=config.pixel.image_size,
        vit_size=config.vanilla.image_size,
        semantic_grid=config.vanilla.grid,
        pixel_grid=config.pixel.grid,
    )


def buckets_for(config: FocusConfig) -> tuple[Bucket, ...]:
    """Return the sizes that a config can write: all twelve if its strides are the paper's."""
    own = bucket_of(config)
    if (config.vanilla.stride, config.pixel.stride) != (28, 16):
        return (own,)
    return BUCKETS if own in BUCKETS else (own, *BUCKETS)


def match_bucket(height: int, width: int, buckets: tuple[Bucket, ...] = BUCKETS) -> Bucket:
    """Return the bucket of nearest width / height; of equal ones, that of nearest size."""
    if height < 1 or width < 1:
        raise ValueError(f"a picture size of at least 1 x 1 expected, got {height} x {width}")

    def distance(bucket: Bucket) -> tuple[float, int]:
        rows, columns = bucket.size
        return abs(columns / rows - width / height), abs(rows * columns - height * width)

    return min(buckets, key=distance)
