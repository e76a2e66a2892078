"""Disparity ratio between modalities and the coefficients that modulate their encoders' gradients."""

from __future__ import annotations

from typing import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["disparity_ratio", "modulation_coefficients", "spread"]


def disparity_ratio(scores: Tensor, modalities: Sequence[str]) -> dict[str, Tensor]:
    """rho_m = s_m / min_j s_j. scores: [M]; returns {modality: 0-dimensional}, views of one tensor."""
    return dict(zip(modalities, (scores / scores.min()).unbind()))


def modulation_coefficients(ratio: Mapping[str, Tensor | float], alpha: float) -> dict[str, Tensor]:
    """k_m = 1 - tanh(alpha rho_m) where rho_m > 1, else 1 (OGM-GE's coefficient on Ada2I's ratio). No host synchronisation."""
    coefficients = {}
    for m, rho in ratio.items():
        rho = torch.as_tensor(rho)
        coefficients[m] = torch.where(rho > 1, 1 - torch.tanh(alpha * rho), torch.ones_like(rho))
    return coefficients


def spread(gradient: Tensor) -> Tensor:
    """Unbiased standard deviation of all elements, 0-dimensional; 0 for a single element, where torch gives NaN."""
    return gradient.std(correction=min(1, gradient.numel() - 1))
