"""A predicted mask is soft everywhere: no cell is 0 or 1, so no class of equal cells exists."""

import pytest
import torch

from kernels.mask_attention.api import mask_attention


def test_a_mask_without_any_equal_cells_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    shapes = ((2, 3, 64, 16), (3, 1, 16), (3, 1, 16))
    query, keys, values = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    mask = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    found = []
    for implementation in ("structured", "reference"):
        monkeypatch.setenv("FOCUS_KERNELS", implementation)
        inputs = [x.clone().requires_grad_() for x in (query, mask, keys, values)]
        out = mask_attention(*inputs, (8, 8), (16, 16), "rope", 1e4)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, reference in zip(*found, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-9, atol=1e-9)
