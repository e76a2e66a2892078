"""Adaptive modality weighting, eq. 8: joint logits as a sum of cosines, unimodal logits, and the disparity scores."""

from __future__ import annotations

from typing import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cosine_fusion(hidden: Mapping[str, Tensor], output: nn.Linear, *, amw: bool, cosine_norm: str, scale: float,
                  score_from: str) -> tuple[Tensor, dict[str, Tensor]]:
    """hidden: {modality: [N, D]}; output: weight [C, M D], bias [C] or None. Returns joint logits [N, C] and
    {modality: [N, C]} unimodal logits, the latter without gradient."""
    share = 0.0 if output.bias is None else output.bias / len(hidden)
    weights = dict(zip(hidden, output.weight.chunk(len(hidden), dim=1)))        # W_m^T [C, D]

    def cosine(m: str) -> Tensor:
        axis = 0 if cosine_norm == "classes" else 1
        return scale * F.normalize(hidden[m], dim=1) @ F.normalize(weights[m], dim=axis).T + share

    if amw:
        joint = sum(cosine(m) for m in hidden)
    else:
        joint = output(torch.cat(list(hidden.values()), dim=1))
    with torch.no_grad():
        if score_from == "cosine":
            unimodal = {m: cosine(m) for m in hidden}
        else:
            unimodal = {m: hidden[m] @ weights[m].T + share for m in hidden}
    return joint, unimodal
