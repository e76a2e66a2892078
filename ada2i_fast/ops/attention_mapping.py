"""L_feature of one AFW layer (eq. 12) on packed rows.

    L = sum_j c_j sum_{n, d} | (Phi_j x_n + phi_j)_d - target_{n, d} |

with c_j = 1 / (N D_j) ("sum": the modalities' means are added) or 1 / (N sum_l D_l) ("mean": one mean over all elements).
Backward needs only the sign S of the difference:  g_target = -c S,  g_x = c S Phi,  g_Phi = c S^T x,  g_phi = c sum_n S.
"""

from __future__ import annotations

from typing import Sequence

from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention_mapping"]


def attention_mapping_torch(x: Sequence[Tensor], target: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor],
                            coefficient: Sequence[float]) -> Tensor:
    total = x[0].new_zeros(())
    for x_j, target_j, w, b, c in zip(x, target, weight, bias, coefficient):
        total = total + c * (F.linear(x_j, w, b) - target_j).abs().sum()
    return total


def attention_mapping(x: Sequence[Tensor], target: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], *,
                      reduction: str = "sum", backend: str = "auto") -> Tensor:
    """L1 distance between Phi(x) and its target, M modalities.

    x, target: M tensors [N, D_j]; weight [D_j, D_j], bias [D_j]; reduction "sum" | "mean", see above.
    Returns a 0-dimensional tensor; 0 for an empty batch.
    """
    elements = [t.numel() for t in target]
    if reduction == "mean":
        elements = [sum(elements)] * len(elements)
    elif reduction != "sum":
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    coefficient = [1.0 / n if n else 0.0 for n in elements]
    return attention_mapping_torch(x, target, weight, bias, coefficient)
