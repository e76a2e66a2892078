"""The balanced update: clip, modulate, noise, Adam, one tensor at a time."""

from __future__ import annotations

from typing import Mapping

import torch
from torch import Tensor

from .balance import modulation_coefficients


def balanced_step(model, adam: torch.optim.Adam, ratio: Mapping[str, Tensor] | None) -> Tensor:
    """One update of `model` (a textbook or fast Ada2I) from the gradients that it holds. Returns the gradient norm.

    ratio: {modality: rho_m}, or None to leave modulation and noise out. Only encoder parameters are modulated.
    theta <- theta - eta k_m g, plus noise: on g with std(k_m g), or on theta with eta std(g).
    """
    config = model.config

    def clip():
        return torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or float("inf"), config.clip_norm_type)

    norm = clip() if config.clip_order == "before" else None
    noisy = []
    for m, k in (modulation_coefficients(ratio, config.alpha) if ratio is not None else {}).items():
        for p in model.net.encoder[m].parameters():
            spread = p.grad.std(correction=min(1, p.numel() - 1))
            p.grad = k * p.grad
            if config.noise == "gradient":
                p.grad += torch.randn_like(p) * (p.grad.std(correction=min(1, p.numel() - 1)) + 1e-8)
            elif config.noise == "parameter":
                noisy.append((p, spread))
    if norm is None:
        norm = clip()
    adam.step()
    with torch.no_grad():
        for p, spread in noisy:
            p += adam.param_groups[0]["lr"] * spread * torch.randn_like(p)
    return norm
