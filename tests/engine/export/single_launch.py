"""The single-launch kernels in Triton's interpreter; `test_plugins.py` runs this in a process."""

from __future__ import annotations

import pytest
import torch
import triton

import kernels.mask_attention.api  # noqa: F401  registers torch.ops.focus
from kernels.codebook_lookup import single as lookup
from kernels.codebook_lookup.api import codebook_lookup
from kernels.mask_attention import single as attention


def find(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    distance, index = torch.empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    made = lookup.variant(("fp32", "fp32"), x.shape[1])
    lookup.lookup[(triton.cdiv(len(x), lookup.ROWS),)](
        x, codes, len(x), len(codes), distance, index, **made.constants
    )
    return distance, index


def test_the_lookup_is_exact_and_takes_the_lowest_of_equals() -> None:
    g = torch.Generator().manual_seed(2)
    x, codes = torch.randn(35, 8, generator=g), torch.randn(130, 8, generator=g)
    codes[97] = codes[5]
    x[0] = codes[5]
    x[3, 2] = float("nan")
    x[4, 1] = float("inf")
    distance, index = find(x, codes)
    expected = ((x.double()[:, None] - codes.double()) ** 2).sum(-1)
    keep = [i for i in range(35) if i not in (3, 4)]
    assert torch.equal(index[keep], expected.argmin(1)[keep])
    assert index[0] == 5
    assert index[3:5].tolist() == [-1, -1]
    assert distance[3:5].isnan().all()
    assert torch.equal(index, codebook_lookup(x, codes)[0])
    torch.testing.assert_close(distance[keep], expected.min(1).values.float()[keep])
    codes[11, 0] = float("nan")
    assert (find(x, codes)[1] == -1).all()


@pytest.mark.parametrize(
    ("query_grid", "key_grid", "extent", "rope", "dtype"),
    [
        ((5, 7), (5, 7), (10, 14), True, torch.float32),
        ((3, 5), (6, 40), (6, 40), True, torch.float32),
        ((3, 5), (6, 10), (6, 10), False, torch.float32),
        ((4, 4), (8, 8), (8, 8), True, torch.float16),
    ],
)
def test_the_mask_attention_equals_the_operator(
    query_grid: tuple[int, int],
    key_grid: tuple[int, int],
    extent: tuple[int, int],
    rope: bool,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(1)
    batch, heads, dim, num = 2, 2, 16, query_grid[0] * query_grid[1]
    query = torch.randn(batch, heads, num, dim, generator=g).to(dtype)
    mask = (torch.rand(batch, 1, *key_grid, generator=g) * 2).to(dtype)
    keys, values = torch.randn(2, heads, 1, dim, generator=g).to(dtype)
    out = torch.empty_like(query)
    grid = (triton.cdiv(num, attention.ROWS), batch * heads)
    attention.attend[grid](
        query, mask, keys, values, torch.tensor(query_grid), torch.tensor(extent),
        heads, num, *key_grid, out, **attention.constants(dim, rope, 1e4),
    )  # fmt: skip
    exact = [t.double() for t in (query, mask, keys, values)]
    expected = torch.ops.focus.mask_attention(*exact, [*query_grid], [*extent], rope, 1e4)
    limit = 2e-5 if dtype is torch.float32 else 2e-3
    assert (out - expected).abs().max() <= limit * expected.abs().max()
