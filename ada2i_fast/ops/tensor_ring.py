"""Tensor-ring attention and the gate of AFW on packed rows (eqs. 4 to 7).

Per utterance n of dialogue b, modality j, with x_n in R^D and rank R:

    q1, q2, k1, k2 = P_j x_n + p_j                      one product D -> 4R
    u = q1 * k1,   v = q2 * k2                          Theta_n = s u v^T: G_Q * G_K is exactly rank 1
    A_j[b] = s / N_b  sum_{n in b} u v^T                one R x R matrix per dialogue
    C_j[b] = A_l[b] A_o[b] ...                          the other modalities in ring order
    w = s C_j[b]^T v                                    so Theta_n C_j = u w^T
    att_d = sum_{k,o} u_k w_o W_j[d, k, o] + c_j[d]     the map R^2 -> D as a bilinear form
    out = dropout(att * x + beta x)

Backward, with g the gradient of `out` (masked and scaled), t that of the target:

    g_gated = g (+ t if the target is the gated output),   g_att = g_gated * x (+ t if the target is the attention)
    g_x = g_gated * (att + beta)
    g_W[d, k, o] = sum_n g_att_d u_k w_o,               g_c = sum_n g_att
    S_n[k, o] = sum_d g_att_d W[d, k, o];               g_u = S w,   g_w = S^T u
    g_v = s C g_w,                                      g_C[b] = s sum_{n in b} v g_w^T
    g_A from g_C by the product rule around the ring;   g_u += s / N_b g_A v,   g_v += s / N_b g_A^T u
    g_q1 = g_u * k1, g_k1 = g_u * q1, ...;              g_P = [g_q1 ..]^T x,  g_x += P^T [g_q1 ..]
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from .dropout import gradients_through, keep_mask

__all__ = ["tensor_ring"]


def tensor_ring_torch(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
                      map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], ring: Sequence[Sequence[int]], scale: float,
                      beta: float, dropout: float, seed: Tensor | None,
                      gated_target: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The algebra above in plain PyTorch: any device, any number of derivatives."""
    lengths = offsets.diff()
    ids = torch.repeat_interleave(lengths, output_size=x[0].shape[0])
    u, v, average = [], [], []
    for j in range(len(x)):
        q1, q2, k1, k2 = F.linear(x[j], proj_weight[j], proj_bias[j]).chunk(4, dim=1)
        u.append(q1 * k1)
        v.append(q2 * k2)
        if len(x) > 1:
            outer = u[j][:, :, None] * v[j][:, None, :]
            sums = outer.new_zeros(lengths.numel(), *outer.shape[1:]).index_add(0, ids, outer)
            average.append(sums * (scale / lengths.clamp(min=1).to(sums.dtype))[:, None, None])

    outs, targets = [], []
    for j in range(len(x)):
        w = scale * v[j]
        if len(x) > 1:
            contracted = average[ring[j][0]]
            for l in ring[j][1:]:
                contracted = contracted @ average[l]
            w = torch.einsum("nk,nko->no", w, contracted.index_select(0, ids))
        outer = (u[j][:, :, None] * w[:, None, :]).flatten(start_dim=1)
        attention = F.linear(outer, map_weight[j], map_bias[j])
        gated = attention * x[j] + beta * x[j]
        targets.append(gated if gated_target else attention)
        if dropout == 0.0:
            outs.append(gated)
        elif seed is None:
            outs.append(F.dropout(gated, dropout))
        else:
            outs.append(gated * keep_mask(seed, j, *gated.shape, dropout) / (1.0 - dropout))
    return outs, targets


# ------------------------------------------------------------------------------------------------------- the registered ops

_ops = torch.library.Library("ada2i_fast", "FRAGMENT")
_ops.define("""tensor_ring_forward(Tensor[] x, Tensor offsets, Tensor[] proj_weight, Tensor[] proj_bias, Tensor[] map_weight,
    Tensor[] map_bias, int[] ring, float scale, float beta, float dropout, Tensor? seed, bool gated_target,
    bool with_target, str backend) -> Tensor[]""")
_ops.define("""tensor_ring_backward(Tensor[] grad_out, Tensor[] grad_target, Tensor[] x, Tensor offsets, Tensor[] proj_weight,
    Tensor[] proj_bias, Tensor[] map_weight, Tensor[] map_bias, Tensor[] saved, int[] ring, float scale, float beta,
    float dropout, Tensor? seed, bool gated_target, str backend) -> Tensor[]""")


def _forward(x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed, gated_target, with_target,
             backend):
    """M out. With with_target, M targets if gated_target, then what backward needs: M projections, M means, M attentions (the targets,
    without gated_target)."""
    m = len(x)
    result = backends.module("tensor_ring", backend).forward(
        x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed, gated_target, with_target)
    if not with_target:
        return result[:m]
    return result if gated_target else result[:m] + result[2 * m:]   # an op must not return a tensor twice


def _backward(grad_out, grad_target, x, offsets, proj_weight, proj_bias, map_weight, map_bias, saved, ring, scale, beta, dropout,
              seed, gated_target, backend):
    return backends.module("tensor_ring", backend).backward(
        grad_out, grad_target, x, offsets, proj_weight, proj_bias, map_weight, map_bias, saved, ring, scale, beta, dropout, seed,
        gated_target)


for _device in ("CPU", "CUDA"):
    _ops.impl("tensor_ring_forward", _forward, _device)
    _ops.impl("tensor_ring_backward", _backward, _device)


@torch.library.register_fake("ada2i_fast::tensor_ring_forward")
def _(x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed, gated_target, with_target, backend):
    rows, dialogues, rank4 = x[0].shape[0], offsets.shape[0] - 1, proj_bias[0].shape[0]
    precise = backends.accumulator(x[0].dtype)

    def like_x():
        return [t.new_empty(t.shape) for t in x]

    if not with_target:
        return like_x()
    proj = [t.new_empty((rows, rank4), dtype=t.dtype if backend == "cuda" else precise) for t in x]
    mean = [t.new_empty((dialogues, rank4 // 4, rank4 // 4), dtype=precise) for t in x]
    return like_x() + (like_x() if gated_target else []) + proj + mean + like_x()


@torch.library.register_fake("ada2i_fast::tensor_ring_backward")
def _(grad_out, grad_target, x, offsets, proj_weight, proj_bias, map_weight, map_bias, saved, ring, scale, beta, dropout, seed,
      gated_target, backend):
    return [t.new_empty(t.shape) for tensors in (x, proj_weight, proj_bias, map_weight, map_bias) for t in tensors]


# ------------------------------------------------------------------------------------------------------------------ autograd


class _TensorRing(torch.autograd.Function):
    """Outside the op, so that a call costs one Function and nothing where no gradient is wanted."""

    @staticmethod
    def forward(ctx, ring, scale, beta, dropout, gated_target, backend, seed, offsets, *tensors):
        m = len(tensors) // 5
        result = torch.ops.ada2i_fast.tensor_ring_forward(
            tensors[:m], offsets, tensors[m:2 * m], tensors[2 * m:3 * m], tensors[3 * m:4 * m], tensors[4 * m:], ring, scale, beta,
            dropout, seed, gated_target, True, backend)
        ctx.set_materialize_grads(False)
        ctx.settings = (ring, scale, beta, dropout, gated_target, backend)
        ctx.save_for_backward(seed, offsets, *tensors, *result[-3 * m:])
        return tuple(result[:m] + (result[m:2 * m] if gated_target else result[-m:]))

    @staticmethod
    def backward(ctx, *grads):
        ring, scale, beta, dropout, gated_target, backend = ctx.settings
        seed, offsets, *tensors = ctx.saved_tensors
        m = len(tensors) // 8
        x, proj_weight, proj_bias, map_weight, map_bias = (tensors[i * m:(i + 1) * m] for i in range(5))
        if torch.is_grad_enabled():
            # create_graph=True: the ops have no derivative, the algebra has all.
            result = gradients_through(lambda *t: sum(tensor_ring_torch(
                t[:m], offsets, *([p.to(t[0].dtype) for p in t[i * m:(i + 1) * m]] for i in range(1, 5)), ring_rows(ring, m), scale,
                beta, dropout, seed, gated_target), []), tensors[:5 * m], grads)
        else:
            grad_out, grad_target = grads[:m], grads[m:]
            grad_out = [torch.zeros_like(t) if g is None else g for g, t in zip(grad_out, x)]
            if all(g is None for g in grad_target):
                grad_target = []
            else:
                grad_target = [torch.zeros_like(t) if g is None else g for g, t in zip(grad_target, x)]
            result = torch.ops.ada2i_fast.tensor_ring_backward(
                grad_out, grad_target, x, offsets, proj_weight, proj_bias, map_weight, map_bias, tensors[5 * m:], ring, scale, beta,
                dropout, seed, gated_target, backend)
        return None, None, None, None, None, None, None, None, *result


def ring_rows(ring: Sequence[int], m: int) -> list[list[int]]:
    return [list(ring[j * (m - 1):(j + 1) * (m - 1)]) for j in range(m)]


@torch.compiler.assume_constant_result
def _takes_mixed(op: str, backend: str) -> bool:
    return backend != "torch" and getattr(backends.module(op, backend), "MIXED_PARAMETERS", False)


def fitting(op: str, backend: str, dtype: torch.dtype, *kinds: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parameters as a backend takes them beside x of a dtype: float32 ones as they are where its module says
    MIXED_PARAMETERS and all are float32, else in the dtype of x."""
    if all(t.dtype == torch.float32 for kind in kinds for t in kind) and _takes_mixed(op, backend):
        return [list(kind) for kind in kinds]
    return [[t if t.dtype == dtype else t.to(dtype) for t in kind] for kind in kinds]


def check_layer(x: Sequence[Tensor], offsets: Tensor, dropout: float) -> None:
    """Also what offsets hold, where no device has to be asked."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
    if any(t.dtype != x[0].dtype for t in x):
        raise ValueError(f"x: expected one dtype, got {[t.dtype for t in x]}")
    rows, device = x[0].shape[0], x[0].device
    backends.check_shapes(x[0], x=(x, [(rows, t.shape[-1]) for t in x]))
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.device != device:
        raise ValueError(f"offsets: expected int64 [B + 1] on {device}, got {offsets.dtype} {list(offsets.shape)} on {offsets.device}")
    if device.type == "cpu" and backends.eager([offsets]):
        places = offsets.tolist()
        if not places or places[0] != 0 or places[-1] != rows or places != sorted(places):
            shown = places if len(places) < 9 else [*places[:4], "..", *places[-4:]]
            raise ValueError(f"offsets: expected numbers that rise from 0 to {rows}, the rows of x, got {shown}")


def tensor_ring(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
                map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], *, ring: Sequence[Sequence[int]], scale: float = 1.0,
                beta: float = 0.0, dropout: float = 0.0, seed: Tensor | None = None, gated_target: bool = False,
                with_target: bool = True, backend: str = "auto") -> tuple[list[Tensor], list[Tensor]]:
    """Tensor-ring attention, gate and dropout of one AFW layer for M modalities.

    x: M tensors [N, D_j].  offsets: int64 [B + 1], dialogue b owns rows offsets[b]:offsets[b + 1].
    proj_weight [4R, D_j], proj_bias [4R]: the projections q1, q2, k1, k2 stacked in this order.
    map_weight [D_j, R * R], map_bias [D_j].
    ring[j]: the other modalities in the order of contraction.  scale: s.  beta: gate.
    dropout: probability; seed: int64 [1] on x's device, the counter-based mask of `ada2i_fast.ops.dropout`, stream j.
    gated_target: the second result is the gated output before dropout, else the attention.
    with_target: without, the second result is empty, and where no gradient is wanted nothing but the first is written.

    backend: "auto" | "torch" | "cpu" | "triton" | "cuda", see `ada2i_fast.backends`.

    Everything is computed in the dtype of x, to which parameters are rounded, with sums in float32 (float64 for float64); autocast
    has no say here. Returns (out, target), M tensors [N, D_j] each.
    """
    check_layer(x, offsets, dropout)
    m, dtype, widths, rank = len(x), x[0].dtype, [t.shape[1] for t in x], proj_bias[0].shape[0] // 4
    backends.check_shapes(x[0], proj_weight=(proj_weight, [(4 * rank, d) for d in widths]), proj_bias=(proj_bias, [(4 * rank,)] * m),
                          map_weight=(map_weight, [(d, rank * rank) for d in widths]), map_bias=(map_bias, [(d,) for d in widths]))
    backend = backends.choose("tensor_ring", x, backend, rank=rank)
    proj_weight, proj_bias, map_weight, map_bias = fitting("tensor_ring", backend, dtype, proj_weight, proj_bias, map_weight, map_bias)
    if dropout > 0.0 and seed is None and backend != "torch":
        seed = torch.randint(2 ** 63 - 1, (1,), device=x[0].device)
    if backend == "torch":
        with torch.autocast(x[0].device.type, enabled=False):
            out, target = tensor_ring_torch(x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed,
                                            gated_target)
            return out, target if with_target else []
    if dropout == 0.0:
        seed = None
    tensors = [*x, *proj_weight, *proj_bias, *map_weight, *map_bias]
    flat = [l for others in ring for l in others]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        result = _TensorRing.apply(flat, scale, beta, dropout, gated_target, backend, seed, offsets, *tensors)
        return list(result[:m]), list(result[m:]) if with_target else []
    result = torch.ops.ada2i_fast.tensor_ring_forward(
        x, offsets, proj_weight, proj_bias, map_weight, map_bias, flat, scale, beta, dropout, seed, gated_target, with_target, backend)
    return result[:m], (result[m:2 * m] if gated_target else result[-m:]) if with_target else []
