"""Gated cross-attention: what the generated proofs do not reach."""

from __future__ import annotations

import torch

from kernels.gated_cross_attention import absorbed


def test_absorbed_attends_to_tokens_of_a_transposed_map() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 12, 16, generator=generator)
    features = torch.randn(2, 16, 9, 9, generator=generator).flatten(2).transpose(1, 2)
    context, _ = absorbed.attend(rows, features, None)
    expected = torch.softmax(rows @ features.transpose(1, 2), -1) @ features
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
