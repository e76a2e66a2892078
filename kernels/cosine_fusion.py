"""Cosine fusion of AMW in Triton; mathematics and notation in `ada2i_fast.ops.cosine_fusion`.

Forward, two launches, or one without labels: joint logits are a sum over modalities, so one program takes a tile of rows through all of
them, and what remains is a sum over all rows.

    fuse_forward    joint logits, unimodal log-probabilities, norms of the rows;  the scores of each program's rows
    sum_scores      scores and disparity ratio

Backward, two, for g_W passes through the norm of W and needs complete sums over all rows (no float atomics):

    fuse_backward   g_h;  in other programs of the launch partial t = s (a h)^T G, and sums of G
    project_weight  g_W, g_b

Norms of W are taken anew by whoever needs them: W is a few thousand numbers. CP pads the classes for the tensor cores.
"""

from __future__ import annotations

from typing import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import multiply, select

# Rows up to which a program of the forward pass takes 4 of them instead of 16: it walks through all modalities, and 500 rows in blocks of
# 16 occupy 32 multiprocessors. More than that fill a GPU as they are, and larger blocks read the weight less often.
FEW_ROWS = 2048

# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def inverse(norm):
    return 1.0 / tl.maximum(norm, 1e-12)


@triton.jit
def load_rows(hidden, rows, inside, d0, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """h: float32 [BLOCK_N, BLOCK_D], 0 outside."""
    d = d0 + tl.arange(0, BLOCK_D)
    return tl.load(hidden + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_weight(weight, m, d0, M: tl.constexpr, D: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BLOCK_D: tl.constexpr):
    """W_m^T: float32 [CP, BLOCK_D], 0 outside."""
    c = tl.arange(0, CP)
    d = d0 + tl.arange(0, BLOCK_D)
    return tl.load(weight + c[:, None] * (M * D) + m * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def unit_features(w):
    """Every feature's weights of unit norm over the classes."""
    return w * inverse(tl.sqrt(tl.sum(w * w, axis=0)))[None, :]


@triton.jit(do_not_specialize=["rows_total"])
def fuse_forward(hiddens, weight, bias, labels, joint, log_prob, norms, scores, rows_total, scale, M: tl.constexpr, D: tl.constexpr,
                 C: tl.constexpr, CP: tl.constexpr, AMW: tl.constexpr, OVER_CLASSES: tl.constexpr, LINEAR: tl.constexpr,
                 PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (cdiv(N, BLOCK_N),). LINEAR: the scores come from the linear map. scores: float32 [programs, M]; None without labels."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < rows_total
    c = tl.arange(0, CP)
    mask = inside[:, None] & (c < C)[None, :]
    share = tl.zeros((CP,), tl.float32)
    if bias is not None:
        share += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32) / M
    fused = tl.zeros((BLOCK_N, CP), tl.float32)
    for m in range(M):
        hidden = select(m, hiddens, M)
        cosine = tl.zeros((BLOCK_N, CP), tl.float32)
        mapped = tl.zeros((BLOCK_N, CP), tl.float32)
        square = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)           # summed over the width once, and not per block of it
        weight_square = tl.zeros((CP, BLOCK_D), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            h = load_rows(hidden, rows, inside, d0, D, BLOCK_D)
            w = load_weight(weight, m, d0, M, D, C, CP, BLOCK_D)
            square += h * h
            if AMW or not LINEAR:
                v = w
                if OVER_CLASSES:
                    v = unit_features(w)
                else:
                    weight_square += w * w
                cosine = multiply(h, tl.trans(v), cosine, PRECISION)
            if LINEAR or not AMW:
                mapped = multiply(h, tl.trans(w), mapped, PRECISION)
        norm = tl.sqrt(tl.sum(square, axis=1))
        tl.store(norms + m * rows_total.to(tl.int64) + rows, norm, mask=inside)
        cosine *= (scale * inverse(norm))[:, None]
        if not OVER_CLASSES:
            cosine *= inverse(tl.sqrt(tl.sum(weight_square, axis=1)))[None, :]
        cosine += share[None, :]
        mapped += share[None, :]
        fused += cosine if AMW else mapped
        logits = tl.where((c < C)[None, :], mapped if LINEAR else cosine, -float("inf"))
        logits -= tl.max(logits, axis=1)[:, None]
        logits -= tl.log(tl.sum(tl.exp(logits), axis=1))[:, None]
        tl.store(log_prob + (m * rows_total.to(tl.int64) + rows)[:, None] * C + c[None, :], logits, mask=mask)
        if labels is not None:
            label = tl.load(labels + rows, mask=inside, other=-1)
            own = tl.where(c[None, :] == label[:, None], tl.exp(logits), 0.0)
            tl.store(scores + tl.program_id(0).to(tl.int64) * M + m, tl.sum(tl.sum(own, axis=1), axis=0))
    tl.store(joint + rows[:, None] * C + c[None, :], fused.to(joint.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["programs"])
def sum_scores(partial, scores, ratio, programs, M: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (1,). partial: float32 [programs, M]."""
    m = tl.arange(0, MP)
    total = tl.zeros((BLOCK, MP), tl.float32)
    for first in range(0, programs, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(partial + place[:, None] * M + m[None, :], mask=(place < programs)[:, None] & (m < M)[None, :], other=0.0)
    score = tl.sum(total, axis=0)
    weakest = tl.min(tl.where(m < M, score, float("inf")), axis=0)
    whole = tl.sum(score, axis=0)                               # NaN if one of them is
    weakest = tl.where(whole == whole, weakest, whole)
    tl.store(scores + m, score, mask=m < M)
    tl.store(ratio + m, tl.div_rn(score, weakest), mask=m < M)        # exactly 1 for the weakest: `/` is not exact on a GPU


@triton.jit(do_not_specialize=["rows_total", "row_blocks", "splits"])
def fuse_backward(grad_joint, hiddens, weight, norms, grad_hiddens, gradients, rows_total, row_blocks, splits, scale, M: tl.constexpr,
                  D: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, LENGTH: tl.constexpr, AMW: tl.constexpr,
                  OVER_CLASSES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (row_blocks * M + splits * M * DB,), DB = cdiv(D, BLOCK_D): first a tile of the rows of one modality each, then a tile of
    t over one split of the rows each.

    gradients: float32 [splits, M, LENGTH], the partial t [C, D] and, for the first modality, the partial g_b [C] in a row.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    if program < row_blocks * M:
        m = program % M
        backward_rows_of(grad_joint, select(m, hiddens, M), weight, norms + m * rows_total.to(tl.int64), select(m, grad_hiddens, M), m,
                         program // M * BLOCK_N, rows_total, scale, M, D, C, CP, AMW, OVER_CLASSES, PRECISION, BLOCK_N, BLOCK_D)
    else:
        program -= row_blocks * M
        m = program % (M * D_BLOCKS) // D_BLOCKS
        split = (program // (M * D_BLOCKS)).to(tl.int64)
        per_split = (row_blocks + splits - 1) // splits * BLOCK_N
        backward_weight_of(grad_joint, select(m, hiddens, M), norms + m * rows_total.to(tl.int64), gradients + (split * M + m) * LENGTH,
                           m, split * per_split, tl.minimum((split + 1) * per_split, rows_total), program % D_BLOCKS * BLOCK_D, scale, D,
                           C, CP, AMW, PRECISION, BLOCK_N, BLOCK_D)


@triton.jit
def load_factors(grad_joint, norm, rows, inside, scale, C: tl.constexpr, CP: tl.constexpr, AMW: tl.constexpr):
    """s a G, or G without AMW, and G: float32 [BLOCK_N, CP], 0 outside."""
    c = tl.arange(0, CP)
    g = tl.load(grad_joint + rows[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    factors = g
    if AMW:
        factors = g * tl.where(inside, scale * inverse(norm), 0.0)[:, None]
    return factors, g


@triton.jit
def backward_rows_of(grad_joint, hidden, weight, norms, grad_hidden, m, row, rows_total, scale, M: tl.constexpr, D: tl.constexpr,
                     C: tl.constexpr, CP: tl.constexpr, AMW: tl.constexpr, OVER_CLASSES: tl.constexpr, PRECISION: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """g_h = u - h (h . u) / |h|^2 of a tile of rows, u = s a G V^T: once for h . u, and again for the result."""
    rows = row.to(tl.int64) + tl.arange(0, BLOCK_N)
    inside = rows < rows_total
    norm = tl.load(norms + rows, mask=inside, other=1.0)
    factors, _ = load_factors(grad_joint, norm, rows, inside, scale, C, CP, AMW)
    along = tl.zeros((BLOCK_N,), tl.float32)
    if AMW:
        if not OVER_CLASSES:
            weight_square = tl.zeros((CP,), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                w = load_weight(weight, m, d0, M, D, C, CP, BLOCK_D)
                weight_square += tl.sum(w * w, axis=1)
            factors *= inverse(tl.sqrt(weight_square))[None, :]
        for d0 in range(0, D, BLOCK_D):
            v = load_weight(weight, m, d0, M, D, C, CP, BLOCK_D)
            if OVER_CLASSES:
                v = unit_features(v)
            u = multiply(factors, v, None, PRECISION)
            along += tl.sum(u * load_rows(hidden, rows, inside, d0, D, BLOCK_D), axis=1)
        along = tl.where(norm < 1e-12, 0.0, along / (norm * norm))
    for d0 in range(0, D, BLOCK_D):
        v = load_weight(weight, m, d0, M, D, C, CP, BLOCK_D)
        if AMW and OVER_CLASSES:
            v = unit_features(v)
        u = multiply(factors, v, None, PRECISION)
        if AMW:
            u -= along[:, None] * load_rows(hidden, rows, inside, d0, D, BLOCK_D)
        d = d0 + tl.arange(0, BLOCK_D)
        tl.store(grad_hidden + rows[:, None] * D + d[None, :], u.to(grad_hidden.dtype.element_ty),
                 mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def backward_weight_of(grad_joint, hidden, norms, gradients, m, first, last, d0, scale, D: tl.constexpr, C: tl.constexpr,
                       CP: tl.constexpr, AMW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of t = s (a h)^T G, and g_b, over the rows first ... last - 1."""
    c = tl.arange(0, CP)
    d = d0 + tl.arange(0, BLOCK_D)
    total = tl.zeros((CP, BLOCK_D), tl.float32)
    of_bias = tl.zeros((CP,), tl.float32)
    for row in range(first, last, BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = rows < last
        factors, g = load_factors(grad_joint, tl.load(norms + rows, mask=inside, other=1.0), rows, inside, scale, C, CP, AMW)
        total = multiply(tl.trans(factors), load_rows(hidden, rows, inside, d0, D, BLOCK_D), total, PRECISION)
        of_bias += tl.sum(g, axis=0)
    tl.store(gradients + c[:, None] * D + d[None, :], total, mask=(c < C)[:, None] & (d < D)[None, :])
    if (m == 0) & (d0 == 0):
        tl.store(gradients + C * D + c, of_bias, mask=c < C)


@triton.jit
def summed(gradients, at, mask, splits, STRIDE: tl.constexpr):
    """The sum over the splits, in their order."""
    total = tl.load(gradients + at, mask=mask, other=0.0)
    for _ in range(1, splits):
        gradients += STRIDE
        total += tl.load(gradients + at, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["splits"])
def project_weight(gradients, weight, grad_weight, grad_bias, splits, M: tl.constexpr, D: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
            LENGTH: tl.constexpr, AMW: tl.constexpr, OVER_CLASSES: tl.constexpr, BLOCK_D: tl.constexpr):
    """g_W = (t - V (V . t)) / |W|, or t without AMW. Grid (C, M) where a norm is that of one class, else (cdiv(D, BLOCK_D), M)."""
    STRIDE: tl.constexpr = M * LENGTH
    m = tl.program_id(1)
    gradients += m * LENGTH
    if AMW and not OVER_CLASSES:
        own = tl.program_id(0)
        weight += own * (M * D) + m * D
        square = tl.zeros((BLOCK_D,), tl.float32)
        dot = tl.zeros((BLOCK_D,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
            square += w * w
            dot += w * summed(gradients, own * D + d, d < D, splits, STRIDE)
        norm = tl.sqrt(tl.sum(square, axis=0))
        factor = inverse(norm)
        along = tl.where(norm < 1e-12, 0.0, tl.sum(dot, axis=0) * factor)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            v = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) * factor
            value = factor * (summed(gradients, own * D + d, d < D, splits, STRIDE) - along * v)
            tl.store(grad_weight + own * (M * D) + m * D + d, value.to(grad_weight.dtype.element_ty), mask=d < D)
    else:
        c = tl.arange(0, CP)
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (c < C)[:, None] & (d < D)[None, :]
        value = summed(gradients, c[:, None] * D + d[None, :], mask, splits, STRIDE)
        if AMW:
            w = load_weight(weight, m, tl.program_id(0) * BLOCK_D, M, D, C, CP, BLOCK_D)
            norm = tl.sqrt(tl.sum(w * w, axis=0))
            v = w * inverse(norm)[None, :]
            along = tl.where(norm < 1e-12, 0.0, tl.sum(v * value, axis=0))
            value = inverse(norm)[None, :] * (value - along[None, :] * v)
        tl.store(grad_weight + c[:, None] * (M * D) + m * D + d[None, :], value.to(grad_weight.dtype.element_ty), mask=mask)
    if grad_bias is not None:
        if (tl.program_id(0) == 0) & (m == 0):
            every = tl.arange(0, CP)
            of_bias = summed(gradients, C * D + every, every < C, splits, STRIDE)
            tl.store(grad_bias + every, of_bias.to(grad_bias.dtype.element_ty), mask=every < C)


# -------------------------------------------------------------------------------------------------------- forward launcher


def forward(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, labels: Tensor | None, amw: bool, cosine_norm: str,
            scale: float, score_from: str) -> list[Tensor]:
    """hidden: M [N, D]; weight [C, M D]; bias [C] or None, all of one dtype (float32, bfloat16, float16); labels int64 [N] or None.

    Returns joint logits [N, C] in that dtype; float32: log-probabilities [M, N, C], norms [M, N]; with labels scores and ratio [M].
    """
    hidden, (weight,) = common.contiguous(hidden, [weight])
    bias, labels = (None if t is None else t.contiguous() for t in (bias, labels))
    (rows, width), classes, count = hidden[0].shape, weight.shape[0], len(hidden)
    joint = weight.new_empty((rows, classes))
    log_prob, norms = (weight.new_empty(shape, dtype=torch.float32) for shape in ((count, rows, classes), (count, rows)))
    results = [joint, log_prob, norms]
    if rows == 0:
        if labels is None:
            return results
        return [*results, weight.new_zeros((count,), dtype=torch.float32), weight.new_full((count,), float("nan"), dtype=torch.float32)]
    if labels is not None:
        results += [weight.new_empty((count,), dtype=torch.float32) for _ in range(2)]
    meta = constants(weight.dtype, classes)
    if rows <= FEW_ROWS:
        meta["BLOCK_N"] = 4
    programs = common.cdiv(rows, meta["BLOCK_N"])
    scores = None if labels is None else weight.new_empty((programs, count), dtype=torch.float32)
    with common.device_of(weight):
        fuse_forward[(programs,)](
            tuple(hidden), weight, bias, labels, joint, log_prob, norms, scores, rows, scale, M=count, D=width, C=classes, AMW=amw,
            OVER_CLASSES=cosine_norm == "classes", LINEAR=score_from == "linear", **meta)
        if labels is not None:
            sum_scores[(1,)](scores, results[3], results[4], programs, M=count, MP=triton.next_power_of_2(count), BLOCK=128,
                             num_warps=4, enable_fp_fusion=True)
    return results


# ------------------------------------------------------------------------------------------------------- backward launcher


def backward(grad_joint: Tensor, hidden: Sequence[Tensor], weight: Tensor, norm: Tensor, with_bias: bool, amw: bool, cosine_norm: str,
             scale: float) -> list[Tensor]:
    """grad_joint [N, C]; norm: from `forward`. Returns the gradients of hidden, M of them, of weight and, with one, of bias."""
    hidden, (grad_joint, weight, norm) = common.contiguous(hidden, [grad_joint, weight, norm])
    (rows, width), classes, count = hidden[0].shape, weight.shape[0], len(hidden)
    grad_hidden = [torch.empty_like(h) for h in hidden]
    grad_weight = torch.empty_like(weight)
    grad_bias = weight.new_empty((classes,)) if with_bias else None
    results = [*grad_hidden, grad_weight] + ([grad_bias] if with_bias else [])
    if rows == 0:
        for t in results:
            t.zero_()
        return results
    meta = constants(weight.dtype, classes)
    row_blocks = common.cdiv(rows, meta["BLOCK_N"])
    splits = min(common.MAX_SPLITS, common.cdiv(row_blocks, 4))
    blocks = common.cdiv(width, meta["BLOCK_D"])
    length = common.cdiv(classes * width + classes, 4) * 4
    gradients = weight.new_empty((splits, count, length), dtype=torch.float32)
    over_classes = cosine_norm == "classes"
    with common.device_of(weight):
        fuse_backward[(row_blocks * count + splits * count * blocks,)](
            grad_joint, tuple(hidden), weight, norm, tuple(grad_hidden), gradients, rows, row_blocks, splits, scale, M=count, D=width,
            C=classes, LENGTH=length, AMW=amw, OVER_CLASSES=over_classes, **meta)
        per_class = amw and not over_classes
        block = 256 if per_class else meta["BLOCK_D"]
        project_weight[(classes if per_class else blocks, count)](
            gradients, weight, grad_weight, grad_bias, splits, M=count, D=width, C=classes, CP=meta["CP"], LENGTH=length, AMW=amw,
            OVER_CLASSES=over_classes, BLOCK_D=block, num_warps=4, enable_fp_fusion=True)
    return results


def constants(dtype: torch.dtype, classes: int) -> dict:
    """Compile-time sizes and modes that the kernels share: small tiles, for a program walks through whole rows, and larger ones spill."""
    return {"CP": max(16, triton.next_power_of_2(classes)), "PRECISION": common.precision(dtype), "BLOCK_N": 16, "BLOCK_D": 32,
            "num_warps": 4, "enable_fp_fusion": True}


def why_not(device: str, dtype: torch.dtype, widths: Sequence[int], rank: int = 1) -> str | None:
    """Why these kernels cannot serve M tensors [N, D] on a device type, or None. Any width will do; rank plays no part."""
    return common.why_not(device, dtype)
