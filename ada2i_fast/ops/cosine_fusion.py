"""Adaptive modality weighting (eq. 8) on packed rows: joint logits, unimodal logits and disparity scores.

    cos_m = s  (h_m / |h_m|) . W_m / |W_m|  + b / M          W_m [D, C], |W_m| over classes (released) or features (published)
    joint = sum_m cos_m,        or  W [h_1; h_2; ..] + b  without AMW
    unimodal_m = h_m W_m + b / M  ("linear")  or  cos_m  ("cosine"),  without gradient
    s_m = sum_i softmax(unimodal_m)[i, y_i]
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cosine_fusion"]


def cosine_fusion(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, labels: Tensor | None = None, *,
                  amw: bool = True, cosine_norm: str = "features", scale: float = 10.0,
                  score_from: str = "cosine") -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden: M tensors [N, D]; weight [C, M * D]; bias [C] or None; labels int64 [N] or None.

    Returns joint logits [N, C]; unimodal log-probabilities [M, N, C] and scores [M] (None without labels), both without
    gradient.
    """
    count = len(hidden)
    weights = weight.chunk(count, dim=1)
    share = 0.0 if bias is None else bias / count
    axis = 0 if cosine_norm == "classes" else 1

    def cosines() -> list[Tensor]:
        return [scale * F.linear(F.normalize(h, dim=1), F.normalize(w, dim=axis)) + share for h, w in zip(hidden, weights)]

    if amw:
        fused = cosines()
        joint = torch.stack(fused).sum(0)
    else:
        fused = None
        joint = F.linear(torch.cat(list(hidden), dim=1), weight, bias)
    with torch.no_grad():
        if score_from == "cosine":
            unimodal = torch.stack([f.detach() for f in fused] if fused is not None else cosines())
        else:
            unimodal = torch.stack([F.linear(h, w) + share for h, w in zip(hidden, weights)])
        log_prob = F.log_softmax(unimodal, dim=2)
        scores = None
        if labels is not None:
            scores = log_prob.gather(2, labels.expand(count, -1)[:, :, None]).exp().sum(dim=(1, 2))
    return joint, log_prob, scores
