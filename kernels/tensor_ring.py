"""Tensor ring and gate in Triton; mathematics and notation in `ada2i_fast.ops.tensor_ring`.

Forward, two launches per distinct width: a mean over a dialogue has to be complete before any of its rows can use it.

    project         q1, q2, k1, k2 of each row;  sum u v^T of each part of a dialogue
    contract        A = s / N_b sum of the parts;  w = s C^T v;  bilinear map, gate, dropout

Backward, three: g_C is a sum over a dialogue, the weight gradients are sums over all rows and come from partial sums
(no float atomics, so the same input gives the same bits).

    backward_rows      element-wise gradients;  S = g_att W;  g_u, g_v, w;  sum v g_w^T of each part of a dialogue
    backward_weights   g_A, g_q1 .. g_k2, g_x and partial g_P, g_p;  in other programs of the launch partial g_W, g_c
    reduce_splits      g_P, g_p, g_W, g_c

From `common.LIBRARY_ROWS` rows on dense products go through the library, and kernels do the rest, each reading an array once; what is
of one width takes one launch, products of the maps too:

    project            as above; with "ieee" products the library makes q1 .. k2, and sum_cores the parts
    average_cores      A
    contract_cores     w
    outer_rows         F = [u_k w_o, 1, 0 ..]; library: att = F [W, c, 0 ..]^T, packed by pack_map
    gate_rows          gate, dropout

    contract_cores     w
    gate_gradients     g_att, the gate's share of g_x; library: S = g_att W
    outer_rows         F, g_u, g_w; library: [g_W, g_c] = g_att^T F over `common.ROW_SPLITS` parts of the rows, summed by unpack_map
    sum_cores          sum v g_w^T of each part of a dialogue
    average_cores      g_A
    core_gradients     g_q1 .. g_k2 and partial g_p, summed by reduce_splits; library: g_x += g_q P, g_P = g_q^T x

The map R^2 -> D is a product whose left factor u_k w_o is made in registers, KB values of k at a time. RP pads R for products
over R (tensor cores want 16), RO pads o inside the map, where 8 will do.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ada2i_fast.ops.linear import Branch, here

from . import common
from .common import cdiv, column_tile, keep, locate, lookup, multiply, nearest, part_rows, rounded, select

GATE_ROWS, GATE_COLUMNS = 32, 64     # tile of the element-wise kernels

MIXED_PARAMETERS = True     # of 16-bit x: float32 ones are rounded where a product reads them, their gradients are float32

# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def load_projection(proj, rows, inside, PART: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """q1, q2, k1 or k2 (PART 0 .. 3) of rows [BLOCK_N]: float32 [BLOCK_N, RP], 0 outside."""
    r = tl.arange(0, RP)
    return tl.load(proj + rows[:, None] * (4 * R) + PART * R + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def load_core(proj, rows, inside, k0, R: tl.constexpr, KB: tl.constexpr):
    """u_k for k0 <= k < k0 + KB: float32 [BLOCK_N, KB]."""
    k = k0 + tl.arange(0, KB)
    mask = inside[:, None] & (k < R)[None, :]
    at = proj + rows[:, None] * (4 * R) + k[None, :]
    return tl.load(at, mask=mask, other=0.0) * tl.load(at + 2 * R, mask=mask, other=0.0)


@triton.jit
def load_square(at, R: tl.constexpr, RP: tl.constexpr):
    """An R x R matrix, padded with zeros to RP x RP."""
    k = tl.arange(0, RP)[:, None]
    o = tl.arange(0, RP)[None, :]
    return tl.load(at + k * R + o, mask=(k < R) & (o < R), other=0.0)


@triton.jit
def store_square(at, value, R: tl.constexpr, RP: tl.constexpr):
    k = tl.arange(0, RP)[:, None]
    o = tl.arange(0, RP)[None, :]
    tl.store(at + k * R + o, value, mask=(k < R) & (o < R))


@triton.jit
def sum_parts(partial, first, parts, R: tl.constexpr, RP: tl.constexpr):
    """The sum of `parts` matrices from index `first` on, always in the same order."""
    total = tl.zeros((RP, RP), tl.float32)
    for part in range(parts):
        total += load_square(partial + (first + part) * (R * R), R, RP)
    return total


@triton.jit
def contracted(averages, dialogue, j, RING: tl.constexpr, M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
               PRECISION: tl.constexpr):
    """C_j of a dialogue, M > 1."""
    at = dialogue * (R * R)
    c = load_square(select(lookup(j, RING, M, M - 1, 0), averages, M) + at, R, RP)
    for p in tl.static_range(1, M - 1):
        a = load_square(select(lookup(j, RING, M, M - 1, p), averages, M) + at, R, RP)
        c = multiply(c, a, None, PRECISION)
    return c


@triton.jit
def store_gated(attention, x, target, out, at, mask, seed, j, rows, d0, beta, keep_scale, GATED: tl.constexpr,
                DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gate, dropout; GATED: store the gated output before dropout as a target too. attention: float32 [BLOCK_N, BLOCK_D]."""
    kind = x.dtype.element_ty
    x_tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    gated = attention * x_tile + beta * x_tile
    if GATED:
        tl.store(target + at, gated.to(kind), mask=mask)
    if DROPOUT:
        gated = tl.where(keep(seed, j, rows, d0, THRESHOLD, BLOCK_N, BLOCK_D), gated * keep_scale, 0.0)
    tl.store(out + at, gated.to(kind), mask=mask)


@triton.jit
def through_gate(grad_out, grad_target, factor, x, attention, at, mask, seed, j, rows, d0, beta, keep_scale, HAS_TARGET: tl.constexpr,
                 GATED: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """g_att and the gate's share of g_x, g_gated (att + beta): float32 [BLOCK_N, BLOCK_D]. With a factor g_target is minus that times grad_target."""
    g = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        g = tl.where(keep(seed, j, rows, d0, THRESHOLD, BLOCK_N, BLOCK_D), g * keep_scale, 0.0)
    if HAS_TARGET:
        t = tl.load(grad_target + at, mask=mask, other=0).to(tl.float32)
        if factor is not None:
            t *= -tl.load(factor)
        if GATED:
            g += t
    g_att = g * tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_TARGET:
        if not GATED:
            g_att += t
    return g_att, g * (tl.load(attention + at, mask=mask, other=0.0).to(tl.float32) + beta)


@triton.jit
def narrow(a, BLOCK_N: tl.constexpr, RP: tl.constexpr, RO: tl.constexpr):
    """The first RO of RP columns; RP is RO or 2 RO."""
    if RO == RP:
        return a
    else:
        first, second = tl.split(tl.permute(tl.reshape(a, (BLOCK_N, 2, RO)), (0, 2, 1)))
        return first


@triton.jit
def widen(a, BLOCK_N: tl.constexpr, RP: tl.constexpr, RO: tl.constexpr):
    """Zero columns up to RP; RP is RO or 2 RO."""
    if RO == RP:
        return a
    else:
        return tl.reshape(tl.permute(tl.join(a, tl.zeros_like(a)), (0, 2, 1)), (BLOCK_N, RP))


@triton.jit
def outer(u, w, BLOCK_N: tl.constexpr, KB: tl.constexpr, RO: tl.constexpr):
    """u_k w_o: [BLOCK_N, KB * RO]."""
    return tl.reshape(u[:, :, None] * w[:, None, :], (BLOCK_N, KB * RO))


@triton.jit
def map_columns(k0, R: tl.constexpr, KB: tl.constexpr, RO: tl.constexpr):
    """Columns k R + o of the map's weight that belong to `outer`, and which of them exist."""
    i = tl.arange(0, KB * RO)
    k = k0 + i // RO
    o = i % RO
    return k * R + o, (k < R) & (o < R)


@triton.jit(do_not_specialize=["dialogues", "tiles"])
def project(xs, offsets, weights, biases, projections, partial, dialogues, tiles,
            D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr,
            MAX_PARTS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_D: tl.constexpr):
    """Grid (tiles, COUNT): one program per part of a dialogue and modality. partial: float32 [M, tiles, R, R]."""
    tile = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1)
    x = select(local, xs, COUNT)
    weight = select(local, weights, COUNT)
    bias = select(local, biases, COUNT)
    proj = select(local, projections, COUNT)
    j = lookup(local, GROUP, COUNT, 1, 0).to(tl.int64)
    kind = x.dtype.element_ty

    dialogue, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
    step = part_rows(end - start, BLOCK_N, MAX_PARTS)
    first = start + (tile - first_tile) * step
    last = tl.minimum(first + step, end)
    if first >= last:
        return

    r = tl.arange(0, RP)
    real = r < R
    b_q1 = rounded(tl.load(bias + r, mask=real, other=0.0), kind).to(tl.float32)
    b_q2 = rounded(tl.load(bias + R + r, mask=real, other=0.0), kind).to(tl.float32)
    b_k1 = rounded(tl.load(bias + 2 * R + r, mask=real, other=0.0), kind).to(tl.float32)
    b_k2 = rounded(tl.load(bias + 3 * R + r, mask=real, other=0.0), kind).to(tl.float32)
    sums = tl.zeros((RP, RP), tl.float32)
    for row in range(first, last, BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = rows < last
        q1 = tl.zeros((BLOCK_N, RP), tl.float32)
        q2 = tl.zeros((BLOCK_N, RP), tl.float32)
        k1 = tl.zeros((BLOCK_N, RP), tl.float32)
        k2 = tl.zeros((BLOCK_N, RP), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x_tile = tl.load(x + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)
            at = weight + r[None, :] * D + d[:, None]
            mask = real[None, :] & (d < D)[:, None]
            p_q1 = rounded(tl.load(at, mask=mask, other=0.0), kind).to(OPERAND)
            q1 = multiply(x_tile, p_q1, q1, PRECISION)
            p_q2 = rounded(tl.load(at + R * D, mask=mask, other=0.0), kind).to(OPERAND)
            q2 = multiply(x_tile, p_q2, q2, PRECISION)
            p_k1 = rounded(tl.load(at + 2 * R * D, mask=mask, other=0.0), kind).to(OPERAND)
            k1 = multiply(x_tile, p_k1, k1, PRECISION)
            p_k2 = rounded(tl.load(at + 3 * R * D, mask=mask, other=0.0), kind).to(OPERAND)
            k2 = multiply(x_tile, p_k2, k2, PRECISION)
        q1 += b_q1[None, :]
        q2 += b_q2[None, :]
        k1 += b_k1[None, :]
        k2 += b_k2[None, :]
        at_row = proj + rows[:, None] * (4 * R) + r[None, :]
        mask_row = inside[:, None] & real[None, :]
        tl.store(at_row, q1, mask=mask_row)
        tl.store(at_row + R, q2, mask=mask_row)
        tl.store(at_row + 2 * R, k1, mask=mask_row)
        tl.store(at_row + 3 * R, k2, mask=mask_row)
        # Rows past the part hold the biases' products: out of the sum with them.
        u = tl.where(inside[:, None], q1 * k1, 0.0)
        sums = tl.dot(tl.trans(nearest(u, PRECISION)), nearest(q2 * k2, PRECISION), sums, input_precision=PRECISION)
    store_square(partial + (j * tiles + tile) * (R * R), sums, R, RP)


@triton.jit(do_not_specialize=["dialogues", "tiles"])
def contract(xs, offsets, projections, weights, biases, partial, averages, attentions, targets, outs, seed, dialogues, tiles,
             scale, beta, keep_scale,
             D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RO: tl.constexpr, KB: tl.constexpr, M: tl.constexpr,
             RING: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, MAX_PARTS: tl.constexpr, GATED: tl.constexpr,
             DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_D: tl.constexpr):
    """Grid (tiles, COUNT * cdiv(D, BLOCK_D)): one program per block of a dialogue's rows, modality and block of columns.

    GATED: store the gated output before dropout as a target too. averages: COUNT pointers, the modalities of the group.
    """
    tile = tl.program_id(0).to(tl.int64)
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    local = tl.program_id(1) // D_BLOCKS
    d0 = (tl.program_id(1) % D_BLOCKS) * BLOCK_D
    x = select(local, xs, COUNT)
    proj = select(local, projections, COUNT)
    weight = select(local, weights, COUNT)
    j = lookup(local, GROUP, COUNT, 1, 0).to(tl.int64)
    kind = x.dtype.element_ty

    dialogue, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
    length = end - start
    step = part_rows(length, BLOCK_N, MAX_PARTS)
    parts = (length + step - 1) // step
    factor = scale / tl.maximum(length, 1).to(tl.float32)
    if (tile == first_tile) & (d0 == 0):
        # Backward's copy. Written for empty dialogues too: zero.
        mean = factor * sum_parts(partial, j * tiles + first_tile, parts, R, RP)
        store_square(select(local, averages, COUNT) + dialogue * (R * R), mean, R, RP)
    row = start + (tile - first_tile) * BLOCK_N
    if row >= end:
        return

    rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = rows < end
    v = load_projection(proj, rows, inside, 1, R, RP) * load_projection(proj, rows, inside, 3, R, RP)
    if M > 1:
        c = factor * sum_parts(partial, lookup(j, RING, M, M - 1, 0) * tiles + first_tile, parts, R, RP)
        for p in tl.static_range(1, M - 1):
            a = factor * sum_parts(partial, lookup(j, RING, M, M - 1, p) * tiles + first_tile, parts, R, RP)
            c = multiply(c, a, None, PRECISION)
        v = multiply(v, c, None, PRECISION)
    w = narrow(scale * v, BLOCK_N, RP, RO)

    d = d0 + tl.arange(0, BLOCK_D)
    attention = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for k0 in range(0, R, KB):
        column, real = map_columns(k0, R, KB, RO)
        block = tl.load(weight + d[None, :] * (R * R) + column[:, None], mask=real[:, None] & (d < D)[None, :], other=0.0)
        factors = outer(load_core(proj, rows, inside, k0, R, KB), w, BLOCK_N, KB, RO)
        attention = multiply(factors, rounded(block, kind), attention, PRECISION)
    attention += rounded(tl.load(select(local, biases, COUNT) + d, mask=d < D, other=0.0), kind).to(tl.float32)[None, :]

    at = rows[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(select(local, attentions, COUNT) + at, attention.to(kind), mask=mask)
    store_gated(attention, x, select(local, targets, COUNT), select(local, outs, COUNT), at, mask, seed, j, rows, d0, beta, keep_scale,
                GATED, DROPOUT, THRESHOLD, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["dialogues", "tiles", "rows_total"])
def backward_rows(grad_outs, grad_targets, xs, offsets, projections, averages, attentions, weights, grad_xs, grad_attention,
                  vectors, partial, seed, dialogues, tiles, rows_total, scale, beta, keep_scale,
                  D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RO: tl.constexpr, KB: tl.constexpr, M: tl.constexpr,
                  RING: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, MAX_PARTS: tl.constexpr,
                  HAS_TARGET: tl.constexpr, INTO: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
                  THRESHOLD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """Grid (tiles, COUNT), as `project`. averages: all M; other tuples: the group.

    grad_xs receive the gate's share, g_gated (att + beta), INTO: added to what is there; grad_attention [COUNT, N, D] in the dtype of x;
    vectors: float32 [COUNT, N, 3 R], g_u, g_v (without the means' share) and w; partial: float32 [M, tiles, R, R], the
    parts of g_C.
    """
    tile = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1)
    x = select(local, xs, COUNT)
    grad_out = select(local, grad_outs, COUNT)
    attention = select(local, attentions, COUNT)
    grad_x = select(local, grad_xs, COUNT)
    weight = select(local, weights, COUNT)
    proj = select(local, projections, COUNT)
    grad_attention += local.to(tl.int64) * rows_total * D
    vectors += local.to(tl.int64) * rows_total * (3 * R)
    j = lookup(local, GROUP, COUNT, 1, 0).to(tl.int64)
    kind = x.dtype.element_ty

    dialogue, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
    step = part_rows(end - start, BLOCK_N, MAX_PARTS)
    first = start + (tile - first_tile) * step
    last = tl.minimum(first + step, end)
    if first >= last:
        return

    r = tl.arange(0, RP)
    if M > 1:
        c = nearest(contracted(averages, dialogue, j, RING, M, R, RP, PRECISION), PRECISION)
    grad_c = tl.zeros((RP, RP), tl.float32)
    for row in range(first, last, BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = rows < last
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            at = rows[:, None] * D + d[None, :]
            mask = inside[:, None] & (d < D)[None, :]
            g_att, g_x = through_gate(grad_out, select(local, grad_targets, COUNT), None, x, attention, at, mask, seed, j, rows, d0, beta,
                                      keep_scale, HAS_TARGET, GATED, DROPOUT, THRESHOLD, BLOCK_N, BLOCK_D)
            if INTO:
                g_x += tl.load(grad_x + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_attention + at, g_att.to(kind), mask=mask)
            tl.store(grad_x + at, g_x.to(kind), mask=mask)
        # Other threads of the program read what these wrote.
        tl.debug_barrier()

        v = load_projection(proj, rows, inside, 1, R, RP) * load_projection(proj, rows, inside, 3, R, RP)
        if M > 1:
            v = nearest(v, PRECISION)
            w = narrow(scale * tl.dot(v, c, input_precision=PRECISION), BLOCK_N, RP, RO)
        else:
            w = narrow(scale * v, BLOCK_N, RP, RO)
        g_w = tl.zeros((BLOCK_N, RO), tl.float32)
        at_row = vectors + rows[:, None] * (3 * R)
        for k0 in range(0, R, KB):
            column, real = map_columns(k0, R, KB, RO)
            s = tl.zeros((BLOCK_N, KB * RO), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                g_att = tl.load(grad_attention + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :],
                                other=0.0)
                block = tl.load(weight + d[:, None] * (R * R) + column[None, :], mask=(d < D)[:, None] & real[None, :],
                                other=0.0)
                s = multiply(g_att.to(OPERAND), rounded(block, kind).to(OPERAND), s, PRECISION)
            s = tl.reshape(s, (BLOCK_N, KB, RO))
            k = k0 + tl.arange(0, KB)
            g_u = tl.sum(s * w[:, None, :], axis=2)
            tl.store(at_row + k[None, :], g_u, mask=inside[:, None] & (k < R)[None, :])
            g_w += tl.sum(s * load_core(proj, rows, inside, k0, R, KB)[:, :, None], axis=1)
        o = tl.arange(0, RO)
        tl.store(at_row + 2 * R + o[None, :], w, mask=inside[:, None] & (o < R)[None, :])
        g_v = scale * widen(g_w, BLOCK_N, RP, RO)
        if M > 1:
            g_v = nearest(g_v, PRECISION)
            grad_c = tl.dot(tl.trans(v), g_v, grad_c, input_precision=PRECISION)
            g_v = tl.dot(g_v, tl.trans(c), input_precision=PRECISION)
        tl.store(at_row + R + r[None, :], g_v, mask=inside[:, None] & (r < R)[None, :])
    if M > 1:
        store_square(partial + (j * tiles + tile) * (R * R), grad_c, R, RP)


@triton.jit
def grad_average(partial, averages, dialogue, first_tile, length, tiles, scale, j, PATH: tl.constexpr, M: tl.constexpr,
                 R: tl.constexpr, RP: tl.constexpr, MAX_PARTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):
    """s / N_b g_A of modality j: its share in the ring of each other modality, by the product rule.

    In C = A_1 .. A_p .. A_m the share of A_p is (A_1 .. A_{p-1})^T g_C (A_{p+1} .. A_m)^T; PATH (from `ring_path`) names the
    factors in the order in which they are applied and the side of each.
    """
    step = part_rows(length, BLOCK_N, MAX_PARTS)
    parts = (length + step - 1) // step
    total = tl.zeros((RP, RP), tl.float32)
    for i in tl.static_range(M - 1):
        g = sum_parts(partial, (j + 1 + i) % M * tiles + first_tile, parts, R, RP)
        for p in tl.static_range(M - 2):
            code = lookup(j, PATH, M, (M - 1) * (M - 2), i * (M - 2) + p)
            a = tl.trans(nearest(load_square(select(code // 2, averages, M) + dialogue * (R * R), R, RP), PRECISION))
            g = nearest(g, PRECISION)
            if code % 2 == 0:
                g = tl.dot(a, g, input_precision=PRECISION)
            else:
                g = tl.dot(g, a, input_precision=PRECISION)
        total += g
    return total * (scale / length.to(tl.float32))


@triton.jit(do_not_specialize=["dialogues", "tiles", "rows_total", "splits"])
def backward_weights(xs, offsets, projections, averages, proj_weights, grad_xs, grad_attention, vectors, partial, gradients,
                     dialogues, tiles, rows_total, splits, scale, PART: tl.constexpr,
                     D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RO: tl.constexpr, KB: tl.constexpr, M: tl.constexpr,
                     PATH: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, LENGTH: tl.constexpr,
                     MAX_PARTS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_D: tl.constexpr):
    """Grid (COUNT * roles, splits): per modality and block of columns one program for the projections (PART "both" or "projections"), then
    one per KB values of k for the map ("both" or "map"); each walks its split of the rows.

    gradients: float32 [splits, COUNT, LENGTH], the partial g_P [4 R, D], g_p [4 R], g_W [D, R R], g_c [D] in a row.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    K_BLOCKS: tl.constexpr = (R + KB - 1) // KB
    PROJECTIONS: tl.constexpr = 0 if PART == "map" else D_BLOCKS
    ROLES: tl.constexpr = PROJECTIONS if PART == "projections" else PROJECTIONS + D_BLOCKS * K_BLOCKS
    local = tl.program_id(0) // ROLES
    role = tl.program_id(0) % ROLES
    split = tl.program_id(1).to(tl.int64)
    proj = select(local, projections, COUNT)
    vectors += local.to(tl.int64) * rows_total * (3 * R)
    gradients += (split * COUNT + local) * LENGTH
    if role < PROJECTIONS:
        per_split = (tiles + splits - 1) // splits
        j = lookup(local, GROUP, COUNT, 1, 0).to(tl.int64)
        backward_projections(select(local, xs, COUNT), offsets, proj, averages, select(local, proj_weights, COUNT),
                             select(local, grad_xs, COUNT), vectors, partial, gradients, split * per_split,
                             tl.minimum((split + 1) * per_split, tiles), dialogues, tiles, scale, j, role * BLOCK_D,
                             D, R, RP, M, PATH, MAX_PARTS, OPERAND, PRECISION, BLOCK_N, BLOCK_D)
    else:
        blocks = (rows_total + BLOCK_N - 1) // BLOCK_N
        per_split = (blocks + splits - 1) // splits * BLOCK_N
        grad_attention += local.to(tl.int64) * rows_total * D
        backward_map(proj, grad_attention, vectors, gradients + (4 * R * D + 4 * R), split * per_split,
                     tl.minimum((split + 1) * per_split, rows_total), (role - PROJECTIONS) // K_BLOCKS * BLOCK_D,
                     (role - PROJECTIONS) % K_BLOCKS * KB, D, R, RO, KB, PRECISION, BLOCK_N, BLOCK_D)


@triton.jit
def backward_projections(x, offsets, proj, averages, weight, grad_x, vectors, partial, gradients, first, last, dialogues, tiles,
                         scale, j, d0, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, M: tl.constexpr,
                         PATH: tl.constexpr, MAX_PARTS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """g_x += P^T g_q and the partial g_P = g_q^T x, g_p over the tiles first ... last - 1, one block of columns."""
    kind = x.dtype.element_ty
    r = tl.arange(0, RP)
    d = d0 + tl.arange(0, BLOCK_D)
    at_weight = r[:, None] * D + d[None, :]
    mask_weight = (r < R)[:, None] & (d < D)[None, :]
    sum_q1 = tl.zeros((RP, BLOCK_D), tl.float32)
    sum_q2 = tl.zeros((RP, BLOCK_D), tl.float32)
    sum_k1 = tl.zeros((RP, BLOCK_D), tl.float32)
    sum_k2 = tl.zeros((RP, BLOCK_D), tl.float32)
    bias_q1 = tl.zeros((RP,), tl.float32)
    bias_q2 = tl.zeros((RP,), tl.float32)
    bias_k1 = tl.zeros((RP,), tl.float32)
    bias_k2 = tl.zeros((RP,), tl.float32)
    for tile in range(first, last):
        dialogue, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
        row = start + (tile - first_tile) * BLOCK_N
        if row < end:
            rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
            inside = rows < end
            q1 = load_projection(proj, rows, inside, 0, R, RP)
            q2 = load_projection(proj, rows, inside, 1, R, RP)
            k1 = load_projection(proj, rows, inside, 2, R, RP)
            k2 = load_projection(proj, rows, inside, 3, R, RP)
            at_row = vectors + rows[:, None] * (3 * R) + r[None, :]
            mask_row = inside[:, None] & (r < R)[None, :]
            g_u = tl.load(at_row, mask=mask_row, other=0.0)
            g_v = tl.load(at_row + R, mask=mask_row, other=0.0)
            if M > 1:
                length = end - start
                g_a = nearest(grad_average(partial, averages, dialogue, first_tile, length, tiles, scale, j, PATH, M, R, RP, MAX_PARTS,
                                           PRECISION, BLOCK_N), PRECISION)
                g_u = tl.dot(nearest(q2 * k2, PRECISION), tl.trans(g_a), g_u, input_precision=PRECISION)
                g_v = tl.dot(nearest(q1 * k1, PRECISION), g_a, g_v, input_precision=PRECISION)
            g_q1 = nearest(g_u * k1, PRECISION)
            g_q2 = nearest(g_v * k2, PRECISION)
            g_k1 = nearest(g_u * q1, PRECISION)
            g_k2 = nearest(g_v * q2, PRECISION)

            at = rows[:, None] * D + d[None, :]
            mask = inside[:, None] & (d < D)[None, :]
            g_x = tl.load(grad_x + at, mask=mask, other=0.0).to(tl.float32)
            p_q1 = rounded(tl.load(weight + at_weight, mask=mask_weight, other=0.0), kind)
            g_x = tl.dot(g_q1, nearest(p_q1, PRECISION), g_x, input_precision=PRECISION)
            p_q2 = rounded(tl.load(weight + R * D + at_weight, mask=mask_weight, other=0.0), kind)
            g_x = tl.dot(g_q2, nearest(p_q2, PRECISION), g_x, input_precision=PRECISION)
            p_k1 = rounded(tl.load(weight + 2 * R * D + at_weight, mask=mask_weight, other=0.0), kind)
            g_x = tl.dot(g_k1, nearest(p_k1, PRECISION), g_x, input_precision=PRECISION)
            p_k2 = rounded(tl.load(weight + 3 * R * D + at_weight, mask=mask_weight, other=0.0), kind)
            g_x = tl.dot(g_k2, nearest(p_k2, PRECISION), g_x, input_precision=PRECISION)
            tl.store(grad_x + at, g_x.to(grad_x.dtype.element_ty), mask=mask)

            x_tile = nearest(tl.load(x + at, mask=mask, other=0.0), PRECISION)
            sum_q1 = tl.dot(tl.trans(g_q1), x_tile, sum_q1, input_precision=PRECISION)
            sum_q2 = tl.dot(tl.trans(g_q2), x_tile, sum_q2, input_precision=PRECISION)
            sum_k1 = tl.dot(tl.trans(g_k1), x_tile, sum_k1, input_precision=PRECISION)
            sum_k2 = tl.dot(tl.trans(g_k2), x_tile, sum_k2, input_precision=PRECISION)
            bias_q1 += tl.sum(g_q1, axis=0)
            bias_q2 += tl.sum(g_q2, axis=0)
            bias_k1 += tl.sum(g_k1, axis=0)
            bias_k2 += tl.sum(g_k2, axis=0)
    tl.store(gradients + at_weight, sum_q1, mask=mask_weight)
    tl.store(gradients + R * D + at_weight, sum_q2, mask=mask_weight)
    tl.store(gradients + 2 * R * D + at_weight, sum_k1, mask=mask_weight)
    tl.store(gradients + 3 * R * D + at_weight, sum_k2, mask=mask_weight)
    if d0 == 0:
        at_bias = gradients + 4 * R * D + r
        tl.store(at_bias, bias_q1, mask=r < R)
        tl.store(at_bias + R, bias_q2, mask=r < R)
        tl.store(at_bias + 2 * R, bias_k1, mask=r < R)
        tl.store(at_bias + 3 * R, bias_k2, mask=r < R)


@triton.jit
def backward_map(proj, grad_attention, vectors, gradients, first, last, d0, k0, D: tl.constexpr, R: tl.constexpr,
                 RO: tl.constexpr, KB: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Partial g_W[d, k, o] = sum_n g_att_d u_k w_o and g_c over the rows first ... last - 1, one block of d and of k."""
    d = d0 + tl.arange(0, BLOCK_D)
    o = tl.arange(0, RO)
    sums = tl.zeros((BLOCK_D, KB * RO), tl.float32)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    for row in range(first, last, BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = rows < last
        g_att = tl.load(grad_attention + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        left = tl.trans(nearest(g_att, PRECISION))
        w = tl.load(vectors + rows[:, None] * (3 * R) + 2 * R + o[None, :], mask=inside[:, None] & (o < R)[None, :], other=0.0)
        factors = outer(load_core(proj, rows, inside, k0, R, KB), w, BLOCK_N, KB, RO)
        sums = tl.dot(left, nearest(factors, PRECISION), sums, input_precision=PRECISION)
        bias += tl.sum(g_att.to(tl.float32), axis=0)
    column, real = map_columns(k0, R, KB, RO)
    tl.store(gradients + d[:, None] * (R * R) + column[None, :], sums, mask=(d < D)[:, None] & real[None, :])
    if k0 == 0:
        tl.store(gradients + D * R * R + d, bias, mask=d < D)


# ---- many rows: what is left beside products of the library. Those over R are on the ordinary cores, in float32: they are small.


@triton.jit
def pack_map(weights, biases, projections, maps, narrowed, D: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
             COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """maps: [W, c, 0 ..] in the dtype of x, [COUNT, D, COLUMNS]; narrowed: P in that dtype, [COUNT, 4 R, D].

    Grid (cdiv(D * COLUMNS, BLOCK) + cdiv(4 * R * D, BLOCK), COUNT), without the second summand where P is there already.
    """
    MAP_BLOCKS: tl.constexpr = (D * COLUMNS + BLOCK - 1) // BLOCK
    local = tl.program_id(1)
    kind = maps.dtype.element_ty
    if tl.program_id(0) < MAP_BLOCKS:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        d = i // COLUMNS
        column = i % COLUMNS
        value = rounded(tl.load(select(local, weights, COUNT) + d * (R * R) + column, mask=(d < D) & (column < R * R), other=0.0), kind)
        bias = rounded(tl.load(select(local, biases, COUNT) + d, mask=(d < D) & (column == R * R), other=0.0), kind)
        tl.store(maps + local * (D * COLUMNS) + i, tl.where(column == R * R, bias, value), mask=d < D)
    else:
        i = (tl.program_id(0) - MAP_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        inside = i < 4 * R * D
        projection = tl.load(select(local, projections, COUNT) + i, mask=inside, other=0.0)
        tl.store(narrowed + local * (4 * R * D) + i, rounded(projection, kind), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def unpack_map(partial, grad_weights, grad_biases, parts, D: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr,
               SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """g_W and g_c, sums of partial: float32 [parts, COUNT, SPLITS, D, COLUMNS]. Grid (cdiv(D * COLUMNS, BLOCK), COUNT)."""
    local = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = i // COLUMNS
    column = i % COLUMNS
    inside = (d < D) & (column <= R * R)
    total = tl.zeros((BLOCK,), tl.float32)
    split = local * SPLITS + tl.arange(0, SPLITS)
    at = partial + split[:, None] * (D * COLUMNS) + i[None, :]
    for _ in range(parts):
        total += tl.sum(tl.load(at, mask=inside[None, :], other=0.0), axis=0)
        at += COUNT * SPLITS * D * COLUMNS
    weight = select(local, grad_weights, COUNT)
    tl.store(weight + d * (R * R) + column, rounded(total, weight.dtype.element_ty), mask=inside & (column < R * R))
    bias = select(local, grad_biases, COUNT)
    tl.store(bias + d, rounded(total, bias.dtype.element_ty), mask=inside & (column == R * R))


@triton.jit(do_not_specialize=["dialogues", "tiles", "rows_total"])
def sum_cores(projections, vectors, offsets, partial, dialogues, tiles, rows_total, R: tl.constexpr, RP: tl.constexpr, M: tl.constexpr,
              MAX_PARTS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum u v^T (BACKWARD: v g_w^T) of each part of a dialogue. Grid (tiles, M).

    vectors: float32 [M, N, 3 R], of `outer_rows`; partial: float32 [M, tiles, R, R].
    """
    tile = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    proj = select(j, projections, M)
    _, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
    step = part_rows(end - start, BLOCK_N, MAX_PARTS)
    first = start + (tile - first_tile) * step
    last = tl.minimum(first + step, end)
    if first >= last:
        return
    r = tl.arange(0, RP)
    sums = tl.zeros((RP, RP), tl.float32)
    for row in range(first, last, BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = rows < last
        v = load_projection(proj, rows, inside, 1, R, RP) * load_projection(proj, rows, inside, 3, R, RP)
        if BACKWARD:
            at = vectors + (j.to(tl.int64) * rows_total + rows)[:, None] * (3 * R) + R + r[None, :]
            g_w = tl.load(at, mask=inside[:, None] & (r < R)[None, :], other=0.0)
            sums = tl.dot(tl.trans(v), g_w, sums, input_precision="ieee")
        else:
            u = load_projection(proj, rows, inside, 0, R, RP) * load_projection(proj, rows, inside, 2, R, RP)
            sums = tl.dot(tl.trans(u), v, sums, input_precision="ieee")
    store_square(partial + (j.to(tl.int64) * tiles + tile) * (R * R), sums, R, RP)


@triton.jit(do_not_specialize=["dialogues", "tiles"])
def average_cores(partial, offsets, averages, grad_averages, dialogues, tiles, scale, R: tl.constexpr, RP: tl.constexpr,
                  M: tl.constexpr, PATH: tl.constexpr, MAX_PARTS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr):
    """A of each dialogue; BACKWARD: s / N_b g_A, float32 [M, B, R, R], from the parts of g_C. Grid (dialogues, M)."""
    dialogue = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    start = tl.load(offsets + dialogue)
    length = tl.load(offsets + dialogue + 1) - start
    first_tile = start // BLOCK_N + dialogue
    if BACKWARD:
        if length > 0:                  # nobody reads those of empty dialogues
            g_a = grad_average(partial, averages, dialogue, first_tile, length, tiles, scale, j.to(tl.int64), PATH, M, R, RP,
                               MAX_PARTS, "ieee", BLOCK_N)
            store_square(grad_averages + (j.to(tl.int64) * dialogues + dialogue) * (R * R), g_a, R, RP)
    else:
        step = part_rows(length, BLOCK_N, MAX_PARTS)
        mean = sum_parts(partial, j.to(tl.int64) * tiles + first_tile, (length + step - 1) // step, R, RP)
        mean *= scale / tl.maximum(length, 1).to(tl.float32)
        store_square(select(j, averages, M) + dialogue * (R * R), mean, R, RP)


@triton.jit(do_not_specialize=["dialogues", "rows_total"])
def contract_cores(projections, vectors, offsets, averages, dialogues, rows_total, scale, R: tl.constexpr, RP: tl.constexpr,
                   M: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr):
    """w = s C^T v of one block of a dialogue's rows: the last of three columns of vectors, float32 [M, N, 3 R]. Grid (tiles, M)."""
    j = tl.program_id(1)
    proj = select(j, projections, M)
    tile = tl.program_id(0).to(tl.int64)
    dialogue, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
    row = start + (tile - first_tile) * BLOCK_N
    if row >= end:
        return
    rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = rows < end
    w = load_projection(proj, rows, inside, 1, R, RP) * load_projection(proj, rows, inside, 3, R, RP)
    if M > 1:
        w = tl.dot(w, contracted(averages, dialogue, j, RING, M, R, RP, "ieee"), input_precision="ieee")
    r = tl.arange(0, RP)
    at = vectors + (j.to(tl.int64) * rows_total + rows)[:, None] * (3 * R) + 2 * R + r[None, :]
    tl.store(at, scale * w, mask=inside[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["rows_total", "first", "last", "padded"])
def outer_rows(projections, vectors, products, factors, rows_total, first, last, padded, scale, R: tl.constexpr, RO: tl.constexpr,
               COLUMNS: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr):
    """F of the rows first ... last - 1, [COUNT, padded, COLUMNS]: u_k w_o in column k R + o, then 1, then 0; u w = 0 from last on.

    BACKWARD: from products, S in the same places, g_u and s g_w too, the first two of three columns of vectors, float32
    [M, N, 3 R]. Grid (cdiv(padded, BLOCK_N), COUNT).
    """
    group = tl.program_id(1)
    proj = select(group, projections, COUNT)
    vectors += lookup(group, GROUP, COUNT, 1, 0).to(tl.int64) * rows_total * (3 * R)
    place = group.to(tl.int64) * padded * COLUMNS
    factors += place
    kind = factors.dtype.element_ty
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)          # a chunk's elements fit into 32 bits
    rows = first.to(tl.int64) + local
    inside = rows < last
    k = tl.arange(0, RO)
    u = load_core(proj, rows, inside, 0, R, RO)
    at_row = vectors + rows[:, None] * (3 * R) + k[None, :]
    mask_row = inside[:, None] & (k < R)[None, :]
    w = tl.load(at_row + 2 * R, mask=mask_row, other=0.0)
    at = local[:, None, None] * COLUMNS + (k[:, None] * R + k[None, :])[None, :, :]
    mask = (local < padded)[:, None, None] & ((k < R)[:, None] & (k < R)[None, :])[None, :, :]
    tl.store(factors + at, rounded(u[:, :, None] * w[:, None, :], kind), mask=mask)
    PAD: tl.constexpr = 8
    pad = R * R + tl.arange(0, PAD)
    one = tl.where(pad == R * R, 1.0, 0.0)[None, :] + tl.zeros((BLOCK_N, PAD), tl.float32)
    tl.store(factors + local[:, None] * COLUMNS + pad[None, :], one.to(kind), mask=(local < padded)[:, None] & (pad < COLUMNS)[None, :])
    if BACKWARD:
        s = tl.load(products + place + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at_row, tl.sum(s * w[:, None, :], axis=2), mask=mask_row)
        tl.store(at_row + R, scale * tl.sum(s * u[:, :, None], axis=1), mask=mask_row)


@triton.jit(do_not_specialize=["first", "last"])
def gate_rows(xs, attentions, targets, outs, seed, first, last, beta, keep_scale, D: tl.constexpr, COUNT: tl.constexpr,
              GROUP: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr):
    """Gate and dropout of the rows first ... last - 1. Grid: see `column_tile`, and COUNT."""
    local = tl.program_id(1)
    j = lookup(local, GROUP, COUNT, 1, 0)
    rows, d0 = column_tile(first, last, D, BLOCK_N, BLOCK_D)
    d = d0 + tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = (rows < last)[:, None] & (d < D)[None, :]
    attention = tl.load(select(local, attentions, COUNT) + at, mask=mask, other=0.0).to(tl.float32)
    store_gated(attention, select(local, xs, COUNT), select(local, targets, COUNT), select(local, outs, COUNT), at, mask, seed, j, rows,
                d0, beta, keep_scale, GATED, DROPOUT, THRESHOLD, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["first", "last", "padded"])
def gate_gradients(grad_outs, grad_targets, factor, xs, attentions, shares, grad_xs, grad_attention, seed, first, last, padded, beta,
                   keep_scale, D: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, HAS_TARGET: tl.constexpr,
                   SHARE: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr):
    """The gate's share of g_x, added to `shares`, rows of length SHARE, unless that is 0; and g_att of the rows first ... last - 1, 0 from last
    on: [COUNT, padded, STRIDE] in the dtype of x. factor: as in `through_gate`, or None. Grid: see `column_tile`, for padded rows, and COUNT.
    """
    local = tl.program_id(1)
    j = lookup(local, GROUP, COUNT, 1, 0)
    x = select(local, xs, COUNT)
    grad_x = select(local, grad_xs, COUNT)
    grad_attention += local.to(tl.int64) * padded * STRIDE
    kind = x.dtype.element_ty
    rows, d0 = column_tile(first, last, D, BLOCK_N, BLOCK_D)
    d = d0 + tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = (rows < last)[:, None] & (d < D)[None, :]
    g_att, g_x = through_gate(select(local, grad_outs, COUNT), select(local, grad_targets, COUNT), factor, x, select(local, attentions, COUNT),
                              at, mask, seed, j, rows, d0, beta, keep_scale, HAS_TARGET, GATED, DROPOUT, THRESHOLD, BLOCK_N, BLOCK_D)
    if SHARE:
        g_x += tl.load(select(local, shares, COUNT) + rows[:, None] * SHARE + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_attention + (rows - first)[:, None] * STRIDE + d[None, :], rounded(g_att, kind),
             mask=(rows - first < padded)[:, None] & (d < D)[None, :])
    tl.store(grad_x + at, rounded(g_x, kind), mask=mask)


@triton.jit
def store_part(value, PART: tl.constexpr, gradient, sums, rows, inside, R: tl.constexpr, RP: tl.constexpr, STRIDE: tl.constexpr):
    """g_q1, g_q2, g_k1 or g_k2 (PART 0 .. 3) of some rows, and its column sums."""
    r = tl.arange(0, RP)
    tl.store(gradient + rows[:, None] * STRIDE + PART * R + r[None, :], rounded(value, gradient.dtype.element_ty),
             mask=inside[:, None] & (r < R)[None, :])
    tl.store(sums + PART * R + r, tl.sum(value, axis=0), mask=r < R)


@triton.jit(do_not_specialize=["dialogues", "tiles", "rows_total"])
def core_gradients(projections, vectors, offsets, averages, grad_averages, gradients, sums, dialogues, tiles, rows_total, R: tl.constexpr,
                   RP: tl.constexpr, M: tl.constexpr, RING: tl.constexpr, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """g_q1 .. g_k2 of one block of a dialogue's rows, and their sums over it. Grid (tiles, M).

    vectors: float32 [M, N, 3 R], of `outer_rows`; grad_averages: of `average_cores`; gradients: [M, N, STRIDE] in the dtype of x;
    sums: float32 [tiles, M, 4 R].
    """
    tile = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    proj = select(j, projections, M)
    vectors += j.to(tl.int64) * rows_total * (3 * R)
    gradient = gradients + j.to(tl.int64) * rows_total * STRIDE
    sums += (tile * M + j) * (4 * R)
    dialogue, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
    row = start + (tile - first_tile) * BLOCK_N
    r = tl.arange(0, RP)
    if row >= end:
        for part in tl.static_range(4):
            tl.store(sums + part * R + r, tl.zeros((RP,), tl.float32), mask=r < R)
        return
    rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = rows < end
    q1 = load_projection(proj, rows, inside, 0, R, RP)
    q2 = load_projection(proj, rows, inside, 1, R, RP)
    k1 = load_projection(proj, rows, inside, 2, R, RP)
    k2 = load_projection(proj, rows, inside, 3, R, RP)
    at_row = vectors + rows[:, None] * (3 * R) + r[None, :]
    mask_row = inside[:, None] & (r < R)[None, :]
    if M > 1:
        g_a = load_square(grad_averages + (j.to(tl.int64) * dialogues + dialogue) * (R * R), R, RP)
    g_u = tl.load(at_row, mask=mask_row, other=0.0)
    if M > 1:
        g_u = tl.dot(q2 * k2, tl.trans(g_a), g_u, input_precision="ieee")
    store_part(g_u * k1, 0, gradient, sums, rows, inside, R, RP, STRIDE)
    store_part(g_u * q1, 2, gradient, sums, rows, inside, R, RP, STRIDE)
    g_v = tl.load(at_row + R, mask=mask_row, other=0.0)
    if M > 1:
        c = contracted(averages, dialogue, j, RING, M, R, RP, "ieee")
        g_v = tl.dot(g_v, tl.trans(c), input_precision="ieee")
        g_v = tl.dot(q1 * k1, g_a, g_v, input_precision="ieee")
    store_part(g_v * k2, 1, gradient, sums, rows, inside, R, RP, STRIDE)
    store_part(g_v * q2, 3, gradient, sums, rows, inside, R, RP, STRIDE)


# -------------------------------------------------------------------------------------------------------- forward launcher


def forward(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
            map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float,
            dropout: float, seed: Tensor | None, gated_target: bool, with_target: bool) -> list[Tensor]:
    """One AFW layer, M modalities.

    x: M [N, D_j] of one dtype (float32, bfloat16, float16); offsets int64 [B + 1]; proj_weight [4 R, D_j], proj_bias [4 R],
    map_weight [D_j, R R], map_bias [D_j], a kind of one dtype, that of x or float32; ring: M (M - 1) positions, row j the
    others in the order of contraction; seed: int64 [1], needed where dropout > 0.

    Returns M out [N, D_j]; with_target: M targets; then M projections float32 [N, 4 R], M averages A float32 [B, R, R], M
    attentions [N, D_j] (the targets themselves where the target is the attention).
    """
    x, proj_weight, proj_bias, map_weight, map_bias = common.contiguous(x, proj_weight, proj_bias, map_weight, map_bias)
    offsets = offsets.contiguous()
    m, rows, dialogues = len(x), x[0].shape[0], offsets.numel() - 1
    rank = proj_bias[0].numel() // 4
    together = common.groups([t.shape[1] for t in x])
    library = rows > 0 and common.through_library(x[0].dtype, rows)
    out = [torch.empty_like(t) for t in x]
    stacks = attention_stacks(x, together) if library else ()
    attention = taken_apart(stacks, together, rows) if library else [torch.empty_like(t) for t in x]
    gated = gated_target and with_target
    target = [torch.empty_like(t) for t in x] if gated else attention
    proj = [t.new_empty((rows, 4 * rank), dtype=torch.float32) for t in x]
    average = [t.new_empty((dialogues, rank, rank), dtype=torch.float32) for t in x]
    if rows == 0:
        for t in average:
            t.zero_()
        return out + (target if with_target else []) + proj + average + attention
    meta = constants(x[0].dtype, rank, rows, dialogues)
    tiles = rows // meta["BLOCK_N"] + dialogues
    sums = x[0].new_empty((m, tiles, rank, rank), dtype=torch.float32)
    keep_scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    ring = tuple(ring) or (0,)
    with common.device_of(x[0]):
        if library:
            forward_through_library(x, offsets, proj_weight, proj_bias, map_weight, map_bias, sums, proj, average, attention, stacks,
                                    target, out, ring, scale, beta, dropout, seed, gated, together, meta)
        else:
            for group in together:
                project_group(group, x, offsets, proj_weight, proj_bias, proj, sums, meta)
            for group in together:
                mine = partial(common.pick, group)
                width = x[group[0]].shape[1]
                contract[(tiles, len(group) * cdiv(width, meta["BLOCK_D"]))](
                    mine(x), offsets, mine(proj), mine(map_weight), mine(map_bias), sums, mine(average), mine(attention),
                    mine(target), mine(out), seed, dialogues, tiles, scale, beta, keep_scale, D=width, M=m, RING=ring,
                    COUNT=len(group), GROUP=group, GATED=gated, **common.dropout_arguments(dropout),
                    **meta.only("R RP RO KB MAX_PARTS PRECISION BLOCK_N BLOCK_D num_warps enable_fp_fusion"))
    return out + (target if with_target else []) + proj + average + attention


def attention_stacks(x: Sequence[Tensor], together: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Per group [COUNT, rows, D] for one product: multiples of 8 rows, so that each modality's part is aligned whatever N is."""
    return [x[group[0]].new_empty((len(group), common.padded(x[0].shape[0]), x[group[0]].shape[1])) for group in together]


def taken_apart(stacks: Sequence[Tensor], together: Sequence[tuple[int, ...]], rows: int) -> list[Tensor]:
    """M views [N, D_j] of `attention_stacks`."""
    found = {j: stack[place, :rows] for stack, group in zip(stacks, together) for place, j in enumerate(group)}
    return [found[j] for j in range(len(found))]


def project_group(group: Sequence[int], x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor],
                  proj_bias: Sequence[Tensor], proj: Sequence[Tensor], sums: Tensor, meta: dict) -> None:
    mine = partial(common.pick, group)
    project[(sums.shape[1], len(group))](
        mine(x), offsets, mine(proj_weight), mine(proj_bias), mine(proj), sums, offsets.numel() - 1, sums.shape[1],
        D=x[group[0]].shape[1], COUNT=len(group), GROUP=group,
        **meta.only("R RP MAX_PARTS OPERAND PRECISION BLOCK_N BLOCK_D num_warps enable_fp_fusion"))


def packed_maps(group: Sequence[int], x: Sequence[Tensor], map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], rank: int,
                proj_weight: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
    """[W, c, 0 ..] [COUNT, D, multiple of 8], and, of those given, P [4 R, D] each, in the dtype of x."""
    mine, like = partial(common.pick, group), x[group[0]]
    count, width, columns, block = len(group), like.shape[1], common.padded(rank * rank + 1), 1024
    maps = like.new_empty((count, width, columns))
    narrowed = mine(proj_weight) if proj_weight else ()
    blocks = cdiv(width * columns, block)
    to = maps
    if cast := proj_weight and narrowed[0].dtype != like.dtype:
        to = like.new_empty((count, 4 * rank, width))
        blocks += cdiv(4 * rank * width, block)
    pack_map[(blocks, count)](mine(map_weight), mine(map_bias), mine(proj_weight or map_weight), maps, to, D=width, R=rank,
                              COLUMNS=columns, COUNT=count, BLOCK=block, num_warps=4, enable_fp_fusion=True)
    return maps, list(to) if cast else list(narrowed)


def forward_through_library(x: list[Tensor], offsets: Tensor, proj_weight: list[Tensor], proj_bias: list[Tensor],
                            map_weight: list[Tensor], map_bias: list[Tensor], sums: Tensor, proj: list[Tensor],
                            average: list[Tensor], attention: list[Tensor], stacks: Sequence[Tensor], target: list[Tensor],
                            out: list[Tensor], ring: tuple[int, ...], scale: float, beta: float, dropout: float, seed: Tensor | None,
                            gated: bool, together: Sequence[tuple[int, ...]], meta: Constants) -> None:
    """Fills proj, average, attention, target and out; sums: float32 [M, tiles, R, R]; stacks: see `attention_stacks`."""
    m, tiles, rank, _ = sums.shape
    rows, dialogues = x[0].shape[0], offsets.numel() - 1
    small = meta.only("R RP BLOCK_N enable_fp_fusion")
    parts = {"MAX_PARTS": meta["MAX_PARTS"], "BACKWARD": False}
    if meta["PRECISION"] == "ieee":         # on ordinary cores: there the library is several times as fast
        for x_j, weight, bias, to in zip(x, proj_weight, proj_bias, proj):
            torch.addmm(bias, x_j, weight.t(), out=to)
        sum_cores[(tiles, m)](tuple(proj), sums, offsets, sums, dialogues, tiles, rows, M=m, num_warps=4, **parts, **small)
    else:
        for group in together:
            project_group(group, x, offsets, proj_weight, proj_bias, proj, sums, meta)
    vectors = x[0].new_empty((m, rows, 3 * rank), dtype=torch.float32)
    average_cores[(dialogues, m)](sums, offsets, tuple(average), sums, dialogues, tiles, scale, M=m, PATH=(0,), num_warps=4, **parts,
                                  **small)
    contract_cores[(tiles, m)](tuple(proj), vectors, offsets, tuple(average), dialogues, rows, scale, M=m, RING=ring, num_warps=4, **small)
    keep_scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    for group, stack in zip(together, stacks):
        mine, count = partial(common.pick, group), len(group)
        packed, _ = packed_maps(group, x, map_weight, map_bias, rank)
        _, width, columns = packed.shape
        ranges = common.chunks(rows, stack.element_size() * max(width, columns))
        scratch = stack.new_empty((count * ranges[0][1] * columns,))
        for first, last in ranges:
            n = last - first
            factors = scratch[:count * n * columns].view(count, n, columns)
            block = 4096 // meta["RO"] ** 2         # rows: 4096 elements of F
            outer_rows[(cdiv(n, block), count)](
                mine(proj), vectors, factors, factors, rows, first, last, n, scale, COLUMNS=columns, COUNT=count, GROUP=group,
                BACKWARD=False, BLOCK_N=block, num_warps=4, **meta.only("R RO enable_fp_fusion"))
            common.product(factors, packed.transpose(1, 2), stack[:, first:last])
            gate_rows[(cdiv(n, GATE_ROWS) * cdiv(width, GATE_COLUMNS), count)](
                mine(x), mine(attention), mine(target), mine(out), seed, first, last, beta, keep_scale, D=width, COUNT=count,
                GROUP=group, GATED=gated, **common.dropout_arguments(dropout), BLOCK_N=GATE_ROWS, BLOCK_D=GATE_COLUMNS, num_warps=4,
                enable_fp_fusion=True)


# ------------------------------------------------------------------------------------------------------- backward launcher


def backward(grad_out: Sequence[Tensor], grad_target: Sequence[Tensor], x: Sequence[Tensor], offsets: Tensor,
             proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor], map_weight: Sequence[Tensor], map_bias: Sequence[Tensor],
             saved: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None,
             gated_target: bool, into: Sequence[Tensor] | None = None, beside: Branch = here,
             factors: Sequence[Tensor] | None = None) -> list[Tensor]:
    """grad_out: M [N, D_j]; grad_target: M [N, D_j] or empty; saved: what `forward` returned after out and target; into: M gradients
    that x has from elsewhere, contiguous, in its dtype: those of here are added in place, and they are returned. With factors, one for equal
    widths, these two are of `attention_mapping.backward_for_gate`, and new tensors are returned.
    beside: from `ops.linear.branch`, for the gradients of the parameters.

    Returns the gradients of x, proj_weight, proj_bias, map_weight, map_bias, M each, in the dtypes and shapes of those.
    """
    grad_out, grad_target, x, proj_weight, map_weight = common.contiguous(grad_out, grad_target, x, proj_weight, map_weight)
    offsets = offsets.contiguous()
    m, rows, dialogues = len(x), x[0].shape[0], offsets.numel() - 1
    rank = proj_bias[0].numel() // 4
    saved = list(saved)
    proj, average, attention = saved[:m], saved[m:2 * m], saved[2 * m:]
    grad_x = list(into) if into and factors is None else [torch.empty_like(t) for t in x]
    parameters = [list(proj_weight), list(proj_bias), list(map_weight), list(map_bias)]
    grads = [list(kind) for kind in parameters]     # to be replaced
    library = common.through_library(x[0].dtype, rows)
    if rows == 0 or library:
        grads = [[torch.empty_like(t, memory_format=torch.contiguous_format) for t in kind] for kind in parameters]
    if rows == 0:
        for kind in grads:
            for t in kind:
                t.zero_()
        return grad_x + [t for kind in grads for t in kind]

    meta = constants(x[0].dtype, rank, rows, dialogues)
    tiles = rows // meta["BLOCK_N"] + dialogues
    splits = min(common.MAX_SPLITS, tiles)
    float32 = {"dtype": torch.float32}
    sums = x[0].new_empty((m, tiles, rank, rank), **float32)
    keep_scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    ring = tuple(ring) or (0,)
    warps = 8 if meta["PRECISION"] == "ieee" else 4     # see `constants`
    scratch = []
    together = common.groups([t.shape[1] for t in x])
    if library:
        with common.device_of(x[0]):
            backward_through_library(grad_out, grad_target, factors, x, offsets, parameters, proj, average, attention, sums, into, grad_x,
                                     grads, ring, scale, beta, dropout, seed, gated_target, together, meta)
        return grad_x + [t for kind in grads for t in kind]
    with common.device_of(x[0]):
        for group in together:
            mine = partial(common.pick, group)
            width, count = x[group[0]].shape[1], len(group)
            grad_attention = x[0].new_empty((count, rows, width))
            vectors = x[0].new_empty((count, rows, 3 * rank), **float32)
            scratch.append((grad_attention, vectors))
            backward_rows[(tiles, count)](
                mine(grad_out), mine(grad_target or x), mine(x), offsets, mine(proj), tuple(average), mine(attention),
                mine(map_weight), mine(grad_x), grad_attention, vectors, sums, seed, dialogues, tiles, rows, scale, beta,
                keep_scale, D=width, M=m, RING=ring, COUNT=count, GROUP=group, HAS_TARGET=len(grad_target) > 0,
                INTO=bool(into), GATED=gated_target, **common.dropout_arguments(dropout),
                **{**meta, "num_stages": 1, "num_warps": warps})
        for group, (grad_attention, vectors) in zip(together, scratch):
            mine = partial(common.pick, group)
            width, count = x[group[0]].shape[1], len(group)
            length = cdiv(sum(kind[group[0]].numel() for kind in parameters), 4) * 4
            gradients = x[0].new_empty((splits, count, length), **float32)
            roles = {"projections": cdiv(width, meta["BLOCK_D"])}
            roles["map"] = roles["projections"] * cdiv(rank, meta["KB"])
            roles["both"] = sum(roles.values())

            def launch(part: str) -> list[Tensor]:
                backward_weights[(count * roles[part], splits)](
                    mine(x), offsets, mine(proj), tuple(average), mine(proj_weight), mine(grad_x), grad_attention, vectors, sums,
                    gradients, dialogues, tiles, rows, splits, scale, PART=part, D=width, M=m, PATH=ring_path(ring, m), COUNT=count,
                    GROUP=group, LENGTH=length, **{**meta, "num_warps": 8 if part == "map" and meta["RO"] > 8 else warps})    # or it spills
                return []

            def of_parameters(*_: Tensor) -> list[Tensor]:
                return common.reduced(gradients, [mine(kind) for kind in parameters])

            if beside is here:
                launch("both")
                found = of_parameters()
            else:                           # only the projections have a share in g_x
                beside(lambda *_: launch("map"), *mine(proj), grad_attention, vectors, gradients)
                launch("projections")
                found = beside(of_parameters, gradients)
            for kind, place in zip(grads, range(0, 4 * count, count)):
                for at, j in enumerate(group):
                    kind[j] = found[place + at]
    return grad_x + [t for kind in grads for t in kind]


def backward_through_library(grad_out: list[Tensor], grad_target: list[Tensor], target_factors: Sequence[Tensor] | None, x: list[Tensor],
                             offsets: Tensor, parameters: list[list[Tensor]], proj: list[Tensor], average: list[Tensor],
                             attention: list[Tensor], sums: Tensor, shares: Sequence[Tensor] | None, grad_x: list[Tensor],
                             grads: list[list[Tensor]], ring: tuple[int, ...],
                             scale: float, beta: float, dropout: float, seed: Tensor | None, gated: bool,
                             together: Sequence[tuple[int, ...]], meta: Constants) -> None:
    """Fills grad_x (shares: what is added there; maybe itself) and grads, of the parameters; sums: float32 [M, tiles, R, R]."""
    m, tiles, rank, _ = sums.shape
    rows, dialogues = x[0].shape[0], offsets.numel() - 1
    float32 = {"dtype": torch.float32}
    proj_weight, _, map_weight, map_bias = parameters
    small = meta.only("R RP BLOCK_N enable_fp_fusion")
    parts = {"MAX_PARTS": meta["MAX_PARTS"], "BACKWARD": True}
    vectors = x[0].new_empty((m, rows, 3 * rank), **float32)
    contract_cores[(tiles, m)](tuple(proj), vectors, offsets, tuple(average), dialogues, rows, scale, M=m, RING=ring, num_warps=4, **small)
    keep_scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    right = {}
    for group in together:
        mine, count, like = partial(common.pick, group), len(group), x[group[0]]
        packed, weights = packed_maps(group, x, map_weight, map_bias, rank, proj_weight)
        right.update(zip(group, weights))
        _, width, columns = packed.shape
        stride = common.padded(width)
        ranges = common.chunks(rows, like.element_size() * max(stride, columns))
        most = cdiv(ranges[0][1], common.ROW_SPLITS) * common.ROW_SPLITS
        gradients_scratch, products_scratch, factors_scratch = (
            like.new_empty((count * most * length,)) for length in (stride, columns, columns))
        grad_map = like.new_empty((len(ranges), count * common.ROW_SPLITS, width, columns), **float32)
        for place, (first, last) in enumerate(ranges):
            n = cdiv(last - first, common.ROW_SPLITS) * common.ROW_SPLITS
            grad_attention = gradients_scratch[:count * n * stride].view(count, n, stride)
            products, factors = (t[:count * n * columns].view(count, n, columns) for t in (products_scratch, factors_scratch))
            gate_gradients[(cdiv(n, GATE_ROWS) * cdiv(width, GATE_COLUMNS), count)](
                mine(grad_out), mine(grad_target or x), target_factors and target_factors[group[0]], mine(x), mine(attention),
                mine(shares or grad_x), mine(grad_x), grad_attention, seed, first, last, n, beta, keep_scale, D=width, STRIDE=stride,
                COUNT=count, GROUP=group, HAS_TARGET=len(grad_target) > 0, SHARE=shares[group[0]].stride(0) if shares else 0, GATED=gated,
                **common.dropout_arguments(dropout), BLOCK_N=GATE_ROWS, BLOCK_D=GATE_COLUMNS, num_warps=4, enable_fp_fusion=True)
            common.product(grad_attention[:, :, :width], packed, products)
            block = 2048 // meta["RO"] ** 2         # rows: 2048 elements of F and of S
            outer_rows[(cdiv(n, block), count)](
                mine(proj), vectors, products, factors, rows, first, last, n, scale, COLUMNS=columns, COUNT=count, GROUP=group,
                BACKWARD=True, BLOCK_N=block, num_warps=4, **meta.only("R RO enable_fp_fusion"))
            split = grad_attention.view(count * common.ROW_SPLITS, n // common.ROW_SPLITS, stride)[:, :, :width]
            common.product(split.transpose(1, 2), factors.view(count * common.ROW_SPLITS, n // common.ROW_SPLITS, columns), grad_map[place])
        unpack_map[(cdiv(width * columns, 128), count)](
            grad_map, mine(grads[2]), mine(grads[3]), len(ranges), D=width, R=rank, COLUMNS=columns, COUNT=count, SPLITS=common.ROW_SPLITS,
            BLOCK=128, num_warps=4, enable_fp_fusion=True)

    grad_average = sums                         # read by none of one modality
    if m > 1:
        grad_average = x[0].new_empty((m, dialogues, rank, rank), **float32)
        sum_cores[(tiles, m)](tuple(proj), vectors, offsets, sums, dialogues, tiles, rows, M=m, num_warps=4, **parts, **small)
        average_cores[(dialogues, m)](sums, offsets, tuple(average), grad_average, dialogues, tiles, scale, M=m, PATH=ring_path(ring, m),
                                      num_warps=4, **parts, **small)
    stride = common.padded(4 * rank)
    grad_proj = x[0].new_empty((m, rows, stride))
    biases = x[0].new_empty((tiles, m, 4 * rank), **float32)
    core_gradients[(tiles, m)](tuple(proj), vectors, offsets, tuple(average), grad_average, grad_proj, biases, dialogues, tiles, rows,
                               M=m, RING=ring, STRIDE=stride, num_warps=4, **small)
    common.reduce(biases, [grads[1]], block=16, together=512)
    sums_of = grads[0]
    if grads[0][0].dtype != torch.float32:      # the library may add its own parts in 16 bits
        sums_of = [t.new_empty(t.shape, **float32) for t in grads[0]]
    for j in range(m):
        g_q = grad_proj[j, :, :4 * rank]
        common.add_product(g_q, right[j], grad_x[j])
        common.product(g_q.t(), x[j], sums_of[j])
    if sums_of is not grads[0]:
        torch._foreach_copy_(grads[0], sums_of)


class Constants(dict):
    """Arguments of kernels by name."""

    def only(self, names: str) -> dict:
        """Those with these names; the same dictionary every time, not to be changed."""
        if (found := self.__dict__.get(names)) is None:
            found = self.__dict__[names] = {name: self[name] for name in names.split()}
        return found


def constants(dtype: torch.dtype, rank: int, rows: int, dialogues: int) -> Constants:
    """Compile-time sizes and modes that the kernels share; not to be changed."""
    return _constants(dtype, common.precision(dtype), rank, common.rows_per_block(rows, dialogues), common.MAX_PARTS)


@lru_cache(maxsize=256)
def _constants(dtype: torch.dtype, precision: str, rank: int, block_n: int, max_parts: int) -> Constants:
    """"ieee" products run on the ordinary cores, where a thread holds whole rows and columns of the factors in registers: smaller
    blocks, or they spill.
    """
    small = precision == "ieee"
    power = triton.next_power_of_2(rank)
    ro = max(8, power)
    return Constants(R=rank, RP=max(16, power), RO=ro, KB=max(16 // ro, min((32 if small else 64) // ro, power)), MAX_PARTS=max_parts,
                     OPERAND=common.storage_operand(dtype), PRECISION=precision, BLOCK_N=block_n, BLOCK_D=32 if small else 64,
                     num_warps=4, enable_fp_fusion=True)


@lru_cache(maxsize=256)
def ring_path(ring: tuple[int, ...], m: int) -> tuple[int, ...]:
    """For `grad_average`: per modality j and other modality i the factors that surround A_j in C_i, as 2 l + side.

    Side 0 multiplies by A_l^T from the left, side 1 from the right. Row j lists the others in the order j + 1, j + 2, ..
    """
    path = []
    for j in range(m):
        for i in range(1, m):
            other = (j + i) % m
            around = list(ring[other * (m - 1):(other + 1) * (m - 1)])
            place = around.index(j)
            path += [2 * l for l in around[:place]] + [2 * l + 1 for l in reversed(around[place + 1:])]
    return tuple(path) or (0,)


def why_not(device: str, dtype: torch.dtype, widths: Sequence[int], rank: int) -> str | None:
    """Why these kernels cannot serve M tensors [N, widths[j]] on a device type, or None. Any widths will do."""
    return common.why_not(device, dtype, rank)
