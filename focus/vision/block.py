"""The pre-norm transformer block that the vanilla encoder and the semantic branch are made of."""

# B batch, S tokens, H heads, D head width, C channels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.errors import ShapeError
from focus.vision.rope2d import Table, rotate


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of CLIP and of Qwen2-VL."""
    return x * torch.sigmoid(1.702 * x)


def initialise(module: nn.Module) -> None:
    """Give every Linear below `module` Xavier-uniform weights and zero biases."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def output_norm(dim: int, gain: float | None) -> nn.Module:
    """Return the norm that ends a projection of visual features, or nothing without a gain.

    Features that were never normalised are many times longer than word embeddings: positions and
    the language model's own writing drown in them (`LLMConfig.visual_gain`).
    """
    if gain is None:
        return nn.Identity()
    norm = nn.RMSNorm(dim, eps=1e-6)
    nn.init.constant_(norm.weight, gain)
    return norm


class Attention(nn.Module):
    """Full self-attention over one picture per row, rotary in two axes."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ShapeError(
                f"dim ({dim}) must be a multiple of num_heads ({num_heads}); change one of them"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Table, mask: Tensor | None = None) -> Tensor:
        """x [B, S, C] -> [B, S, C]; mask [S, S] bool, True where a token may look."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        q, k = rotate(q, table), rotate(k, table)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        projected: Tensor = self.project(out.transpose(1, 2).reshape(batch, tokens, dim))
        return projected


class MLP(nn.Module):
    """Linear, quick GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        out: Tensor = self.down(quick_gelu(self.up(x)))
        return out


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = Attention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, table: Table, mask: Tensor | None = None) -> Tensor:
        """x [B, S, C], rope table of [S, D], mask as in `Attention` -> [B, S, C]."""
        x = x + self.attention(self.attention_norm(x), table, mask)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GatedMLP(nn.Module):
    """SwiGLU with biases: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class GatedBlock(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)): the block of Qwen2.5-VL."""

    def __init__(self, dim: int, num_heads: int, hidden: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(dim, num_heads)
        self.mlp_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.mlp = GatedMLP(dim, hidden)

    def forward(self, x: Tensor, table: Table, mask: Tensor | None = None) -> Tensor:
        """x [B, S, C], rope table of [S, D], mask as in `Attention` -> [B, S, C]."""
        x = x + self.attention(self.attention_norm(x), table, mask)
        x = x + self.mlp(self.mlp_norm(x))
        return x
