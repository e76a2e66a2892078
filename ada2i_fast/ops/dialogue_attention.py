"""Self-attention inside each dialogue of a packed batch (Vaswani et al. 2017): rows attend to rows of their own dialogue.

    out[n] = concat_h  sum_{n' in dialogue(n)}  dropout(softmax(q_h[n] . k_h[n'] / sqrt(d_h)))  v_h[n']
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["dialogue_attention"]


def dialogue_attention(qkv: Tensor, lengths: Sequence[int], heads: int, *, dropout: float = 0.0) -> Tensor:
    """qkv: [N, 3 d], the query, key and value of each row side by side; lengths: rows per dialogue, summing to N; heads
    divides d. dropout: probability, on the attention weights. Returns [N, d].

    Dialogues of equal length go through one batched product; so a dialogue's result has nothing to do with the lengths of
    the others, and nothing is padded.
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    groups: dict[int, list[int]] = {}
    start = 0
    for n in lengths:
        groups.setdefault(n, []).append(start)
        start += n
    groups.pop(0, None)
    if start != rows:
        raise ValueError(f"lengths: expected them to sum to {rows} (the rows of qkv), got {start}")

    def attend(block: Tensor, count: int, n: int) -> Tensor:
        q, k, v = block.view(count, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return out.transpose(1, 2).reshape(count * n, width)

    if len(groups) == 1:
        (n, starts), = groups.items()
        return attend(qkv, len(starts), n)
    # One gather that puts equal lengths together, one that puts the rows back.
    if not groups:
        return qkv.new_zeros(0, width)
    order = torch.cat([(torch.tensor(starts)[:, None] + torch.arange(n)).flatten() for n, starts in groups.items()])
    order = order.to(qkv.device)
    blocks = qkv.index_select(0, order).split([n * len(starts) for n, starts in groups.items()])
    out = [attend(block, len(starts), n) for block, (n, starts) in zip(blocks, groups.items())]
    return torch.cat(out).index_select(0, torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device)))
