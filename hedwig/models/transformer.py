"""The pre-norm transformer of both ViCLIP towers, batch first.

Parameters carry the names of OpenAI's CLIP (``attn.in_proj_weight``, ``mlp.c_fc.weight``), attention goes through
`scaled_dot_product_attention`. There is no dropout and no drop path: the official code has both, without weights and
inactive when evaluating.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Transformer"]

QUICK_GELU = 1.702


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, num_outputs: int, causal: bool) -> Tensor:
        """(B, N, W) to (B, num_outputs, W): all tokens are looked at, the first `num_outputs` look."""
        batch, _, width = x.shape
        if num_outputs == x.shape[1]:
            query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            query = F.linear(x[:, :num_outputs], self.in_proj_weight[:width], self.in_proj_bias[:width])
            key, value = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        query, key, value = (t.reshape(batch, t.shape[1], self.heads, -1).transpose(1, 2) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, num_outputs, width))
        return out


class MLP(nn.Module):
    """Two linear layers with QuickGELU, x·sigmoid(1.702x), between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) to (..., W)."""
        hidden = self.c_fc(x)
        out: Tensor = self.c_proj(hidden * torch.sigmoid(QUICK_GELU * hidden))
        return out


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, num_outputs: int, causal: bool) -> Tensor:
        """(B, N, W) to (B, num_outputs, W)."""
        x = x[:, :num_outputs] + self.attn(self.ln_1(x), num_outputs, causal)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, *, causal: bool = False, first_only: bool = False) -> Tensor:
        """(B, N, W) to (B, N, W), or to (B, 1, W) with `first_only`: then the last block skips the other tokens."""
        for i, block in enumerate(self.resblocks):
            last = i == len(self.resblocks) - 1
            x = block(x, 1 if first_only and last else x.shape[1], causal)
        return x
