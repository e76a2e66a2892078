"""L_feature, eq. 12: the L1 distance between Phi_m(Z_m) and its target."""

from __future__ import annotations

from typing import Sequence

from torch import Tensor, nn


class AttentionMapping(nn.Module):
    """Phi: one linear map D -> D per modality."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(width, width) for width in widths)


def attention_mapping(layer: AttentionMapping, x: Sequence[Tensor], target: Sequence[Tensor], *, reduction: str,
                      mask: Tensor | None) -> Tensor:
    """x, target: M tensors [B, T, D_j]; mask: [B, T], True on the rows that count, or None for all.

    reduction "mean": over all elements of all modalities; "sum": over modalities of the mean over elements. 0-dimensional.
    """
    total, means, count = 0.0, 0.0, 0
    for j in range(len(x)):
        distance = (layer.fc[j](x[j]) - target[j]).abs()
        if mask is not None:
            distance = distance[mask]
        total, means, count = total + distance.sum(), means + distance.mean(), count + distance.numel()
    return total / count if reduction == "mean" else means
