"""Tensor-ring attention and the gate of AFW on packed rows (eqs. 4 to 7).

Per utterance n of dialogue b, modality j, with x_n in R^D and rank R:

    q1, q2, k1, k2 = P_j x_n + p_j                      one product D -> 4R
    u = q1 * k1,   v = q2 * k2                          Theta_n = s u v^T: G_Q * G_K is exactly rank 1
    A_j[b] = s / N_b  sum_{n in b} u v^T                one R x R matrix per dialogue
    C_j[b] = A_l[b] A_o[b] ...                          the other modalities in ring order
    w = s C_j[b]^T v                                    so Theta_n C_j = u w^T
    att_d = sum_{k,o} u_k w_o W_j[d, k, o] + c_j[d]     the map R^2 -> D as a bilinear form
    out = dropout(att * x + beta x)

Backward, with g the gradient of `out` (masked and scaled), t that of the target:

    g_gated = g (+ t if the target is the gated output),   g_att = g_gated * x (+ t if the target is the attention)
    g_x = g_gated * (att + beta)
    g_W[d, k, o] = sum_n g_att_d u_k w_o,               g_c = sum_n g_att
    S_n[k, o] = sum_d g_att_d W[d, k, o];               g_u = S w,   g_w = S^T u
    g_v = s C g_w,                                      g_C[b] = s sum_{n in b} v g_w^T
    g_A from g_C by the product rule around the ring;   g_u += s / N_b g_A v,   g_v += s / N_b g_A^T u
    g_q1 = g_u * k1, g_k1 = g_u * q1, ...;              g_P = [g_q1 ..]^T x,  g_x += P^T [g_q1 ..]
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import keep_mask

__all__ = ["tensor_ring"]


def tensor_ring_torch(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
                      map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], ring: Sequence[Sequence[int]], scale: float,
                      beta: float, dropout: float, seed: Tensor | None,
                      gated_target: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The algebra above in plain PyTorch: any device, any number of derivatives."""
    lengths = offsets.diff()
    ids = torch.repeat_interleave(lengths, output_size=x[0].shape[0])
    u, v, average = [], [], []
    for j in range(len(x)):
        q1, q2, k1, k2 = F.linear(x[j], proj_weight[j], proj_bias[j]).chunk(4, dim=1)
        u.append(q1 * k1)
        v.append(q2 * k2)
        if len(x) > 1:
            outer = u[j][:, :, None] * v[j][:, None, :]
            sums = outer.new_zeros(lengths.numel(), *outer.shape[1:]).index_add(0, ids, outer)
            average.append(sums * (scale / lengths.clamp(min=1).to(sums.dtype))[:, None, None])

    outs, targets = [], []
    for j in range(len(x)):
        w = scale * v[j]
        if len(x) > 1:
            contracted = average[ring[j][0]]
            for l in ring[j][1:]:
                contracted = contracted @ average[l]
            w = torch.einsum("nk,nko->no", w, contracted.index_select(0, ids))
        outer = (u[j][:, :, None] * w[:, None, :]).flatten(start_dim=1)
        attention = F.linear(outer, map_weight[j], map_bias[j])
        gated = attention * x[j] + beta * x[j]
        targets.append(gated if gated_target else attention)
        if dropout == 0.0:
            outs.append(gated)
        elif seed is None:
            outs.append(F.dropout(gated, dropout))
        else:
            outs.append(gated * keep_mask(seed, j, *gated.shape, dropout) / (1.0 - dropout))
    return outs, targets


def tensor_ring(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
                map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], *, ring: Sequence[Sequence[int]], scale: float = 1.0,
                beta: float = 0.0, dropout: float = 0.0, seed: Tensor | None = None, gated_target: bool = False,
                backend: str = "auto") -> tuple[list[Tensor], list[Tensor]]:
    """Tensor-ring attention, gate and dropout of one AFW layer for M modalities.

    x: M tensors [N, D_j].  offsets: int64 [B + 1], dialogue b owns rows offsets[b]:offsets[b + 1].
    proj_weight [4R, D_j], proj_bias [4R]: the projections q1, q2, k1, k2 stacked in this order.
    map_weight [D_j, R * R], map_bias [D_j].
    ring[j]: the other modalities in the order of contraction.  scale: s.  beta: gate.
    dropout: probability; seed: int64 [1] on x's device, the counter-based mask of `ada2i_fast.ops.dropout`, stream j.
    gated_target: the second result is the gated output before dropout, else the attention.

    Returns (out, target), M tensors [N, D_j] each.
    """
    return tensor_ring_torch(x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed,
                             gated_target)
