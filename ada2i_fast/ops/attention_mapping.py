"""L_feature of one AFW layer (eq. 12) on packed rows.

    L = sum_j c_j sum_{n, d} | (Phi_j x_n + phi_j)_d - target_{n, d} |

with c_j = 1 / (N D_j) ("sum": the modalities' means are added) or 1 / (N sum_l D_l) ("mean": one mean over all elements).
Backward needs only the sign S of the difference:  g_target = -c S,  g_x = c S Phi,  g_Phi = c S^T x,  g_phi = c sum_n S.
So S is kept, a byte per element, and the difference never exists in memory.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from .tensor_ring import fitting

__all__ = ["attention_mapping"]


def attention_mapping_torch(x: Sequence[Tensor], target: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor],
                            coefficient: Sequence[float]) -> Tensor:
    """The formula in plain PyTorch: any device, any number of derivatives."""
    precise = backends.accumulator(x[0].dtype)
    total = x[0].new_zeros((), dtype=precise)
    for x_j, target_j, w, b, c in zip(x, target, weight, bias, coefficient):
        total = total + c * (F.linear(x_j, w, b) - target_j).abs().sum(dtype=precise)
    return total


def coefficients(target: Sequence[Tensor], reduction: str) -> list[float]:
    """c_j; 0 where there are no elements."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    elements = [t.numel() for t in target]
    if reduction == "mean":
        elements = [sum(elements)] * len(elements)
    return [1.0 / n if n else 0.0 for n in elements]


def beyond(x: Tensor, rows: Tensor) -> Tensor:
    """bool [N, 1], True for the rows of x [N, ..] from `rows` (int64 []) on."""
    return torch.arange(x.shape[0], device=rows.device)[:, None] >= rows


def masked(target: Sequence[Tensor], bias: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The target with Phi's bias in the rows from `rows` on, where x is 0: a difference, and a sign, of exactly 0. A bias of another dtype is
    rounded, as backends do."""
    outside = beyond(target[0], rows)
    return [torch.where(outside, b.detach().to(t.dtype), t) for b, t in zip(bias, target)]


# ------------------------------------------------------------------------------------------------------- the registered ops

_ops = torch.library.Library("ada2i_fast", "FRAGMENT")
_ops.define("""attention_mapping_forward(Tensor[] x, Tensor[] target, Tensor[] weight, Tensor[] bias, str reduction,
    str backend) -> Tensor[]""")
_ops.define("""attention_mapping_backward(Tensor grad_loss, Tensor[] x, Tensor[] sign, Tensor[] weight, str reduction,
    str backend) -> Tensor[]""")


def _forward(x, target, weight, bias, reduction, backend):
    """The loss, then M signs."""
    return backends.module("attention_mapping", backend).forward(x, target, weight, bias, coefficients(target, reduction))


def _backward(grad_loss, x, sign, weight, reduction, backend):
    return backends.module("attention_mapping", backend).backward(grad_loss, x, sign, weight, coefficients(sign, reduction))


for _device in ("CPU", "CUDA"):
    _ops.impl("attention_mapping_forward", _forward, _device)
    _ops.impl("attention_mapping_backward", _backward, _device)


@torch.library.register_fake("ada2i_fast::attention_mapping_forward")
def _(x, target, weight, bias, reduction, backend):
    precise = backends.accumulator(x[0].dtype)
    return [x[0].new_empty((), dtype=precise), *(t.new_empty(t.shape, dtype=torch.int8) for t in x)]


@torch.library.register_fake("ada2i_fast::attention_mapping_backward")
def _(grad_loss, x, sign, weight, reduction, backend):
    return [*(t.new_empty(t.shape) for t in x), *(t.new_empty(t.shape) for t in x), *(w.new_empty(w.shape) for w in weight),
            *(w.new_empty(w.shape[:1]) for w in weight)]


# ------------------------------------------------------------------------------------------------------------------ autograd


class _AttentionMapping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reduction, backend, *tensors):
        m = len(tensors) // 4
        x, target, weight, bias = (tensors[i * m:(i + 1) * m] for i in range(4))
        loss, *sign = torch.ops.ada2i_fast.attention_mapping_forward(x, target, weight, bias, reduction, backend)
        ctx.settings = (reduction, backend)
        ctx.save_for_backward(*x, *weight, *sign)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        reduction, backend = ctx.settings
        m = len(ctx.saved_tensors) // 3
        x, weight, sign = (ctx.saved_tensors[i * m:(i + 1) * m] for i in range(3))
        if torch.is_grad_enabled():
            # create_graph=True. The sign is constant almost everywhere, so these are differentiable expressions of all the rest.
            c = [grad_loss * c_j for c_j in coefficients(sign, reduction)]
            s = [(c_j * s_j).to(x_j.dtype) for c_j, s_j, x_j in zip(c, sign, x)]
            result = [*(s_j @ w.to(s_j.dtype) for s_j, w in zip(s, weight)), *(-s_j for s_j in s),
                      *((s_j.t() @ x_j).to(w.dtype) for s_j, x_j, w in zip(s, x, weight)),
                      *(s_j.sum(0).to(w.dtype) for s_j, w in zip(s, weight))]
        else:
            result = torch.ops.ada2i_fast.attention_mapping_backward(grad_loss, x, sign, weight, reduction, backend)
        return None, None, *result


def attention_mapping(x: Sequence[Tensor], target: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], *,
                      reduction: str = "sum", rows: Tensor | None = None, backend: str = "auto") -> Tensor:
    """L1 distance between Phi(x) and its target, M modalities.

    x, target: M tensors [N, D_j]; weight [D_j, D_j], bias [D_j]; reduction "sum" | "mean", see above. rows: int64 [], on the device of x:
    only so many rows count, and N is that number; x has to be 0 in the others.
    backend: "auto" | "torch" | "cpu" | "triton" | "cuda", see `ada2i_fast.backends`.

    Everything is computed in the dtype of x, to which the others are rounded, with sums in float32 (float64 for float64); autocast
    has no say here. Returns a 0-dimensional tensor, float32 or float64; 0 for an empty batch.
    """
    dtype = x[0].dtype
    if any(t.dtype != dtype for t in x):
        raise ValueError(f"x: expected one dtype, got {[t.dtype for t in x]}")
    shapes = [(x[0].shape[0], t.shape[-1]) for t in x]
    backends.check_shapes(x[0], x=(x, shapes), target=(target, shapes), weight=(weight, [(d, d) for _, d in shapes]),
                          bias=(bias, [(d,) for _, d in shapes]))
    target = [t if t.dtype == dtype else t.to(dtype) for t in target]
    backend = backends.choose("attention_mapping", x, backend)
    weight, bias = fitting("attention_mapping", backend, dtype, weight, bias)
    if rows is not None:
        target = masked(target, bias, rows)
        return attention_mapping(x, target, weight, bias, reduction=reduction, backend=backend) * x[0].shape[0] / rows
    if backend == "torch":
        with torch.autocast(x[0].device.type, enabled=False):
            return attention_mapping_torch(x, target, weight, bias, coefficients(target, reduction))
    tensors = [*x, *target, *weight, *bias]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _AttentionMapping.apply(reduction, backend, *tensors)
    return torch.ops.ada2i_fast.attention_mapping_forward(x, target, weight, bias, reduction, backend)[0]
