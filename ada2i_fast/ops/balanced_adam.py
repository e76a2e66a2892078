"""Adam over many tensors at once, each with a factor and noise of its own (Kingma and Ba, 2015; the balanced update of Ada2I).

Per tensor, with settings (f, lambda, r, c, s_g, s_p) and standard normal e:

    g' = f g + s_g e + lambda theta                                     factor (clip, modulation), noise, weight decay
    m <- m + (1 - beta1) (g' - m),   v <- beta2 v + (1 - beta2) g'^2
    theta <- theta - r m / (sqrt(v) c + eps) + s_p e                    r = lr / (1 - beta1^t),  c = 1 / sqrt(1 - beta2^t)

e is a function of seed, step, the tensor's number and the element: the words of the dropout mask (`ops.dropout`) for row = the
tensor's number, column = element, stream = step. In every block of 32 elements, words i and i + 16 (i < 16) give normals i and i + 16
by Box and Muller (1958): radius sqrt(-2 log((a + 1) 2^-32)), angle 2 pi b 2^-32. Gradients are read, not written.

`measure` gives what the settings are made of, in one pass: mean and sum of squared deviations per tensor, in float64; the squared
norm is deviations + elements * mean^2. `settings` makes them: with the norm |g| over all tensors, clip c, and per tensor
k = 1 - tanh(alpha rho) if it belongs to a modality of rho > 1, else 1, and std(g)

    f = k min(1, c / (|g| + 1e-6)),    s_g = k std(g) + 1e-8  or  s_p = lr std(g)   where it belongs to a modality at all

|g| and std(g) being those of the gradient as clipping and modulation find it: the first of the two sees the raw one.

`modulate` writes f g + s_g e into the gradients instead, for an optimiser of another kind.
"""

from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor

from .. import backends
from ..balance import modulation_coefficients
from .dropout import philox_words

__all__ = ["measure", "modulate", "normals", "settings", "spreads", "update"]


def normals(seed: Tensor, number: int, step: int, size: int) -> Tensor:
    """The e of one tensor of `size` elements, float64; plain PyTorch."""
    words = philox_words(seed, step, number, -(-size // 32) * 32).double().reshape(-1, 2, 16)
    radius = torch.sqrt(-2 * torch.log((words[:, 0] + 1) * 2.0 ** -32))
    angle = words[:, 1] * (2 * math.pi * 2.0 ** -32)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1).flatten()[:size]


def measure_torch(grads: Sequence[Tensor]) -> Tensor:
    means = torch.stack([g.double().mean() for g in grads])
    return torch.stack((means, torch.stack([(g.double() - mean).square().sum() for g, mean in zip(grads, means)])), dim=1)


def spreads(measures: Tensor, sizes: Tensor) -> Tensor:
    """Unbiased standard deviation of each tensor, 0 for a single element: [T], of measures [T, 2] and sizes [T]."""
    return (measures[:, 1] / (sizes - 1).clamp(min=1)).sqrt()


def settings_torch(measures, sizes, step, lr, decay, owner, ratio, key, noise, clip_norm, clip_first, alpha, beta1,
                   beta2) -> list[Tensor]:
    mean, square = measures.unbind(1)
    none, t = torch.zeros_like(sizes), step.double()
    k = torch.ones_like(sizes)
    if ratio is not None:
        k = torch.cat((k[:1], modulation_coefficients({"all": ratio}, alpha)["all"]))[owner]
    squared_norms = square + sizes * mean * mean
    norm = (squared_norms if clip_first else squared_norms * k * k).sum().sqrt()
    clip = (clip_norm / (norm + 1e-6)).clamp(max=1.0) if clip_norm else torch.ones_like(norm)
    spread = spreads(measures, sizes) * (clip if clip_first else 1.0)
    noisy = owner > 0
    made = torch.stack((
        clip * k, decay, lr / (1 - beta1 ** t), (1 - beta2 ** t).rsqrt(),
        torch.where(noisy, spread * k + 1e-8, none) if ratio is not None and noise == "gradient" else none,
        torch.where(noisy, spread * lr, none) if ratio is not None and noise == "parameter" else none), dim=1)
    seed = torch.cat((torch.zeros_like(owner[:1]) if key is None else key, step.max().long().reshape(1)))
    return [made, norm.float(), seed]


def update_torch(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, beta1, beta2, eps) -> None:
    key, step = (None, 0) if seed is None else (seed[0], int(seed[1]))
    rows = zip(params, grads, exp_avg, exp_avg_sq, settings.tolist(), numbers)
    for p, g, m, v, (factor, decay, rate, root, to_gradient, to_parameter), number in rows:
        noise = normals(key, number, step, p.numel()).to(p).reshape(p.shape) if seed is not None and (to_gradient or to_parameter) else 0.0
        g = factor * g + to_gradient * noise + decay * p
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.sub_(rate * m / (v.sqrt() * root + eps))
        if to_parameter:
            p.add_(to_parameter * noise)


def modulate_torch(grads, settings, numbers, seed) -> None:
    key, step = (None, 0) if seed is None else (seed[0], int(seed[1]))
    for g, (factor, _, _, _, to_gradient, _), number in zip(grads, settings.tolist(), numbers):
        g.mul_(factor)
        if seed is not None and to_gradient:
            g.add_(to_gradient * normals(key, number, step, g.numel()).to(g).reshape(g.shape))


_ops = torch.library.Library("ada2i_fast", "FRAGMENT")
_ops.define("balanced_adam_measure(Tensor[] grads, str backend) -> Tensor")
_ops.define("""balanced_adam_settings(Tensor measures, Tensor sizes, Tensor step, Tensor lr, Tensor decay, Tensor owner, Tensor? ratio,
    Tensor? key, str noise, float clip_norm, bool clip_first, float alpha, float beta1, float beta2, str backend) -> Tensor[]""")
_ops.define("""balanced_adam_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq,
    Tensor settings, int[] numbers, Tensor? seed, float beta1, float beta2, float eps, str backend) -> ()""")
_ops.define("balanced_adam_modulate(Tensor(a!)[] grads, Tensor settings, int[] numbers, Tensor? seed, str backend) -> ()")


def _measure(grads, backend):
    return measure_torch(grads) if backend == "torch" else backends.module("balanced_adam", backend).measure(grads)


def _settings(measures, sizes, step, lr, decay, owner, ratio, key, noise, clip_norm, clip_first, alpha, beta1, beta2, backend):
    run = backends.module("balanced_adam", backend).settings if backend == "cuda" else settings_torch
    return run(measures, sizes, step, lr, decay, owner, ratio, key, noise, clip_norm, clip_first, alpha, beta1, beta2)


def _update(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, beta1, beta2, eps, backend):
    run = update_torch if backend == "torch" else backends.module("balanced_adam", backend).update
    run(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, beta1, beta2, eps)


def _modulate(grads, settings, numbers, seed, backend):
    run = backends.module("balanced_adam", backend).modulate if backend == "cpu" else modulate_torch
    run(grads, settings, numbers, seed)


for _device in ("CPU", "CUDA"):
    _ops.impl("balanced_adam_measure", _measure, _device)
    _ops.impl("balanced_adam_settings", _settings, _device)
    _ops.impl("balanced_adam_update", _update, _device)
    _ops.impl("balanced_adam_modulate", _modulate, _device)


@torch.library.register_fake("ada2i_fast::balanced_adam_measure")
def _(grads, backend):
    return grads[0].new_empty((len(grads), 2), dtype=torch.float64)


@torch.library.register_fake("ada2i_fast::balanced_adam_settings")
def _(measures, sizes, step, lr, decay, owner, ratio, key, noise, clip_norm, clip_first, alpha, beta1, beta2, backend):
    return [sizes.new_empty(sizes.shape[0], 6), step.new_empty(()), owner.new_empty(2)]


@torch.library.register_fake("ada2i_fast::balanced_adam_update")
def _(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, beta1, beta2, eps, backend):
    return None


@torch.library.register_fake("ada2i_fast::balanced_adam_modulate")
def _(grads, settings, numbers, seed, backend):
    return None


def measure(grads: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Mean and sum of squared deviations of each of T dense tensors: float64 [T, 2]."""
    return torch.ops.ada2i_fast.balanced_adam_measure(grads, backends.choose("balanced_adam", [g.reshape(1, -1) for g in grads[:1]], backend))


def settings(measures: Tensor, sizes: Tensor, step: Tensor, lr: Tensor, decay: Tensor, owner: Tensor, ratio: Tensor | None = None,
             key: Tensor | None = None, *, noise: str, clip_norm: float, clip_first: bool, alpha: float, beta1: float, beta2: float,
             backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The settings of an update, all on one device.

    measures: float64 [T, 2]; sizes, lr, decay: float64 [T]; step: float32 [T], counting this one; owner: int64 [T], 1 + the place in
    ratio of the modality that a tensor belongs to, or 0; ratio: float64 [M], or None for neither modulation nor noise; key: int64 [1] the
    seed of the noise. noise: "none" | "gradient" | "parameter". clip_norm: c, 0 for none. clip_first: before modulation.
    backend: "cuda", or another for plain PyTorch. Returns settings [T, 6], the norm (float32 []) and the seed for `update` (int64 [2]).
    """
    return tuple(torch.ops.ada2i_fast.balanced_adam_settings(measures, sizes, step, lr, decay, owner, ratio, key, noise, clip_norm,
                                                             clip_first, alpha, beta1, beta2, backend))


def update(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
           settings: Tensor, *, numbers: Sequence[int], seed: Tensor | None, beta1: float, beta2: float, eps: float,
           backend: str = "auto") -> None:
    """The update above, in place on params, exp_avg and exp_avg_sq; T tensors each, contiguous, of one dtype.

    settings: float64 [T, 6], (f, lambda, r, c, s_g, s_p) per tensor. numbers: T distinct numbers that tell the tensors' noise
    apart. seed: int64 [2], a seed and a step below 2^32, which tells the noise of steps with one seed apart; or None where no tensor
    has noise. settings and seed live where the tensors do, and no number of theirs is asked for: a CUDA graph can hold the call.
    """
    shapes = [p.shape for p in params]
    backends.check_shapes(params[0], grads=(grads, shapes), exp_avg=(exp_avg, shapes), exp_avg_sq=(exp_avg_sq, shapes),
                          settings=(settings, (len(params), 6)))
    _check_numbers(numbers, params)
    backend = backends.choose("balanced_adam", [p.detach().reshape(1, -1) for p in params[:1]], backend)
    torch.ops.ada2i_fast.balanced_adam_update(params, grads, exp_avg, exp_avg_sq, settings, numbers, seed, beta1, beta2, eps, backend)
    if not torch.compiler.is_compiling():                       # for graphs that have saved them: the kernels write past torch
        torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq])


def _check_numbers(numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
    if len(numbers) != len(tensors):
        raise ValueError(f"numbers: expected {len(tensors)}, one for each tensor, got {len(numbers)}")


def modulate(grads: Sequence[Tensor], settings: Tensor, *, numbers: Sequence[int], seed: Tensor | None, backend: str = "auto") -> None:
    """f g + s_g e in place of each of T gradients, contiguous, of one dtype; arguments as of `update`."""
    backends.check_shapes(grads[0], settings=(settings, (len(grads), 6)))
    _check_numbers(numbers, grads)
    backend = backends.choose("balanced_adam", [g.reshape(1, -1) for g in grads[:1]], backend)
    torch.ops.ada2i_fast.balanced_adam_modulate(grads, settings, numbers, seed, backend)
