"""Head and losses in Triton; mathematics and notation in `ada2i_fast.ops.head_losses`.

Forward, one launch up to WALK blocks of rows, which one program takes one after another, and two beyond:

    losses_forward    log-probabilities;  loss and count of the labels, or the sums of each program's rows
    sum_losses        loss and count

Backward, one launch without a head, two with one (no float atomics):

    losses_backward   g of the joint logits;  in other programs of the launch partial gradients of the head
    reduce_splits     gradients of the head

Forward takes the inner units one by one, in registers; backward recomputes them as products of tiles, for which CP pads the classes.
"""

from __future__ import annotations

from typing import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

MAX_CLASSES = 32
MAX_INNER = 1024
WALK = 8            # blocks of rows that one program walks through, sooner than that a second launch adds up
ELEMENTS = 2048     # of a block of rows, forward: 8 per thread
SPLITS = 128        # most partial gradients of the head: they are small, and with fewer many rows would wait for few programs

# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def load_classes(source, rows, inside, C: tl.constexpr, CP: tl.constexpr):
    """float32 [BLOCK_N, CP], 0 outside."""
    c = tl.arange(0, CP)
    return tl.load(source + rows[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def log_softmax(logits, C: tl.constexpr, CP: tl.constexpr):
    """-inf beyond the classes."""
    logits = tl.where((tl.arange(0, CP) < C)[None, :], logits, -float("inf"))
    logits -= tl.max(logits, axis=1)[:, None]
    return logits - tl.log(tl.sum(tl.exp(logits), axis=1))[:, None]


@triton.jit
def relu(value):
    """NaN stays NaN."""
    return tl.where(value <= 0.0, 0.0, value)


@triton.jit
def load_unit(weight_1, bias_1, weight_2, i, C: tl.constexpr, CP: tl.constexpr, I: tl.constexpr):
    """What inner unit i takes from every class [CP], its bias, and what every class takes from it [CP]."""
    c = tl.arange(0, CP)
    return (tl.load(weight_1 + i * C + c, mask=c < C, other=0.0).to(tl.float32), tl.load(bias_1 + i).to(tl.float32),
            tl.load(weight_2 + c * I + i, mask=c < C, other=0.0).to(tl.float32))


@triton.jit
def loss_of(log_prob, label, C: tl.constexpr, CP: tl.constexpr):
    """-log_prob of the label [BLOCK_N], 0 for -100, NaN for what is no class."""
    c = tl.arange(0, CP)
    own = tl.sum(tl.where(c[None, :] == label[:, None], -log_prob, 0.0), axis=1)
    return tl.where((label >= 0) & (label < C) | (label == -100), own, float("nan"))


@triton.jit
def finish(main, joint, count, extra, loss, counted):
    """The loss from the sums over rows."""
    value = tl.div_rn(main, count)
    if extra is not None:
        value += tl.load(extra).to(tl.float32)
    if joint is not None:
        value += tl.div_rn(joint, count)
    tl.store(loss, value)
    tl.store(counted, count)


@triton.jit(do_not_specialize=["rows_total", "per_program"])
def losses_forward(joint, weight_1, bias_1, weight_2, bias_2, labels, extra, log_prob, partial, loss, counted, rows_total, per_program,
                   C: tl.constexpr, CP: tl.constexpr, I: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid (cdiv(N, per_program),). partial: float32 [programs, 3], sums of the head's losses, of those of the joint logits, and count;
    one program leaves it alone and stores loss and count."""
    first = tl.program_id(0).to(tl.int64) * per_program
    last = tl.minimum(first + per_program, rows_total)
    c = tl.arange(0, CP)
    of_head = tl.zeros((BLOCK_N,), tl.float32)
    of_joint = tl.zeros((BLOCK_N,), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(first, last, BLOCK_N):
        rows = row + tl.arange(0, BLOCK_N)
        inside = rows < last
        x = load_classes(joint, rows, inside, C, CP)
        logits = x
        if weight_1 is not None:
            logits = tl.zeros((BLOCK_N, CP), tl.float32) + tl.load(bias_2 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
            for i in tl.range(0, I, loop_unroll_factor=2):
                w_1, b_1, w_2 = load_unit(weight_1, bias_1, weight_2, i, C, CP, I)
                logits += relu(tl.sum(x * w_1[None, :], axis=1) + b_1)[:, None] * w_2[None, :]
        logits = log_softmax(logits, C, CP)
        tl.store(log_prob + rows[:, None] * C + c[None, :], common.rounded(logits, log_prob.dtype.element_ty),
                 mask=inside[:, None] & (c < C)[None, :])
        if labels is not None:
            label = tl.load(labels + rows, mask=inside, other=-100)
            of_head += loss_of(logits, label, C, CP)
            count += (label != -100).to(tl.float32)
            if weight_1 is not None:
                of_joint += loss_of(log_softmax(x, C, CP), label, C, CP)
    if labels is not None:
        of_head = tl.sum(of_head, axis=0)
        of_joint = tl.sum(of_joint, axis=0)
        count = tl.sum(count, axis=0)
        if tl.num_programs(0) == 1:
            finish(of_head, of_joint if weight_1 is not None else None, count, extra, loss, counted)
        else:
            partial += tl.program_id(0).to(tl.int64) * 3
            tl.store(partial, of_head)
            tl.store(partial + 1, of_joint)
            tl.store(partial + 2, count)


@triton.jit(do_not_specialize=["programs"])
def sum_losses(partial, extra, loss, counted, programs, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (1,). partial: float32 [programs, 3]."""
    kind = tl.arange(0, 4)
    total = tl.zeros((BLOCK, 4), tl.float32)
    for first in range(0, programs, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(partial + place[:, None] * 3 + kind[None, :], mask=(place < programs)[:, None] & (kind < 3)[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    of_joint = tl.sum(tl.where(kind == 1, total, 0.0), axis=0)
    finish(tl.sum(tl.where(kind == 0, total, 0.0), axis=0), of_joint if HEAD else None, tl.sum(tl.where(kind == 2, total, 0.0), axis=0),
           extra, loss, counted)


@triton.jit
def own_gradient(prob, label, factor, C: tl.constexpr, CP: tl.constexpr):
    """Of the sum of -log_prob of the labels, times factor: 0 for rows without one."""
    difference = prob - (tl.arange(0, CP)[None, :] == label[:, None]).to(tl.float32)
    return tl.where((label != -100)[:, None], factor * difference, 0.0)


@triton.jit
def load_gradient(grad_log_prob, grad_loss, labels, log_prob, counted, rows, inside, C: tl.constexpr, CP: tl.constexpr):
    """Of the logits: float32 [BLOCK_N, CP], 0 outside; the labels [BLOCK_N], and the gradient of one row's loss."""
    prob = tl.exp(load_classes(log_prob, rows, inside, C, CP))
    label = tl.full(inside.shape, -100, tl.int64)
    factor = 0.0
    g = tl.zeros(prob.shape, tl.float32)
    if labels is not None:
        label = tl.load(labels + rows, mask=inside, other=-100)
        factor = tl.div_rn(tl.load(grad_loss).to(tl.float32), tl.load(counted))
        g += own_gradient(prob, label, factor, C, CP)
    if grad_log_prob is not None:
        given = load_classes(grad_log_prob, rows, inside, C, CP)
        g += given - prob * tl.sum(given, axis=1)[:, None]
    return tl.where(inside[:, None] & (tl.arange(0, CP) < C)[None, :], g, 0.0), label, factor


@triton.jit(do_not_specialize=["rows_total", "row_blocks", "splits"])
def losses_backward(grad_log_prob, grad_loss, joint, weight_1, bias_1, weight_2, labels, log_prob, counted, grad_joint, gradients,
                    rows_total, row_blocks, splits, C: tl.constexpr, CP: tl.constexpr, I: tl.constexpr, LENGTH: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr):
    """Grid (row_blocks + splits * cdiv(I, BLOCK_I),): first a tile of rows each, then a block of inner units over one split of the rows
    each.

    gradients: float32 [splits, LENGTH], the partial gradients of W_1, b_1, W_2 and b_2 in a row.
    """
    program = tl.program_id(0)
    if program < row_blocks:
        backward_rows_of(grad_log_prob, grad_loss, joint, weight_1, bias_1, weight_2, labels, log_prob, counted, grad_joint,
                         program.to(tl.int64) * BLOCK_N, rows_total, C, CP, I, BLOCK_N, BLOCK_I)
    elif weight_1 is not None:
        I_BLOCKS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
        program -= row_blocks
        split = (program // I_BLOCKS).to(tl.int64)
        per_split = (row_blocks + splits - 1) // splits * BLOCK_N
        backward_head_of(grad_log_prob, grad_loss, joint, weight_1, bias_1, weight_2, labels, log_prob, counted,
                         gradients + split * LENGTH, split * per_split, tl.minimum((split + 1) * per_split, rows_total),
                         program % I_BLOCKS * BLOCK_I, C, CP, I, BLOCK_N, BLOCK_I)


@triton.jit
def load_units(weight_1, bias_1, weight_2, i0, C: tl.constexpr, CP: tl.constexpr, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """Of inner units i0 ...: W_1 [BLOCK_I, CP], b_1 [BLOCK_I], W_2 [CP, BLOCK_I] in float32, 0 outside."""
    c = tl.arange(0, CP)
    i = i0 + tl.arange(0, BLOCK_I)
    return (tl.load(weight_1 + i[:, None] * C + c[None, :], mask=(i < I)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32),
            tl.load(bias_1 + i, mask=i < I, other=0.0).to(tl.float32),
            tl.load(weight_2 + c[:, None] * I + i[None, :], mask=(c < C)[:, None] & (i < I)[None, :], other=0.0).to(tl.float32))


@triton.jit
def backward_rows_of(grad_log_prob, grad_loss, joint, weight_1, bias_1, weight_2, labels, log_prob, counted, grad_joint, row, rows_total,
                     C: tl.constexpr, CP: tl.constexpr, I: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr):
    """The gradient of the joint logits of a tile of rows."""
    c = tl.arange(0, CP)
    rows = row + tl.arange(0, BLOCK_N)
    inside = rows < rows_total
    g, label, factor = load_gradient(grad_log_prob, grad_loss, labels, log_prob, counted, rows, inside, C, CP)
    if weight_1 is not None:
        x = load_classes(joint, rows, inside, C, CP)
        total = tl.zeros((BLOCK_N, CP), tl.float32)
        if labels is not None:
            total += own_gradient(tl.exp(log_softmax(x, C, CP)), label, factor, C, CP)
        for i0 in range(0, I, BLOCK_I):
            w_1, b_1, w_2 = load_units(weight_1, bias_1, weight_2, i0, C, CP, I, BLOCK_I)
            before = tl.dot(x, tl.trans(w_1), input_precision="ieee") + b_1[None, :]
            g_before = tl.where(before <= 0.0, 0.0, tl.dot(g, w_2, input_precision="ieee"))
            total = tl.dot(g_before, w_1, total, input_precision="ieee")
        g = total
    tl.store(grad_joint + rows[:, None] * C + c[None, :], common.rounded(g, grad_joint.dtype.element_ty),
             mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def backward_head_of(grad_log_prob, grad_loss, joint, weight_1, bias_1, weight_2, labels, log_prob, counted, gradients, first, last, i0,
                     C: tl.constexpr, CP: tl.constexpr, I: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr):
    """Gradients of inner units i0 ... over the rows first ... last - 1; with the first of them that of b_2."""
    c = tl.arange(0, CP)
    i = i0 + tl.arange(0, BLOCK_I)
    w_1, b_1, w_2 = load_units(weight_1, bias_1, weight_2, i0, C, CP, I, BLOCK_I)
    w_1 = tl.trans(w_1)
    g_1 = tl.zeros((BLOCK_I, CP), tl.float32)
    g_2 = tl.zeros((CP, BLOCK_I), tl.float32)
    of_bias_1 = tl.zeros((BLOCK_I,), tl.float32)
    of_bias_2 = tl.zeros((CP,), tl.float32)
    for row in range(first, last, BLOCK_N):
        rows = row + tl.arange(0, BLOCK_N)
        inside = rows < last
        x = load_classes(joint, rows, inside, C, CP)
        g, _, _ = load_gradient(grad_log_prob, grad_loss, labels, log_prob, counted, rows, inside, C, CP)
        before = tl.dot(x, w_1, input_precision="ieee") + b_1[None, :]
        g_before = tl.where(before <= 0.0, 0.0, tl.dot(g, w_2, input_precision="ieee"))
        g_1 = tl.dot(tl.trans(g_before), x, g_1, input_precision="ieee")
        g_2 = tl.dot(tl.trans(g), relu(before), g_2, input_precision="ieee")
        of_bias_1 += tl.sum(g_before, axis=0)
        of_bias_2 += tl.sum(g, axis=0)
    tl.store(gradients + i[:, None] * C + c[None, :], g_1, mask=(i < I)[:, None] & (c < C)[None, :])
    tl.store(gradients + I * C + i, of_bias_1, mask=i < I)
    tl.store(gradients + I * C + I + c[:, None] * I + i[None, :], g_2, mask=(c < C)[:, None] & (i < I)[None, :])
    if i0 == 0:
        tl.store(gradients + 2 * I * C + I + c, of_bias_2, mask=c < C)


# -------------------------------------------------------------------------------------------------------------- launchers


def forward(joint: Tensor, head: Sequence[Tensor], labels: Tensor | None, extra: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """joint [N, C]; head W_1 [I, C], b_1 [I], W_2 [C, I], b_2 [C] or empty; labels int64 [N] or None; extra [] or None.

    Returns log-probabilities [N, C] in `dtype`; with labels loss [] and their number [], float32.
    """
    (joint,), head = common.contiguous([joint], head)
    labels = None if labels is None else labels.contiguous()
    rows, classes = joint.shape
    log_prob = joint.new_empty((rows, classes), dtype=dtype)
    results = [log_prob]
    if rows == 0:
        if labels is not None:
            results += [joint.new_full((), float("nan"), dtype=torch.float32), joint.new_zeros((), dtype=torch.float32)]
        return results
    padded = max(2, triton.next_power_of_2(classes))
    block = ELEMENTS // padded
    partial = loss = counted = None
    per_program = block
    if labels is not None:
        loss, counted = (joint.new_empty((), dtype=torch.float32) for _ in range(2))
        results += [loss, counted]
        if rows <= WALK * block:
            per_program = WALK * block
        partial = joint.new_empty((common.cdiv(rows, per_program), 3), dtype=torch.float32)
    programs = common.cdiv(rows, per_program)
    w_1, b_1, w_2, b_2 = head or (None,) * 4
    with common.device_of(joint):
        losses_forward[(programs,)](joint, w_1, b_1, w_2, b_2, labels, extra, log_prob, partial, loss, counted, rows, per_program,
                                    C=classes, CP=padded, I=w_1.shape[0] if head else 0, BLOCK_N=block, num_warps=8,
                                    enable_fp_fusion=True)
        if labels is not None and programs > 1:
            sum_losses[(1,)](partial, extra, loss, counted, programs, HEAD=bool(head), BLOCK=128, num_warps=4, enable_fp_fusion=True)
    return results


def backward(grad_log_prob: Tensor | None, grad_loss: Tensor | None, joint: Tensor, head: Sequence[Tensor], labels: Tensor | None,
             log_prob: Tensor, counted: Tensor | None) -> list[Tensor]:
    """grad_log_prob [N, C] or None; grad_loss [] with labels and their number; log_prob: from `forward`.

    Returns the gradients of joint and head.
    """
    (joint, log_prob), head = common.contiguous([joint, log_prob], head)
    grad_log_prob, labels = (None if t is None else t.contiguous() for t in (grad_log_prob, labels))
    rows, classes = joint.shape
    grad_joint, grads = torch.empty_like(joint), [torch.empty_like(t) for t in head]
    if rows == 0:
        for t in grads:
            t.zero_()
        return [grad_joint, *grads]
    block, block_inner = 16, 32
    row_blocks = common.cdiv(rows, block)
    inner, splits, gradients = 0, 0, None
    if head:
        inner = head[0].shape[0]
        splits = min(SPLITS, row_blocks)
        gradients = joint.new_empty((splits, 1, sum(t.numel() for t in head)), dtype=torch.float32)
    w_1, b_1, w_2, _ = head or (None,) * 4
    with common.device_of(joint):
        losses_backward[(row_blocks + splits * common.cdiv(inner, block_inner),)](
            grad_log_prob, grad_loss, joint, w_1, b_1, w_2, labels, log_prob, counted, grad_joint, gradients, rows, row_blocks, splits,
            C=classes, CP=max(16, triton.next_power_of_2(classes)), I=inner, LENGTH=gradients.shape[2] if head else 0, BLOCK_N=block,
            BLOCK_I=block_inner, num_warps=4, num_stages=1, enable_fp_fusion=True)
        if head:
            common.reduce(gradients, [[t] for t in grads])
    return [grad_joint, *grads]


def why_not(device: str, dtype: torch.dtype, widths: Sequence[int], rank: int = 1) -> str | None:
    """Why these kernels cannot serve joint logits of C classes and a head of I inner units, widths (C, I) or (C,), or None."""
    if not 1 <= widths[0] <= MAX_CLASSES:
        return f"{widths[0]} classes: 1 to {MAX_CLASSES} only"
    if len(widths) > 1 and not 1 <= widths[1] <= MAX_INNER:
        return f"{widths[1]} inner units: 1 to {MAX_INNER} only"
    return common.why_not(device, dtype)
