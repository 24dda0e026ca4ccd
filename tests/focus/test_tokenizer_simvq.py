"""SimVQ as a module: what is frozen, what learns, what stays in fp32."""

from __future__ import annotations

import pytest
import torch

from focus.config import SimVQConfig
from focus.errors import ShapeError
from focus.tokenizer.simvq import CodeUsage, SimVQ

CONFIG = SimVQConfig(num_codes=50, dim=6)


def made(bias: bool = False) -> tuple[SimVQ, torch.Tensor]:
    torch.manual_seed(0)
    vq = SimVQ(SimVQConfig(num_codes=50, dim=6, bias=bias))
    return vq, torch.randn(2, 3, 4, 6)


@pytest.mark.parametrize("bias", [True, False])
def test_simvq_picks_the_nearest_code(bias: bool) -> None:
    vq, x = made(bias)
    table = vq.codebook.double() @ vq.project.weight.double().T
    if bias:
        table = table + vq.project.bias.double()
    expected = torch.cdist(x.double().view(-1, 6), table).argmin(-1).view(2, 3, 4)
    codes, index, _ = vq(x)
    assert torch.equal(index, expected)
    assert torch.equal(vq.nearest(x), expected)
    torch.testing.assert_close(codes, vq.lookup(index))
    torch.testing.assert_close(vq.table()[index], vq.lookup(index))


def test_simvq_loss_and_gradients_follow_the_definition() -> None:
    vq, x = made()
    x.requires_grad_()
    codes, index, loss = vq(x)
    chosen = vq.codebook[index] @ vq.project.weight.T
    expected = (chosen - x.detach()).square().mean() + 0.25 * (x - chosen.detach()).square().mean()
    torch.testing.assert_close(loss, expected)
    up = torch.randn_like(codes)
    got = torch.autograd.grad((codes * up).sum() + loss, [x, vq.project.weight])
    want = torch.autograd.grad(expected, [x, vq.project.weight])
    torch.testing.assert_close(got[0], want[0] + up)  # straight through, plus the commitment
    torch.testing.assert_close(got[1], want[1])


def test_simvq_moves_the_map_and_never_the_codebook() -> None:
    vq, x = made()
    before, weight = vq.codebook.clone(), vq.project.weight.detach().clone()
    optimizer = torch.optim.SGD(vq.parameters(), lr=0.5)
    vq(x).loss.backward()
    optimizer.step()
    assert torch.equal(vq.codebook, before)
    assert not torch.equal(vq.project.weight, weight)
    assert [name for name, _ in vq.named_parameters()] == ["project.weight"]
    assert "codebook" in vq.state_dict()


def test_simvq_codebook_has_the_published_spread() -> None:
    vq = SimVQ(SimVQConfig(num_codes=20_000, dim=32))
    assert vq.codebook.std().item() == pytest.approx(32**-0.5, rel=0.01)


def test_simvq_computes_in_fp32_under_autocast() -> None:
    vq, x = made()
    half = x.bfloat16()
    exact = vq(half.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = vq(half)
        table = vq.table()
    assert torch.equal(rounded.index, exact.index)
    assert torch.equal(rounded.loss, exact.loss)
    assert rounded.codes.dtype == table.dtype == torch.float32


def test_simvq_refuses_another_width() -> None:
    vq, _ = made()
    with pytest.raises(ShapeError, match=r"width 6 expected in the last axis, got \(2, 6, 3\)"):
        vq(torch.zeros(2, 6, 3))


def test_code_usage_counts_codes_over_batches() -> None:
    usage = CodeUsage(4)
    usage.update(torch.tensor([[0, 0], [2, 2]]))
    assert usage.fraction() == 0.5
    assert usage.perplexity() == pytest.approx(2.0)
    usage.update(torch.tensor([1, 1, 3, 3]))
    assert usage.fraction() == 1.0
    assert usage.perplexity() == pytest.approx(4.0)
