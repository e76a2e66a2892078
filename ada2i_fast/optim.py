"""BalancedAdam: clip, modulate, noise and Adam in one step."""

from __future__ import annotations

from typing import Callable, Mapping

import torch
from torch import Tensor

from .balance import modulation_coefficients

__all__ = ["BalancedAdam"]


class BalancedAdam(torch.optim.Adam):
    """Adam that keeps the modalities of an Ada2I model in balance.

        g <- g min(1, c / |g|)                                   over all parameters, config.clip_norm
        k_m = 1 - tanh(alpha rho_m) if rho_m > 1 else 1          modulation, encoder of modality m only
        noise "gradient":   g <- k_m g + N(0, std(k_m g) + 1e-8),   then Adam
        noise "parameter":  Adam on k_m g, then theta <- theta + N(0, lr std(g))

    model: an `Ada2I`; its configuration gives alpha, noise, clipping, learning rate and weight decay.  lr, weight_decay,
    betas, eps: override.  Spreads are taken per tensor.

    `step(ratio)`: ratio {modality: rho_m} from the model's output, or None for a plain clipped Adam step.
    `last_norm`: the gradient norm before clipping, 0-dimensional, of the last step.
    """

    def __init__(self, model, lr: float | None = None, weight_decay: float | None = None, betas=(0.9, 0.999), eps: float = 1e-8,
                 params=None) -> None:
        config = model.config
        params = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(params, lr=config.learning_rate if lr is None else lr, betas=betas, eps=eps,
                         weight_decay=config.weight_decay if weight_decay is None else weight_decay, fused=True)
        self.config = config
        self.last_norm: Tensor | None = None
        self._encoders = {m: list(encoder.parameters()) for m, encoder in model.net.encoder.items()}

    @torch.no_grad()
    def step(self, ratio: Mapping[str, Tensor] | None = None, closure: Callable | None = None):
        """One update. Returns the closure's loss, if one is given."""
        if callable(ratio) and closure is None:                 # Optimizer.step(closure), as schedulers and trainers call it
            ratio, closure = None, ratio
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        config = self.config
        if config.clip_order == "before":
            self._clip()
        kicks = self._modulate(ratio) if ratio is not None else []
        if config.clip_order == "after":
            self._clip()
        super().step()
        for p, spread in kicks:
            p.add_(torch.randn_like(p) * spread)
        return loss

    def _clip(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        limit = self.config.clip_norm or float("inf")
        self.last_norm = torch.nn.utils.clip_grad_norm_(parameters, limit, self.config.clip_norm_type, foreach=True)

    def _modulate(self, ratio: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Scales the encoders' gradients and draws their noise; returns the parameters to kick after the update."""
        rates = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        kicks = []
        for m, k in modulation_coefficients(ratio, self.config.alpha).items():
            for p in self._encoders[m]:
                if p.grad is None:
                    continue
                spread = p.grad.std(correction=min(1, p.numel() - 1)) if self.config.noise != "none" else None
                p.grad.mul_(k.to(p.grad))
                if self.config.noise == "gradient":             # std(k g) = k std(g), k being positive
                    p.grad.add_(torch.randn_like(p.grad) * (spread * k.to(spread) + 1e-8))
                elif self.config.noise == "parameter":
                    kicks.append((p, spread * rates[p]))
        return kicks
