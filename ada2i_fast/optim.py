"""BalancedAdam: clip, modulate, noise and Adam in one step."""

from __future__ import annotations

import operator
from typing import Callable, Mapping

import torch
from torch import Tensor

from . import backends, node
from .balance import modulation_coefficients, spread
from .ops import balanced_adam

__all__ = ["BalancedAdam"]

_DTYPE, _LAYOUT, _DEVICE = map(operator.attrgetter, ("dtype", "layout", "device"))


class _Table:
    """What a step needs to know of T parameters, on their device.

    step: float32 [T], of which the states' `step` are views, in a list `steps`. sizes, lr, decay: float64 [T]. numbers: T that tell the tensors'
    noise apart; places: the same, int64 [T], on the CPU.
    """

    def __init__(self, params: list[Tensor], numbers: list[int], states: list[dict], groups: list[int],
                 encoders: list[str | None]) -> None:
        self.params, self.numbers, self._encoders = params, numbers, encoders
        self.step = torch.stack([state["step"].to(params[0].device) for state in states]).float()
        self.steps = list(self.step.unbind())
        self.places = torch.tensor(numbers, device="cpu")
        for state, step in zip(states, self.steps):
            state["step"] = step
        self.sizes = self._tensor([p.numel() for p in params])
        self._groups, self._host = self._tensor(groups, torch.int64), None
        self.lr, self.decay = torch.zeros_like(self.sizes), torch.zeros_like(self.sizes)
        self._owners: dict[tuple[str, ...], Tensor] = {}

    def _tensor(self, values, dtype=torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.step.device)

    def fits(self, params: list[Tensor], states: list[dict]) -> bool:
        return len(params) == len(self.params) and all(map(operator.is_, params, self.params)) and \
            all(state.get("step") is step for state, step in zip(states, self.steps))

    def refresh(self, groups: list[dict]) -> None:
        """Copies what has changed in `param_groups`, in place; a learning rate on the device is read by the device each time."""
        on_device = [isinstance(group["lr"], Tensor) and group["lr"].device == self.step.device for group in groups]
        host = [(None if there else float(group["lr"]), float(group["weight_decay"])) for group, there in zip(groups, on_device)]
        if host != self._host:
            self.lr.copy_(self._tensor([lr or 0.0 for lr, _ in host])[self._groups])
            self.decay.copy_(self._tensor([decay for _, decay in host])[self._groups])
            self._host = host
        for i, (group, there) in enumerate(zip(groups, on_device)):
            if there:
                torch.where(self._groups == i, group["lr"].double(), self.lr, out=self.lr)

    def owner(self, modalities: tuple[str, ...]) -> Tensor:
        """int64 [T]: 1 + the place among `modalities` of the encoder that a parameter belongs to, or 0."""
        if modalities not in self._owners:
            if unknown := set(modalities) - set(self._encoders):
                raise ValueError(f"ratio: expected modalities whose encoders are optimised, got {', '.join(sorted(unknown))}")
            self._owners[modalities] = self._tensor([modalities.index(m) + 1 if m in modalities else 0 for m in self._encoders],
                                                    torch.int64)
        return self._owners[modalities]


class BalancedAdam(torch.optim.Adam):
    """Adam that keeps the modalities of an Ada2I model in balance.

        g <- g min(1, c / |g|)                                   over all parameters, config.clip_norm
        k_m = 1 - tanh(alpha rho_m) if rho_m > 1 else 1          modulation, encoder of modality m only
        noise "gradient":   g <- k_m g + N(0, std(k_m g) + 1e-8),   then Adam
        noise "parameter":  Adam on k_m g, then theta <- theta + N(0, lr std(g))

    model: an `Ada2I`; its configuration gives alpha, noise, clipping, learning rate and weight decay.  lr, weight_decay,
    betas, eps: override.  Spreads are taken per tensor.  backend: "auto" | "torch" | "cpu" | "cuda", see `ada2i_fast.backends`.

    `step(ratio)`: ratio {modality: rho_m} from the model's output, or None for a plain clipped Adam step.
    `last_norm`: the gradient norm before clipping, 0-dimensional, of the last step.

    Contiguous float32 parameters on a CPU or a CUDA device take two passes over memory (the norm, then all the rest,
    `ops.balanced_adam`); the gradients stay as they are. Everything else is done by plain PyTorch in the gradients, which then hold
    what Adam saw. The noise follows torch's generator of the device either way, and without noise nothing is drawn from it.
    The state is that of torch.optim.Adam, `step` on the parameters' device. On CUDA a step asks the device for nothing, so a CUDA
    graph can hold it: steps and noise advance at every replay, learning rates with `refresh`.
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
        self.table: _Table | None = None                        # replaced when parameters, gradients or states come and go

    @torch.no_grad()
    def step(self, ratio: Mapping[str, Tensor] | None = None, closure: Callable | None = None):
        """One update. Returns the closure's loss, if one is given."""
        if callable(ratio) and closure is None:                 # Optimizer.step(closure), as schedulers and trainers call it
            ratio, closure = None, ratio
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gathered = None
        if self.table is not None and self.backend in ("auto", "cpu") and not torch.compiler.is_compiling():
            gathered = node.balanced_adam([group["params"] for group in self.param_groups], self.state, self.table.params, self.table.steps)
        reason = self._why_not_configured(ratio) if gathered else self.why_not_fused(ratio)
        if reason is None:
            self._fused(ratio, gathered)
        elif self.backend in ("auto", "torch"):
            self._plain(ratio)
        else:
            raise RuntimeError(f"balanced_adam: backend {self.backend!r} cannot serve this step: {reason}")
        return loss

    # -- one multi-tensor pass -----------------------------------------------------------------------------------------

    def why_not_fused(self, ratio: Mapping | None) -> str | None:
        """Why a step with such a ratio is not one multi-tensor pass but plain PyTorch, or None. Looks at the gradients there are."""
        return self._why_not_configured(ratio) or self._why_not_tensors()

    def _why_not_configured(self, ratio: Mapping | None) -> str | None:
        config = self.config
        if self.backend == "torch":
            return "it is not asked for"
        if config.clip_norm_type != 2:
            return f"the norm of clipping is L{config.clip_norm_type:g}, it knows L2"
        if config.clip_order == "after" and config.noise == "gradient" and ratio is not None:
            return "the norm is that of gradients with noise, which it does not keep"
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"] or group["differentiable"]:
                return "amsgrad, maximize and differentiable are Adam's own"
            if group["betas"] != self.param_groups[0]["betas"] or group["eps"] != self.param_groups[0]["eps"]:
                return "groups differ in betas or eps"
        return None

    def _why_not_tensors(self) -> str | None:
        # Through `map`, for there are hundreds, at every step.
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        states = [state[name] for p in params if (state := self.state.get(p)) for name in ("exp_avg", "exp_avg_sq")]
        if not {*map(_DTYPE, params), *map(_DTYPE, grads)} <= {torch.float32} or not {*map(_LAYOUT, grads)} <= {torch.strided}:
            return "it serves dense float32"
        devices = [*dict.fromkeys(map(_DEVICE, params))]
        if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
            return f"it serves tensors on one CPU or CUDA device, not {devices[-1]}"
        if not (all(map(Tensor.is_contiguous, params)) and all(map(Tensor.is_contiguous, grads))):
            return "it serves contiguous tensors"
        if not (all(map(Tensor.is_contiguous, states)) and {*map(_DTYPE, states)} <= {torch.float32}):
            return "it serves contiguous float32 states"
        device = devices[0] if devices else self.param_groups[0]["params"][0].device
        if self.backend != "auto":
            return None if self.backend == device.type else f"the tensors are on {device}"
        if backends.best("balanced_adam", device.type, torch.float32, 1) != device.type:
            return "the native library is not there, or ADA2I_FAST_BACKEND=torch"
        return None

    def _fused(self, ratio: Mapping[str, Tensor] | None, gathered: object | None) -> None:
        """Everything happens where the parameters are, and nothing is asked back: a CUDA graph can hold it. gathered: from `node`, or None."""
        config, table = self.config, self.table if gathered else self._prepared()
        if table is None:
            self.last_norm = torch.zeros(())
            return
        params, device, backend = table.params, table.sizes.device, table.sizes.device.type
        if gathered:
            table.refresh(self.param_groups)
            measures = gathered.measure()
        else:
            grads = [p.grad for p in params]
            measures = balanced_adam.measure(grads, backend=backend)
        table.step.add_(1)
        ratios = key = None
        if ratio is not None:
            ratios = torch.stack([torch.as_tensor(rho, device=device) for rho in ratio.values()]).double()
            if config.noise != "none":
                key = torch.randint(2 ** 63 - 1, (1,), device=device)
        beta1, beta2 = self.param_groups[0]["betas"]
        made, self.last_norm, seed = balanced_adam.settings(
            measures, table.sizes, table.step, table.lr, table.decay, table.owner(tuple(ratio or ())),
            ratios, key, noise=config.noise, clip_norm=config.clip_norm, clip_first=config.clip_order == "before", alpha=config.alpha,
            beta1=beta1, beta2=beta2, backend=backend)
        if key is None:
            seed = None
        if gathered:
            gathered.update(made, table.places, seed, beta1, beta2, self.param_groups[0]["eps"])
            return
        balanced_adam.update(params, grads, [self.state[p]["exp_avg"] for p in params], [self.state[p]["exp_avg_sq"] for p in params],
                             made, numbers=table.numbers, seed=seed, beta1=beta1, beta2=beta2,
                             eps=self.param_groups[0]["eps"], backend=backend)

    def _prepared(self) -> _Table | None:
        """What the parameters with a gradient have in common, made when they or their states have changed; None without any."""
        params, numbers, groups = [], [], []
        number = 0
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                number += 1
                if p.grad is not None:
                    params.append(p)
                    numbers.append(number)
                    groups.append(i)
        if not params:
            return None
        states = [self.state[p] for p in params]
        table = self.table
        if table is None or not table.fits(params, states):
            for p, state in zip(params, states):
                if not state:                                   # as torch.optim.Adam keeps it, the steps being views of one tensor
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            encoders = {p: m for m, parameters in self._encoders.items() for p in parameters}
            table = self.table = _Table(params, numbers, states, groups, [encoders.get(p) for p in params])
        table.refresh(self.param_groups)
        return table

    def refresh(self) -> None:
        """Brings learning rates and weight decay that have changed in `param_groups` to the device: before a CUDA graph that holds a
        step is replayed, for there the values of the last refresh count."""
        if self.table is not None:
            self.table.refresh(self.param_groups)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.table = None

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
