"""Bias, ReLU, dropout and bias, dropout, residual, LayerNorm in Triton; mathematics in `ada2i_fast.ops.dropout`.

One launch forward, two backward, for the gradients of the parameters are sums over all rows and come from partial sums (no
float atomics):

    relu_rows, relu_gradients      a tile each;  backward in columns of tiles, with the partial g_b
    norm_rows, norm_gradients      whole rows, a block of columns of the results each, with the partial g_b, g_w, g_c
    reduce_splits                  g_b;  g_b, g_w, g_c

Rows wider than a block are read once for the sums over the width and once more for the program's own columns.
"""

from __future__ import annotations

from functools import partial
from typing import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ada2i_fast.ops.linear import Branch, here

from . import common
from .common import keep

MAX_SPLITS = 128    # partial gradients of parameters: few rows each, or too few programs for a GPU

# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def kept_places(seed, stream, rows, d0, THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr):
    if DROPOUT:
        return keep(seed, stream, rows, d0, THRESHOLD, BLOCK_N, BLOCK_D)
    else:
        return tl.full((BLOCK_N, BLOCK_D), 1, tl.int1)


@triton.jit(do_not_specialize=["rows_total", "stream"])
def relu_rows(x, bias, out, seed, rows_total, stream, keep_scale, D: tl.constexpr, THRESHOLD: tl.constexpr,
              DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (cdiv(N, BLOCK_N), cdiv(D, BLOCK_D))."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d0 = tl.program_id(1) * BLOCK_D
    d = d0 + tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = (rows < rows_total)[:, None] & (d < D)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    value = tl.where(value < 0.0, 0.0, value)       # a NaN stays one
    kept = kept_places(seed, stream, rows, d0, THRESHOLD, DROPOUT, BLOCK_N, BLOCK_D)
    tl.store(out + at, tl.where(kept, value * keep_scale, 0.0).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_total", "row_blocks", "splits"])
def relu_gradients(grad_out, out, grad_x, gradients, rows_total, row_blocks, splits, keep_scale, D: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (cdiv(D, BLOCK_D), splits). gradients: float32 [splits, D]."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    per_split = (row_blocks + splits - 1) // splits * BLOCK_N
    last = tl.minimum((split + 1) * per_split, rows_total)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for row in range(split * per_split, last, BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        at = rows[:, None] * D + d[None, :]
        mask = (rows < last)[:, None] & (d < D)[None, :]
        g = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32) * keep_scale
        g = tl.where(tl.load(out + at, mask=mask, other=0.0).to(tl.float32) > 0.0, g, 0.0)
        tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=mask)
        sums += g
    tl.store(gradients + split * D + d, tl.sum(sums, axis=0), mask=d < D)


@triton.jit
def residual_sum(x, bias, residual, seed, stream, rows, inside, d0, keep_scale, D: tl.constexpr, THRESHOLD: tl.constexpr,
                 DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """s = r + z (x + b) of columns d0 ... d0 + BLOCK_D - 1, and where z is not 0."""
    d = d0 + tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    kept = kept_places(seed, stream, rows, d0, THRESHOLD, DROPOUT, BLOCK_N, BLOCK_D)
    s = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32) + tl.where(kept, value * keep_scale, 0.0)
    return s, kept


@triton.jit
def squares(s, mean, d0, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over columns d0 ... of the squared deviations from the mean, [BLOCK_N]."""
    deviation = tl.where((d0 + tl.arange(0, BLOCK_D) < D)[None, :], s - mean[:, None], 0.0)
    return tl.sum(deviation * deviation, axis=1)


@triton.jit(do_not_specialize=["rows_total", "stream"])
def norm_rows(x, bias, residual, weight, norm_bias, out, rounded, means, rstds, seed, rows_total, stream, eps, keep_scale,
              TWICE: tl.constexpr, D: tl.constexpr, THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (cdiv(N, BLOCK_N), cdiv(D, BLOCK_D)). means, rstds: float32 [N]. TWICE: `rounded` gets the result too."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < rows_total
    own = tl.program_id(1) * BLOCK_D
    s, _ = residual_sum(x, bias, residual, seed, stream, rows, inside, own, keep_scale, D, THRESHOLD, DROPOUT, BLOCK_N, BLOCK_D)
    if D <= BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        mean = tl.sum(tl.where((d < D)[None, :], s, 0.0), axis=1) / D
        variance = squares(s, mean, 0, D, BLOCK_D) / D
    else:
        mean = tl.zeros((BLOCK_N,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            other, _ = residual_sum(x, bias, residual, seed, stream, rows, inside, d0, keep_scale, D, THRESHOLD, DROPOUT,
                                    BLOCK_N, BLOCK_D)
            mean += tl.sum(tl.where((d < D)[None, :], other, 0.0), axis=1)
        mean = mean / D
        variance = tl.zeros((BLOCK_N,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            other, _ = residual_sum(x, bias, residual, seed, stream, rows, inside, d0, keep_scale, D, THRESHOLD, DROPOUT,
                                    BLOCK_N, BLOCK_D)
            variance += squares(other, mean, d0, D, BLOCK_D)
        variance = variance / D
    rstd = tl.rsqrt(variance + eps)
    if own == 0:
        tl.store(means + rows, mean, mask=inside)
        tl.store(rstds + rows, rstd, mask=inside)
    d = own + tl.arange(0, BLOCK_D)
    y = (s - mean[:, None]) * rstd[:, None] * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    y += tl.load(norm_bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    if TWICE:
        tl.store(rounded + rows[:, None] * D + d[None, :], y.to(rounded.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def normalised(grad_out, x, bias, residual, weight, seed, stream, rows, inside, d0, mean, rstd, keep_scale, D: tl.constexpr,
               THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """n, g and h = w g of columns d0 ... d0 + BLOCK_D - 1, and where z is not 0; g and h are 0 outside."""
    s, kept = residual_sum(x, bias, residual, seed, stream, rows, inside, d0, keep_scale, D, THRESHOLD, DROPOUT, BLOCK_N, BLOCK_D)
    d = d0 + tl.arange(0, BLOCK_D)
    g = tl.load(grad_out + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    h = g * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return (s - mean[:, None]) * rstd[:, None], g, h, kept


@triton.jit(do_not_specialize=["rows_total", "row_blocks", "splits", "stream"])
def norm_gradients(grad_out, x, bias, residual, weight, means, rstds, grad_x, grad_residual, gradients, seed, rows_total,
                   row_blocks, splits, stream, keep_scale, D: tl.constexpr, THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (splits, cdiv(D, BLOCK_D)). gradients: float32 [splits, 3 D], the partial g_b, g_w, g_c in a row."""
    split = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * BLOCK_D
    d = own + tl.arange(0, BLOCK_D)
    per_split = (row_blocks + splits - 1) // splits * BLOCK_N
    last = tl.minimum((split + 1) * per_split, rows_total)
    sum_x = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_weight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_norm = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for row in range(split * per_split, last, BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = rows < last
        mean = tl.load(means + rows, mask=inside, other=0.0)
        rstd = tl.load(rstds + rows, mask=inside, other=0.0)
        n, g, h, kept = normalised(grad_out, x, bias, residual, weight, seed, stream, rows, inside, own, mean, rstd, keep_scale,
                                   D, THRESHOLD, DROPOUT, BLOCK_N, BLOCK_D)
        if D <= BLOCK_D:
            mean_h = tl.sum(h, axis=1) / D
            mean_hn = tl.sum(h * n, axis=1) / D
        else:
            mean_h = tl.zeros((BLOCK_N,), tl.float32)
            mean_hn = tl.zeros((BLOCK_N,), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                other_n, _, other_h, _ = normalised(grad_out, x, bias, residual, weight, seed, stream, rows, inside, d0, mean,
                                                    rstd, keep_scale, D, THRESHOLD, DROPOUT, BLOCK_N, BLOCK_D)
                mean_h += tl.sum(other_h, axis=1)
                mean_hn += tl.sum(other_h * other_n, axis=1)
            mean_h = mean_h / D
            mean_hn = mean_hn / D
        at = rows[:, None] * D + d[None, :]
        mask = inside[:, None] & (d < D)[None, :]
        g_s = (h - mean_h[:, None] - n * mean_hn[:, None]) * rstd[:, None]
        g_x = tl.where(kept, g_s * keep_scale, 0.0)
        tl.store(grad_residual + at, g_s.to(grad_residual.dtype.element_ty), mask=mask)
        tl.store(grad_x + at, g_x.to(grad_x.dtype.element_ty), mask=mask)
        sum_x += g_x
        sum_weight += g * n
        sum_norm += g
    to = gradients + split * (3 * D) + d
    tl.store(to, tl.sum(sum_x, axis=0), mask=d < D)
    tl.store(to + D, tl.sum(sum_weight, axis=0), mask=d < D)
    tl.store(to + 2 * D, tl.sum(sum_norm, axis=0), mask=d < D)


# -------------------------------------------------------------------------------------------------------- forward launchers


def relu_forward(x: Tensor, bias: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    """x: [N, d]; bias: [d]; any of float32, bfloat16, float16; seed: int64 [1], needed where p > 0. Returns [N, d], as x."""
    (x, bias), = common.contiguous((x, bias))
    rows, width = x.shape
    out = torch.empty_like(x)
    if rows:
        meta = constants(width, widest=256)
        with common.device_of(x):
            relu_rows[(common.cdiv(rows, meta["BLOCK_N"]), common.cdiv(width, meta["BLOCK_D"]))](
                x, bias, out, seed, rows, stream, 1.0 / (1.0 - p), **common.dropout_arguments(p), **meta)
    return out


def norm_forward(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, p: float, eps: float,
                 seed: Tensor | None, stream: int, rounded: torch.dtype | None = None) -> list[Tensor]:
    """x, residual: [N, d]; the other tensors [d]; each float32, bfloat16 or float16.

    Returns out [N, d], as the residual, and mean and 1 / sqrt(var + eps) of every row, float32 [N]; then out in the dtype `rounded`, if one
    is given.
    """
    (x, bias, residual, weight, norm_bias), = common.contiguous((x, bias, residual, weight, norm_bias))
    rows, width = x.shape
    out = torch.empty_like(residual)
    mean, rstd = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    twice = [] if rounded is None else [torch.empty_like(residual, dtype=rounded)]
    if rows:
        meta = constants(width, widest=2048)
        with common.device_of(x):
            norm_rows[(common.cdiv(rows, meta["BLOCK_N"]), common.cdiv(width, meta["BLOCK_D"]))](
                x, bias, residual, weight, norm_bias, out, twice[0] if twice else None, mean, rstd, seed, rows, stream, eps, 1.0 / (1.0 - p),
                TWICE=bool(twice), **common.dropout_arguments(p), **meta)
    return [out, mean, rstd, *twice]


# ------------------------------------------------------------------------------------------------------- backward launchers


def relu_backward(grad_out: Tensor, out: Tensor, p: float, beside: Branch = here) -> list[Tensor]:
    """grad_out, out: [N, d]; beside: from `ops.linear.branch`, for the gradient of bias. Returns the gradients of x, in the dtype of out, and
    of bias, float32."""
    (grad_out, out), = common.contiguous((grad_out, out))
    rows, width = out.shape
    grad_x = torch.empty_like(out)
    if rows == 0:
        return zeroed([grad_x, out.new_empty((width,), dtype=torch.float32)])
    meta = constants(width, widest=256)
    row_blocks = common.cdiv(rows, meta["BLOCK_N"])
    splits = min(MAX_SPLITS, row_blocks)
    partials = out.new_empty((splits, 1, width), dtype=torch.float32)
    with common.device_of(out):
        relu_gradients[(common.cdiv(width, meta["BLOCK_D"]), splits)](
            grad_out, out, grad_x, partials, rows, row_blocks, splits, 1.0 / (1.0 - p), **meta)
        return [grad_x, *beside(partial(common.reduced, like=[[partials[0, 0]]]), partials)]


def norm_backward(grad_out: Tensor, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, p: float,
                  seed: Tensor | None, stream: int, beside: Branch = here) -> list[Tensor]:
    """mean, rstd: from `norm_forward`; beside: from `ops.linear.branch`, for the gradients of bias, weight and norm_bias. Returns the gradients
    of x, bias, residual, weight and norm_bias, the last in the dtype of weight, the others in their own."""
    (grad_out, x, bias, residual, weight), = common.contiguous((grad_out, x, bias, residual, weight))
    rows, width = x.shape
    if rows == 0:
        return zeroed([torch.empty_like(t) for t in (x, bias, residual, weight, weight)])
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(residual)
    meta = constants(width, widest=2048)
    row_blocks = common.cdiv(rows, meta["BLOCK_N"])
    splits = min(MAX_SPLITS, row_blocks)
    partials = x.new_empty((splits, 1, 3 * width), dtype=torch.float32)
    with common.device_of(x):
        norm_gradients[(splits, common.cdiv(width, meta["BLOCK_D"]))](
            grad_out, x, bias, residual, weight, mean, rstd, grad_x, grad_residual, partials, seed, rows, row_blocks, splits, stream,
            1.0 / (1.0 - p), **common.dropout_arguments(p), **meta)
        grad_bias, *of_norm = beside(partial(common.reduced, like=[[bias], [weight], [weight]]), partials)
    return [grad_x, grad_bias, grad_residual, *of_norm]


def zeroed(grads: Sequence[Tensor]) -> list[Tensor]:
    for t in grads:
        t.zero_()
    return list(grads)


def constants(width: int, widest: int) -> dict:
    """Compile-time sizes: blocks of at most 2048 elements and 8 rows."""
    block = min(max(16, triton.next_power_of_2(width)), widest)
    return {"D": width, "BLOCK_N": min(8, 2048 // block), "BLOCK_D": block, "num_warps": 4, "enable_fp_fusion": True}


def why_not(device: str, dtype: torch.dtype, widths: Sequence[int], rank: int = 1) -> str | None:
    """Why these kernels cannot serve tensors [N, widths[0]] on a device type, or None. Any width will do; rank plays no part."""
    return common.why_not(device, dtype)
