"""Adam over many tensors at once, each with a factor and noise of its own (Kingma and Ba, 2015; the balanced update of Ada2I).

Per tensor, with settings (f, lambda, r, c, s_g, s_p) and standard normal e:

    g' = f g + s_g e + lambda theta                                     factor (clip, modulation), noise, weight decay
    m <- m + (1 - beta1) (g' - m),   v <- beta2 v + (1 - beta2) g'^2
    theta <- theta - r m / (sqrt(v) c + eps) + s_p e                    r = lr / (1 - beta1^t),  c = 1 / sqrt(1 - beta2^t)

e is a function of seed, step, the tensor's number and the element: the words of the dropout mask (`ops.dropout`) for row = the
tensor's number, column = element, stream = step. In every block of 32 elements, words i and i + 16 (i < 16) give normals i and i + 16
by Box and Muller (1958): radius sqrt(-2 log((a + 1) 2^-32)), angle 2 pi b 2^-32. Gradients are read, not written.

`measure` gives what the settings are made of, in one pass: mean and sum of squared deviations per tensor, in float64; the squared
norm is deviations + elements * mean^2.

`modulate` writes f g + s_g e into the gradients instead, for an optimiser of another kind.
"""

from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor

from .. import backends
from .dropout import philox_words

__all__ = ["measure", "modulate", "normals", "update"]


def normals(seed: Tensor, number: int, step: int, size: int) -> Tensor:
    """The e of one tensor of `size` elements, float64; plain PyTorch."""
    words = philox_words(seed, step, number, -(-size // 32) * 32).double().reshape(-1, 2, 16)
    radius = torch.sqrt(-2 * torch.log((words[:, 0] + 1) * 2.0 ** -32))
    angle = words[:, 1] * (2 * math.pi * 2.0 ** -32)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1).flatten()[:size]


def measure_torch(grads: Sequence[Tensor]) -> Tensor:
    means = torch.stack([g.double().mean() for g in grads])
    return torch.stack((means, torch.stack([(g.double() - mean).square().sum() for g, mean in zip(grads, means)])), dim=1)


def update_torch(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, step, beta1, beta2, eps) -> None:
    rows = zip(params, grads, exp_avg, exp_avg_sq, settings.tolist(), numbers)
    for p, g, m, v, (factor, decay, rate, root, to_gradient, to_parameter), number in rows:
        noise = normals(seed, number, step, p.numel()).to(p).reshape(p.shape) if seed is not None and (to_gradient or to_parameter) else 0.0
        g = factor * g + to_gradient * noise + decay * p
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.sub_(rate * m / (v.sqrt() * root + eps))
        if to_parameter:
            p.add_(to_parameter * noise)


def modulate_torch(grads, settings, numbers, seed, step) -> None:
    for g, (factor, _, _, _, to_gradient, _), number in zip(grads, settings.tolist(), numbers):
        g.mul_(factor)
        if seed is not None and to_gradient:
            g.add_(to_gradient * normals(seed, number, step, g.numel()).to(g).reshape(g.shape))


_ops = torch.library.Library("ada2i_fast", "FRAGMENT")
_ops.define("balanced_adam_measure(Tensor[] grads, str backend) -> Tensor")
_ops.define("""balanced_adam_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq,
    Tensor settings, int[] numbers, Tensor? seed, int step, float beta1, float beta2, float eps, str backend) -> ()""")
_ops.define("balanced_adam_modulate(Tensor(a!)[] grads, Tensor settings, int[] numbers, Tensor? seed, int step, str backend) -> ()")


def _measure(grads, backend):
    return measure_torch(grads) if backend == "torch" else backends.module("balanced_adam", backend).measure(grads)


def _update(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, step, beta1, beta2, eps, backend):
    run = update_torch if backend == "torch" else backends.module("balanced_adam", backend).update
    run(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, step, beta1, beta2, eps)


def _modulate(grads, settings, numbers, seed, step, backend):
    run = modulate_torch if backend == "torch" else backends.module("balanced_adam", backend).modulate
    run(grads, settings, numbers, seed, step)


for _device in ("CPU", "CUDA"):
    _ops.impl("balanced_adam_measure", _measure, _device)
    _ops.impl("balanced_adam_update", _update, _device)
    _ops.impl("balanced_adam_modulate", _modulate, _device)


@torch.library.register_fake("ada2i_fast::balanced_adam_measure")
def _(grads, backend):
    return grads[0].new_empty((len(grads), 2), dtype=torch.float64)


@torch.library.register_fake("ada2i_fast::balanced_adam_update")
def _(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, step, beta1, beta2, eps, backend):
    return None


@torch.library.register_fake("ada2i_fast::balanced_adam_modulate")
def _(grads, settings, numbers, seed, step, backend):
    return None


def measure(grads: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Mean and sum of squared deviations of each of T dense tensors: float64 [T, 2]."""
    return torch.ops.ada2i_fast.balanced_adam_measure(grads, backends.choose("balanced_adam", [g.reshape(1, -1) for g in grads[:1]], backend))


def update(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
           settings: Tensor, *, numbers: Sequence[int], seed: Tensor | None, step: int, beta1: float, beta2: float, eps: float,
           backend: str = "auto") -> None:
    """The update above, in place on params, exp_avg and exp_avg_sq; T tensors each, contiguous, of one dtype.

    settings: float64 [T, 6], (f, lambda, r, c, s_g, s_p) per tensor. numbers: T distinct numbers that tell the tensors' noise
    apart. seed: int64 [1], or None where no tensor has noise. step: below 2^32, tells the noise of steps with one seed apart.
    """
    backend = backends.choose("balanced_adam", [p.detach().reshape(1, -1) for p in params[:1]], backend)
    torch.ops.ada2i_fast.balanced_adam_update(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, step, beta1, beta2, eps, backend)


def modulate(grads: Sequence[Tensor], settings: Tensor, *, numbers: Sequence[int], seed: Tensor | None, step: int = 0,
             backend: str = "auto") -> None:
    """f g + s_g e in place of each of T gradients, contiguous, of one dtype; arguments as of `update`."""
    backend = backends.choose("balanced_adam", [g.reshape(1, -1) for g in grads[:1]], backend)
    torch.ops.ada2i_fast.balanced_adam_modulate(grads, settings, numbers, seed, step, backend)
