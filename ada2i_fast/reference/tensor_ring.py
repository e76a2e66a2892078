"""Tensor-ring attention and the gate of AFW, eqs. 4 to 7, with every core materialised."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn


class TensorRing(nn.Module):
    """Parameters of one layer: four projections D -> R and a map R^2 -> D per modality."""

    def __init__(self, widths: Sequence[int], rank: int) -> None:
        super().__init__()
        for name in ("trans_q1", "trans_q2", "trans_k1", "trans_k2"):
            setattr(self, name, nn.ModuleList(Linear(width, rank) for width in widths))
        self.lin_att = nn.ModuleList(Linear(rank * rank, width) for width in widths)


class Linear(nn.Module):
    """The released checkpoints keep each of these maps one level down, as `.lin`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def tensor_ring(layer: TensorRing, x: Sequence[Tensor], *, ring: Sequence[Sequence[int]], scale: float, beta: float,
                mask: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Attention and gated output per modality.

    x: M tensors [B, T, D_j]; ring[j]: the other modalities in the order of their contraction; mask: [B, T], True on real
    rows, or None to average over padding too. Returns (Att, Att * x + beta * x), M tensors [B, T, D_j] each.
    """
    theta, average = [], []
    for j in range(len(x)):
        # eq. 5: the cores are mode-1 Khatri-Rao products, an outer product of two R-vectors per utterance
        core_q = torch.einsum("btk,bto->btko", layer.trans_q1[j](x[j]), layer.trans_q2[j](x[j]))
        core_k = torch.einsum("btk,bto->btko", layer.trans_k1[j](x[j]), layer.trans_k2[j](x[j]))
        theta.append(scale * core_q * core_k)                                   # eq. 4
        if mask is None:
            average.append(theta[j].mean(dim=1))                                # A_j [B, R, R]
        else:
            real = mask[:, :, None, None].to(theta[j].dtype)
            average.append((theta[j] * real).sum(dim=1) / real.sum(dim=1))

    attention = []
    for j in range(len(x)):
        contracted = theta[j]
        for l in ring[j]:                                                       # eq. 6: around the ring
            contracted = torch.einsum("btkl,blo->btko", contracted, average[l])
        attention.append(layer.lin_att[j](contracted.flatten(start_dim=2)))
    gated = [att * x_j + beta * x_j for att, x_j in zip(attention, x)]          # eq. 7
    return attention, gated
