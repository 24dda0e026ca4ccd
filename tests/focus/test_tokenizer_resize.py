"""The bicubic resize as products, against PyTorch's own in fp64."""

import pytest
import torch
import torch.nn.functional as F

from focus.tokenizer.resize import cubic_weights, resize_bicubic

SIZES = [
    ((8, 8), (16, 16)),
    ((9, 13), (16, 24)),
    ((36, 36), (64, 64)),
    ((1, 3), (5, 2)),
    ((16, 16), (8, 7)),
]


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_it_is_the_bicubic_resize(before: tuple[int, int], after: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *before, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x.double(), size=after, mode="bicubic", align_corners=False)
    got = resize_bicubic(x, after)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_same_size_changes_nothing_and_rows_sum_to_one() -> None:
    x = torch.randn(1, 2, 5, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resize_bicubic(x, (5, 7)), x)
    weights = cubic_weights(9, 16, torch.device("cpu"))
    torch.testing.assert_close(weights.sum(1), torch.ones(16))


def test_it_runs_in_fp32_under_autocast_and_passes_gradients() -> None:
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = resize_bicubic(x, (8, 8))
    assert got.dtype == torch.float32
    (grad,) = torch.autograd.grad(got.sum(), x)
    (expected,) = torch.autograd.grad(F.interpolate(x, size=(8, 8), mode="bicubic").sum(), x)
    torch.testing.assert_close(grad, expected)
