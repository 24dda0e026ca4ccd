"""Gated cross-attention: what the generated proofs do not reach."""

from __future__ import annotations

import pytest
import torch

from kernels.gated_cross_attention import absorbed, absorbed_backward, reference


def test_absorbed_attends_to_tokens_of_a_transposed_map() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 12, 16, generator=generator)
    features = torch.randn(2, 16, 9, 9, generator=generator).flatten(2).transpose(1, 2)
    context, _ = absorbed.attend(rows, features, None)
    expected = torch.softmax(rows @ features.transpose(1, 2), -1) @ features
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_queries", [1, 40])  # row by row; from the folded products
def test_projections_get_the_gradients_of_eq_3(num_queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dim, channels, heads, tokens = 64, 48, 4, 30
    shapes = [(2, num_queries, dim)] * 2 + [(2, tokens, channels), (dim, channels), (dim,)]
    shapes += [(dim, dim)] * 4 + [(1,)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    grad = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    for leaf in leaves:
        leaf.requires_grad_(True)
    out = reference.gated_cross_attention(*leaves, heads, None)
    expected = torch.autograd.grad((out * grad).sum(), leaves[1:])
    inputs = [leaf.detach() for leaf in leaves[1:]]
    found = absorbed_backward.gated_cross_attention_backward(grad, *inputs, heads, None, True)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-6, atol=1e-6)
