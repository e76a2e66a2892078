"""BalancedAdam: clip, modulate, noise and Adam in one step."""

from __future__ import annotations

from typing import Callable, Mapping

import torch
from torch import Tensor

from . import backends
from .balance import modulation_coefficients, spread
from .ops import balanced_adam

__all__ = ["BalancedAdam"]


class BalancedAdam(torch.optim.Adam):
    """Adam that keeps the modalities of an Ada2I model in balance.

        g <- g min(1, c / |g|)                                   over all parameters, config.clip_norm
        k_m = 1 - tanh(alpha rho_m) if rho_m > 1 else 1          modulation, encoder of modality m only
        noise "gradient":   g <- k_m g + N(0, std(k_m g) + 1e-8),   then Adam
        noise "parameter":  Adam on k_m g, then theta <- theta + N(0, lr std(g))

    model: an `Ada2I`; its configuration gives alpha, noise, clipping, learning rate and weight decay.  lr, weight_decay,
    betas, eps: override.  Spreads are taken per tensor.  backend: "auto" | "torch" | "cpu", see `ada2i_fast.backends`.

    `step(ratio)`: ratio {modality: rho_m} from the model's output, or None for a plain clipped Adam step.
    `last_norm`: the gradient norm before clipping, 0-dimensional, of the last step.

    Contiguous float32 parameters on a CPU take two passes over memory (the norm, then all the rest, `ops.balanced_adam`); the
    gradients stay as they are. Everything else is done by plain PyTorch in the gradients, which then hold what Adam saw.
    The noise follows torch's generator either way, and without noise nothing is drawn from it.
    """

    def __init__(self, model, lr: float | None = None, weight_decay: float | None = None, betas=(0.9, 0.999), eps: float = 1e-8,
                 params=None, backend: str = "auto") -> None:
        config = model.config
        params = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(params, lr=config.learning_rate if lr is None else lr, betas=betas, eps=eps,
                         weight_decay=config.weight_decay if weight_decay is None else weight_decay, fused=True)
        self.config = config
        self.backend = backend
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
        reason = self._why_not_fused(ratio)
        if reason is None:
            self._fused(ratio)
        elif self.backend in ("auto", "torch"):
            self._plain(ratio)
        else:
            raise RuntimeError(f"balanced_adam: backend {self.backend!r} cannot serve this step: {reason}")
        return loss

    # -- one multi-tensor pass -----------------------------------------------------------------------------------------

    def _why_not_fused(self, ratio) -> str | None:
        config = self.config
        if self.backend == "torch":
            return "it is not asked for"
        if config.clip_norm_type != 2:
            return f"the norm of clipping is L{config.clip_norm_type:g}, it knows L2"
        if config.clip_order == "after" and config.noise == "gradient" and ratio is not None:
            return "the norm is that of gradients with noise, which it does not keep"
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"] or group["capturable"] or group["differentiable"]:
                return "amsgrad, maximize, capturable and differentiable are Adam's own"
            if group["betas"] != self.param_groups[0]["betas"] or group["eps"] != self.param_groups[0]["eps"]:
                return "groups differ in betas or eps"
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dtype != torch.float32 or p.grad.dtype != torch.float32 or p.grad.layout != torch.strided:
                    return "it serves dense float32"
                if not p.is_cpu or not (p.is_contiguous() and p.grad.is_contiguous()):
                    return "it serves contiguous tensors on a CPU"
                state = self.state.get(p)
                if state and not (state["exp_avg"].is_contiguous() and state["exp_avg"].dtype == torch.float32 and
                                  state["exp_avg_sq"].is_contiguous() and state["exp_avg_sq"].dtype == torch.float32):
                    return "it serves contiguous float32 states"
        if self.backend == "auto":
            served = backends.best("balanced_adam", "cpu", torch.float32, 1)
            return None if served == "cpu" else "the native library is not there, or ADA2I_FAST_BACKEND=torch"
        return None

    def _fused(self, ratio: Mapping[str, Tensor] | None) -> None:
        config = self.config
        params, numbers, steps, lr, decay = [], [], [], [], []
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:                                   # as torch.optim.Adam keeps it
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                params.append(p)
                numbers.append(number)
                steps.append(state["step"])
                lr.append(float(group["lr"]))
                decay.append(float(group["weight_decay"]))
        if not params:
            self.last_norm = torch.zeros(())
            return
        torch._foreach_add_(steps, 1)
        grads = [p.grad for p in params]
        mean, square = balanced_adam.measure(grads, backend="cpu").unbind(1)
        sizes = torch.tensor([g.numel() for g in grads], dtype=torch.float64)
        k = torch.ones_like(sizes)
        modulated = torch.zeros(len(params), dtype=torch.bool)
        if ratio is not None:
            place = {p: i for i, p in enumerate(params)}
            for m, k_m in modulation_coefficients(ratio, config.alpha).items():
                own = [place[p] for p in self._encoders[m] if p in place]
                k[own] = k_m.to(device="cpu", dtype=torch.float64)
                modulated[own] = True
        squared_norms = square + sizes * mean * mean
        norm = (squared_norms if config.clip_order == "before" else squared_norms * k * k).sum().sqrt()
        self.last_norm = norm.float()
        clip = (config.clip_norm / (norm + 1e-6)).clamp(max=1.0) if config.clip_norm else torch.ones_like(norm)
        # The spread is that of the gradient as modulation finds it: clipped where clipping comes first.
        deviation = (square / (sizes - 1).clamp(min=1)).sqrt() * (clip if config.clip_order == "before" else 1.0)
        t = torch.stack(steps).double()
        lr, (beta1, beta2) = torch.tensor(lr, dtype=torch.float64), self.param_groups[0]["betas"]
        none = torch.zeros_like(sizes)
        settings = torch.stack((
            clip * k, torch.tensor(decay, dtype=torch.float64), lr / (1 - beta1 ** t), (1 - beta2 ** t).rsqrt(),
            torch.where(modulated, deviation * k + 1e-8, none) if config.noise == "gradient" else none,
            torch.where(modulated, deviation * lr, none) if config.noise == "parameter" else none), dim=1)
        seed = torch.randint(2 ** 63 - 1, (1,)) if ratio is not None and config.noise != "none" else None
        balanced_adam.update(params, grads, [self.state[p]["exp_avg"] for p in params], [self.state[p]["exp_avg_sq"] for p in params],
                             settings, numbers=numbers, seed=seed, step=int(t.max()), beta1=beta1, beta2=beta2,
                             eps=self.param_groups[0]["eps"], backend="cpu")

    # -- plain PyTorch -------------------------------------------------------------------------------------------------

    def _plain(self, ratio: Mapping[str, Tensor] | None) -> None:
        config = self.config
        if config.clip_order == "before":
            self._clip()
        kicks = self._modulate(ratio) if ratio is not None else []
        if config.clip_order == "after":
            self._clip()
        super().step()
        for p, deviation in kicks:
            p.add_(torch.randn_like(p) * deviation)

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
                deviation = spread(p.grad) if self.config.noise != "none" else None
                p.grad.mul_(k.to(p.grad))
                if self.config.noise == "gradient":             # std(k g) = k std(g), k being positive
                    p.grad.add_(torch.randn_like(p.grad) * (deviation * k.to(deviation) + 1e-8))
                elif self.config.noise == "parameter":
                    kicks.append((p, deviation * rates[p]))
        return kicks
