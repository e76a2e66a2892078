"""Disparity ratio and modulation coefficients."""

from __future__ import annotations

from typing import Mapping

import torch
from torch import Tensor


def disparity_ratio(unimodal_logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """rho_m = s_m / min_j s_j with s_m = sum_i softmax(logits_m)[i, y_i]; logits [N, C], labels [N]."""
    score = {m: sum(logits[i].softmax(0)[y] for i, y in enumerate(labels)) for m, logits in unimodal_logits.items()}
    weakest = min(score.values())
    return {m: s / weakest for m, s in score.items()}


def modulation_coefficients(ratio: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """k_m = 1 - tanh(alpha rho_m) where rho_m > 1, else 1."""
    return {m: 1 - torch.tanh(alpha * rho) if rho > 1 else torch.ones_like(rho) for m, rho in ratio.items()}
