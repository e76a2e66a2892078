"""L1 loss between Phi(x) and its target in Triton; mathematics and notation in `ada2i_fast.ops.attention_mapping`.

Forward, one launch per distinct pair of width and coefficient, and one sum over the programs' losses:

    map_forward        Phi x in registers, its distance to the target, the sign of the difference as int8

Backward, two launches per distinct pair, for g_Phi is a sum over all rows and comes from partial sums (no float atomics):

    map_backward       g_x, g_target;  in other programs of the launch partial g_Phi, g_phi
    reduce_splits      g_Phi, g_phi

From `common.LIBRARY_ROWS` rows on the products go through the library:

    distance           of Phi x, which the library makes, to the target; its sign. "ieee" instead of both:
    map_in_parts       as map_forward, on tensor cores, from Phi in parts
    expand_signs       S in the dtype of x, g_target, partial g_phi; library: g_x = S (c Phi), g_Phi = S^T x
    split_rows         x and c Phi, or Phi, as sums of PARTS bfloat16, which have all of a float's bits: for "ieee" products, for which S is written
                       PARTS times side by side. The tensor cores multiply these exactly, at three times the rate of float32 (x by Phi, which
                       both have parts, takes two thirds of its time); what is no number is NaN. They round sums down, so small parts come
                       first: what is lost is some 2^-24 of a sum for each 16 numbers that are added to it
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
from .common import column_tile, multiply, rounded, select

FLAT = 2048                         # elements per program of `distance`
PARTS = 3
BLOCK_ROWS, BLOCK_COLUMNS = 32, 64  # tile of `expand_signs` and `split_rows`
TILE = {"BLOCK_N": BLOCK_ROWS, "BLOCK_D": BLOCK_COLUMNS, "num_warps": 4, "enable_fp_fusion": True}
MAP_IN_PARTS = {"BLOCK_N": 128, "BLOCK_D": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}     # wider ones spill

MIXED_PARAMETERS = True     # of 16-bit x: float32 ones are rounded where a product reads them, their gradients are float32

# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["rows_total"])
def map_forward(xs, targets, weights, biases, signs, losses, counted, rows_total, coefficient, COUNTED: tl.constexpr,
                D: tl.constexpr, COUNT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """Grid (cdiv(N, BLOCK_N), COUNT * cdiv(D, BLOCK_D)): a tile of Phi x each. losses: float32, one per program.

    COUNTED: only so many rows as `counted` (int64, on the device) says have a distance, and the mean is over them.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    local = tl.program_id(1) // D_BLOCKS
    x = select(local, xs, COUNT)
    weight = select(local, weights, COUNT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (tl.program_id(1) % D_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = rows < rows_total
    kind = x.dtype.element_ty

    mapped = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + rows[:, None] * D + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0.0)
        block = tl.load(weight + d[None, :] * D + k[:, None], mask=(k < D)[:, None] & (d < D)[None, :], other=0.0)
        mapped = multiply(x_tile.to(OPERAND), rounded(block, kind).to(OPERAND), mapped, PRECISION)
    keep_distance(mapped, select(local, targets, COUNT), select(local, biases, COUNT), select(local, signs, COUNT), counted, rows, inside, d,
                  losses + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)), rows_total, coefficient, COUNTED, D)


@triton.jit
def keep_distance(mapped, target, bias, sign, counted, rows, inside, d, loss, rows_total, coefficient, COUNTED: tl.constexpr, D: tl.constexpr):
    """Writes the share of a tile of Phi x, given without phi, in the loss, and the signs."""
    if COUNTED:
        coefficient = coefficient * rows_total / tl.load(counted)
    mapped += rounded(tl.load(bias + d, mask=d < D, other=0.0), target.dtype.element_ty).to(tl.float32)[None, :]
    at = rows[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    difference = mapped - tl.load(target + at, mask=mask, other=0.0).to(tl.float32)
    if COUNTED:
        difference = tl.where((rows < tl.load(counted))[:, None], difference, 0.0)
    tl.store(sign + at, (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8), mask=mask)
    tl.store(loss, coefficient * tl.sum(tl.where(mask, tl.abs(difference), 0.0)))


@triton.jit(do_not_specialize=["rows_total", "first", "row_blocks", "splits"])
def map_backward(grad_loss, xs, signs, weights, grad_xs, grad_targets, gradients, counted, rows_total, first, row_blocks, splits, coefficient,
                 COUNTED: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, LENGTH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """Programs first ... of row_blocks * COUNT * DB + splits * COUNT * DB * DB, DB = cdiv(D, BLOCK_D): a tile of g_x and g_target
    each, then a tile of g_Phi over one split of the rows each.

    grad_loss: 0-dimensional. gradients: float32 [splits, COUNT, LENGTH], the partial g_Phi [D, D] and g_phi [D] in a row.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    factor = coefficient * tl.load(grad_loss).to(tl.float32)
    if COUNTED:
        factor = factor * rows_total / tl.load(counted)
    program = tl.program_id(0) + first
    tiles = row_blocks * (COUNT * D_BLOCKS)
    if program < tiles:
        local = program % (COUNT * D_BLOCKS) // D_BLOCKS
        backward_inputs(select(local, signs, COUNT), select(local, weights, COUNT), select(local, grad_xs, COUNT),
                        select(local, grad_targets, COUNT), factor, program // (COUNT * D_BLOCKS) * BLOCK_N, rows_total,
                        program % D_BLOCKS * BLOCK_D, D, OPERAND, PRECISION, BLOCK_N, BLOCK_D, BLOCK_K)
    else:
        program -= tiles
        PER_MODALITY: tl.constexpr = D_BLOCKS * D_BLOCKS
        split = (program // (COUNT * PER_MODALITY)).to(tl.int64)
        local = program % (COUNT * PER_MODALITY) // PER_MODALITY
        place = program % PER_MODALITY
        per_split = (row_blocks + splits - 1) // splits * BLOCK_N
        backward_weight(select(local, xs, COUNT), select(local, signs, COUNT), gradients + (split * COUNT + local) * LENGTH,
                        factor, split * per_split, tl.minimum((split + 1) * per_split, rows_total),
                        place // D_BLOCKS * BLOCK_D, place % D_BLOCKS * BLOCK_D, D, OPERAND, PRECISION, BLOCK_N, BLOCK_D)


@triton.jit
def backward_inputs(sign, weight, grad_x, grad_target, factor, row, rows_total, d0, D: tl.constexpr, OPERAND: tl.constexpr,
                    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of g_x = c S Phi and g_target = -c S."""
    rows = row.to(tl.int64) + tl.arange(0, BLOCK_N)
    inside = rows < rows_total
    d = d0 + tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    own = tl.load(sign + at, mask=mask, other=0).to(tl.float32)
    tl.store(grad_target + at, (-factor * own).to(grad_target.dtype.element_ty), mask=mask)

    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        s = tl.load(sign + rows[:, None] * D + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0)
        block = tl.load(weight + k[:, None] * D + d[None, :], mask=(k < D)[:, None] & (d < D)[None, :], other=0.0)
        sums = multiply(s.to(OPERAND), rounded(block, grad_x.dtype.element_ty).to(OPERAND), sums, PRECISION)
    tl.store(grad_x + at, (factor * sums).to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def backward_weight(x, sign, gradients, factor, first, last, o0, d0, D: tl.constexpr, OPERAND: tl.constexpr,
                    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of g_Phi[o, d] = c sum_n S[n, o] x[n, d], and g_phi[o], over the rows first ... last - 1."""
    o = o0 + tl.arange(0, BLOCK_D)
    d = d0 + tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    for row in range(first, last, BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = rows < last
        s = tl.load(sign + rows[:, None] * D + o[None, :], mask=inside[:, None] & (o < D)[None, :], other=0)
        x_tile = tl.load(x + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        sums = multiply(tl.trans(s.to(OPERAND)), x_tile.to(OPERAND), sums, PRECISION)
        bias += tl.sum(s.to(tl.float32), axis=0)
    tl.store(gradients + o[:, None] * D + d[None, :], factor * sums, mask=(o < D)[:, None] & (d < D)[None, :])
    if d0 == 0:
        tl.store(gradients + D * D + o, factor * bias, mask=o < D)


# ---- many rows: what is left beside products of the library


@triton.jit(do_not_specialize=["rows_total", "place"])
def map_in_parts(x, parts, target, bias, sign, losses, counted, rows_total, place, coefficient, COUNTED: tl.constexpr, D: tl.constexpr,
                 COLUMNS: tl.constexpr, OPERAND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """`map_forward` of one modality in float32. Grid as of `column_tile`; losses from place on.

    parts: those of Phi, [COLUMNS, PARTS * COLUMNS], least first. x falls apart here, x = x_0 + x_1 + x_2; products of parts that are below
    2^-24 of x_0 Phi_0 are left out, those of x_0 Phi_0 have a sum of their own.
    """
    rows, d0 = column_tile(tl.zeros((), tl.int32), rows_total, D, BLOCK_N, BLOCK_D)
    inside = rows < rows_total
    d = d0 + tl.arange(0, BLOCK_D)
    small = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    mapped = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        rest = tl.load(x + rows[:, None] * D + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0.0)
        x_0 = rounded(rest, tl.bfloat16)
        rest -= x_0.to(tl.float32)
        x_1 = rounded(rest, tl.bfloat16)
        rest -= x_1.to(tl.float32)
        x_0, x_1, x_2 = x_0.to(OPERAND), x_1.to(OPERAND), rounded(rest, tl.bfloat16).to(OPERAND)
        at = parts + d[None, :] * (3 * COLUMNS) + k[:, None]
        mask = (k < COLUMNS)[:, None] & (d < COLUMNS)[None, :]
        phi_2 = tl.load(at, mask=mask, other=0.0).to(OPERAND)
        phi_1 = tl.load(at + COLUMNS, mask=mask, other=0.0).to(OPERAND)
        phi_0 = tl.load(at + 2 * COLUMNS, mask=mask, other=0.0).to(OPERAND)
        small = tl.dot(x_2, phi_0, small)
        small = tl.dot(x_1, phi_1, small)
        small = tl.dot(x_0, phi_2, small)
        small = tl.dot(x_1, phi_0, small)
        small = tl.dot(x_0, phi_1, small)
        mapped = tl.dot(x_0, phi_0, mapped)
    keep_distance(mapped + small, target, bias, sign, counted, rows, inside, d, losses + place + tl.program_id(0), rows_total, coefficient,
                  COUNTED, D)


@triton.jit(do_not_specialize=["rows_total", "first", "last", "place"])
def distance(mapped, target, bias, sign, losses, counted, rows_total, first, last, place, coefficient, COUNTED: tl.constexpr,
             D: tl.constexpr, BLOCK: tl.constexpr):
    """Distance of mapped (+ bias) to the target over the rows first ... last - 1, its sign. Grid (cdiv((last - first) D, BLOCK),).

    mapped: float32 [last - first, D]. losses: float32, one per program, from place on. COUNTED: as in `map_forward`.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)     # a chunk's elements fit into 32 bits
    inside = i < (last - first) * D
    kind = target.dtype.element_ty
    at = first.to(tl.int64) * D + i
    difference = tl.load(mapped + i, mask=inside, other=0.0) + rounded(tl.load(bias + i % D), kind).to(tl.float32)
    difference -= tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
    if COUNTED:
        difference = tl.where(at < tl.load(counted) * D, difference, 0.0)
        coefficient = coefficient * rows_total / tl.load(counted)
    tl.store(sign + at, (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8), mask=inside)
    tl.store(losses + place + tl.program_id(0), coefficient * tl.sum(tl.where(inside, tl.abs(difference), 0.0)))


@triton.jit(do_not_specialize=["first", "last", "padded"])
def expand_signs(factor, sign, grad_target, signs, sums, first, last, padded, D: tl.constexpr, COLUMNS: tl.constexpr, COPIES: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """S of the rows first ... last - 1 in the type of signs, g_target = -c S, if it is wanted, sums of S over blocks of rows.

    factor: c, float32, 0-dimensional. signs: [padded, COPIES * COLUMNS], COPIES times S with zeros behind it; zeros from last - first on.
    sums: float32 [cdiv(N, BLOCK_N), D]; first % BLOCK_N == 0. Grid: `column_tile` of first ... first + padded and COLUMNS.
    """
    rows, d0 = column_tile(first, first + padded, COLUMNS, BLOCK_N, BLOCK_D)
    d = d0 + tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = (rows < last)[:, None] & (d < D)[None, :]
    s = tl.load(sign + at, mask=mask, other=0).to(tl.float32)
    if grad_target is not None:
        tl.store(grad_target + at, (-tl.load(factor) * s).to(grad_target.dtype.element_ty), mask=mask)
    local = rows - first
    for copy in tl.static_range(COPIES):
        tl.store(signs + local[:, None] * (COPIES * COLUMNS) + (copy * COLUMNS + d)[None, :], s.to(signs.dtype.element_ty),
                 mask=(local < padded)[:, None] & (d < COLUMNS)[None, :])
    row = tl.min(rows, axis=0)
    if row < last:
        tl.store(sums + row // BLOCK_N * D + d, tl.sum(s, axis=0), mask=d < D)


@triton.jit(do_not_specialize=["first", "last", "padded"])
def split_rows(source, factor, parts, first, last, padded, ROW_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, D: tl.constexpr,
               COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """source (times factor, if there is one), float32, rows first ... last - 1 and D columns, as a sum of PARTS bfloat16, zeros around it.

    parts: [padded, PARTS * COLUMNS], part after part, the least first. Grid as `expand_signs`.
    """
    rows, d0 = column_tile(first, first + padded, COLUMNS, BLOCK_N, BLOCK_D)
    d = d0 + tl.arange(0, BLOCK_D)
    rest = tl.load(source + rows[:, None] * ROW_STRIDE + d[None, :] * COLUMN_STRIDE, mask=(rows < last)[:, None] & (d < D)[None, :], other=0.0)
    if factor is not None:
        rest *= tl.load(factor)
    local = rows - first
    for part in tl.static_range(PARTS):
        value = rounded(rest, tl.bfloat16)
        tl.store(parts + local[:, None] * (PARTS * COLUMNS) + ((PARTS - 1 - part) * COLUMNS + d)[None, :], value,
                 mask=(local < padded)[:, None] & (d < COLUMNS)[None, :])
        rest -= value.to(tl.float32)


# -------------------------------------------------------------------------------------------------------- forward launcher


def forward(x: Sequence[Tensor], target: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor],
            coefficient: Sequence[float], counted: Tensor | None = None) -> list[Tensor]:
    """x, target: M [N, D_j]; weight [D_j, D_j], bias [D_j]; x and target of one dtype (float32, bfloat16, float16),
    weight and bias both of that or of float32; M coefficients, of means over N rows. counted: int64, 0-dimensional, on the device: only the
    first so many rows count, and the means are over them.

    Returns the loss, float32, 0-dimensional, and M signs int8 [N, D_j].
    """
    x, target, weight, bias = common.contiguous(x, target, weight, bias)
    rows = x[0].shape[0]
    sign = [torch.empty_like(t, dtype=torch.int8) for t in x]
    if rows == 0:
        return [x[0].new_zeros((), dtype=torch.float32), *sign]
    if common.through_library(x[0].dtype, rows):
        return [forward_through_library(x, target, weight, bias, coefficient, counted, sign), *sign]
    meta = constants(x[0].dtype)
    launches = []
    programs = 0
    for group in common.groups((t.shape[1], c) for t, c in zip(x, coefficient)):
        grid = (common.cdiv(rows, meta["BLOCK_N"]), len(group) * common.cdiv(x[group[0]].shape[1], meta["BLOCK_D"]))
        launches.append((group, grid, programs))
        programs += grid[0] * grid[1]
    losses = x[0].new_empty((programs,), dtype=torch.float32)
    with common.device_of(x[0]):
        for group, grid, first in launches:
            mine = partial(common.pick, group)
            map_forward[grid](
                mine(x), mine(target), mine(weight), mine(bias),
                mine(sign), losses[first:], counted, rows, coefficient[group[0]], COUNTED=counted is not None,
                D=x[group[0]].shape[1], COUNT=len(group), **meta)
    return [losses.sum(), *sign]


def forward_through_library(x: list[Tensor], target: list[Tensor], weight: list[Tensor], bias: list[Tensor],
                            coefficient: Sequence[float], counted: Tensor | None, sign: list[Tensor]) -> Tensor:
    """The loss; fills sign."""
    if common.precision(x[0].dtype) == "ieee":
        return forward_in_parts(x, target, weight, bias, coefficient, counted, sign)
    launches, programs = [], 0
    for j, x_j in enumerate(x):
        width = x_j.shape[1]
        for first, last in common.chunks(x_j.shape[0], 4 * width):
            launches.append((j, width, first, last, programs))
            programs += common.cdiv((last - first) * width, FLAT)
    losses = x[0].new_empty((programs,), dtype=torch.float32)
    with common.device_of(x[0]):
        for j, width, first, last, place in launches:
            if first == 0:
                mapped = x[j].new_empty((last, width), dtype=torch.float32)
                right = weight[j].to(x[j].dtype).t()
            n = last - first
            common.product(x[j][first:last], right, mapped[:n])
            distance[(common.cdiv(n * width, FLAT),)](
                mapped, target[j], bias[j], sign[j], losses, counted, x[j].shape[0], first, last, place, coefficient[j],
                COUNTED=counted is not None, D=width, BLOCK=FLAT, num_warps=4, enable_fp_fusion=True)
    return losses.sum()


def forward_in_parts(x: list[Tensor], target: list[Tensor], weight: list[Tensor], bias: list[Tensor], coefficient: Sequence[float],
                     counted: Tensor | None, sign: list[Tensor]) -> Tensor:
    """The same in float32 on tensor cores."""
    rows = x[0].shape[0]
    programs = [common.cdiv(rows, MAP_IN_PARTS["BLOCK_N"]) * common.cdiv(t.shape[1], MAP_IN_PARTS["BLOCK_D"]) for t in x]
    losses = x[0].new_empty((sum(programs),))
    with common.device_of(x[0]):
        for j, c in enumerate(coefficient):
            width = x[j].shape[1]
            columns = common.padded(width)
            parts = weight_in_parts(weight[j], None, columns, width, 1)
            map_in_parts[(programs[j],)](x[j], parts, target[j], bias[j], sign[j], losses, counted, rows, sum(programs[:j]), c,
                                         COUNTED=counted is not None, D=width, COLUMNS=columns,
                                         OPERAND=common.storage_operand(torch.bfloat16), **MAP_IN_PARTS)
    return losses.sum()


def weight_in_parts(weight: Tensor, factor: Tensor | None, rows: int, row_stride: int, column_stride: int) -> Tensor:
    """Phi (times factor), or its transpose, as the strides say, in parts: bfloat16 [rows, PARTS * columns], zeros beyond it."""
    width = weight.shape[0]
    columns = common.padded(width)
    parts = weight.new_empty((rows, PARTS * columns), dtype=torch.bfloat16)
    split_rows[(common.cdiv(rows, BLOCK_ROWS) * common.cdiv(columns, BLOCK_COLUMNS),)](
        weight, factor, parts, 0, width, rows, ROW_STRIDE=row_stride, COLUMN_STRIDE=column_stride, D=width, COLUMNS=columns, PARTS=PARTS, **TILE)
    return parts


# ------------------------------------------------------------------------------------------------------- backward launcher


def backward(grad_loss: Tensor, x: Sequence[Tensor], sign: Sequence[Tensor], weight: Sequence[Tensor],
             coefficient: Sequence[float], counted: Tensor | None = None, beside: Branch = here) -> list[Tensor]:
    """grad_loss: 0-dimensional, any floating dtype; sign: from `forward`; counted: what that was given; beside: from `ops.linear.branch`,
    for the gradients of weight and bias.

    Returns the gradients of x and target in the dtype of x, of weight and bias in that of weight, M each.
    """
    return _backward(grad_loss, x, sign, weight, coefficient, counted, beside)[0]


def backward_for_gate(grad_loss: Tensor, x: Sequence[Tensor], sign: Sequence[Tensor], weight: Sequence[Tensor],
                      coefficient: Sequence[float], counted: Tensor | None = None, beside: Branch = here) -> tuple[list[Tensor], list[Tensor] | None]:
    """The same for `tensor_ring.backward` of this target, and None; or, from `common.LIBRARY_ROWS` rows on, the gradients of x as rows of a length
    that suits the library, instead of those of the target the signs, and M factors c, float32, 0-dimensional: they are -c S, and in
    float32 an eighth of the bytes that writing and reading them takes."""
    return _backward(grad_loss, x, sign, weight, coefficient, counted, beside, gate=True)


def _backward(grad_loss: Tensor, x: Sequence[Tensor], sign: Sequence[Tensor], weight: Sequence[Tensor], coefficient: Sequence[float],
              counted: Tensor | None, beside: Branch, gate: bool = False) -> tuple[list[Tensor], list[Tensor] | None]:
    x, sign, weight = common.contiguous(x, sign, weight)
    rows = x[0].shape[0]
    m = len(x)
    library = common.through_library(x[0].dtype, rows)
    gate = gate and library and rows > 0
    grad_x = [t.new_empty((rows, common.padded(t.shape[1]))) for t in x] if gate else [torch.empty_like(t) for t in x]
    grad_target = [None] * m if gate else [torch.empty_like(t) for t in x]
    grads = [None] * (2 * m)                # of weight and bias
    if rows == 0 or library:
        grads = [torch.empty_like(t) for t in weight] + [t.new_empty((t.shape[0],)) for t in weight]
    if rows == 0:
        for t in grads:
            t.zero_()
        return [*grad_x, *grad_target, *grads], None
    if library:
        grad_loss = grad_loss if counted is None else grad_loss.to(torch.float32) * rows / counted
        factors = backward_through_library(grad_loss, x, sign, weight, coefficient, grad_x, grad_target, grads[:m], grads[m:])
        if not gate:
            return [*grad_x, *grad_target, *grads], None
        return [*(g[:, :t.shape[1]] for g, t in zip(grad_x, x)), *sign, *grads], [factors[c] for c in coefficient]
    meta = constants(x[0].dtype)
    row_blocks = common.cdiv(rows, meta["BLOCK_N"])
    splits = min(common.MAX_SPLITS, common.cdiv(row_blocks, 4))
    with common.device_of(x[0]):
        for group in common.groups((t.shape[1], c) for t, c in zip(x, coefficient)):
            mine = partial(common.pick, group)
            width, count = x[group[0]].shape[1], len(group)
            blocks = common.cdiv(width, meta["BLOCK_D"])
            length = common.cdiv(width * width + width, 4) * 4
            tiles, others = row_blocks * count * blocks, splits * count * blocks * blocks
            like = [mine(weight), [t[:, 0] for t in mine(weight)]]

            gradients = x[0].new_empty((splits, count, length), dtype=torch.float32)

            def launch(first: int, programs: int) -> None:
                map_backward[(programs,)](
                    grad_loss, mine(x), mine(sign), mine(weight), mine(grad_x), mine(grad_target), gradients, counted, rows, first, row_blocks,
                    splits, coefficient[group[0]], COUNTED=counted is not None, D=width, COUNT=count, LENGTH=length, **meta)

            def of_parameters(first: int, programs: int) -> list[Tensor]:
                launch(first, programs)
                return common.reduced(gradients, like)

            if beside is here:
                found = of_parameters(0, tiles + others)
            else:
                found = beside(lambda *_: of_parameters(tiles, others), gradients, grad_loss, *mine(x), *mine(sign))
                launch(0, tiles)
            for place, j in enumerate(group):
                grads[j], grads[m + j] = found[place], found[count + place]
    return [*grad_x, *grad_target, *grads], None


def backward_through_library(grad_loss: Tensor, x: list[Tensor], sign: list[Tensor], weight: list[Tensor],
                             coefficient: Sequence[float], grad_x: list[Tensor], grad_target: Sequence[Tensor | None],
                             grad_weight: list[Tensor], grad_bias: list[Tensor]) -> dict[float, Tensor]:
    """Fills the gradients, of x with rows as long as there is room, and returns g_L c by c. c joins Phi before the product; in float16, where it
    would underflow, the float32 product instead."""
    rows, dtype = x[0].shape[0], x[0].dtype
    factors = {c: grad_loss.to(torch.float32) * c for c in coefficient}
    if common.precision(dtype) == "ieee":
        backward_in_parts(factors, x, sign, weight, coefficient, grad_x, grad_target, grad_weight, grad_bias)
        return factors
    late = dtype == torch.float16
    float32 = {"dtype": torch.float32}
    with common.device_of(x[0]):
        for j, c in enumerate(coefficient):
            width, factor, columns = x[j].shape[1], factors[c], grad_x[j].shape[1]
            ranges = common.chunks(rows, (4 if late else dtype.itemsize) * columns)
            most = ranges[0][1]
            signs = x[j].new_empty((most, columns))
            sums = x[j].new_empty((common.cdiv(rows, BLOCK_ROWS), width), **float32)
            grad_phi = x[j].new_empty((len(ranges), width, width), **float32)
            right = x[j].new_zeros((columns, columns))
            if late:
                right[:width, :width] = weight[j]
                unscaled = x[j].new_empty((most, columns), **float32)
            else:
                torch.mul(weight[j].to(torch.float32), factor, out=right[:width, :width])
            for place, (first, last) in enumerate(ranges):
                n = last - first
                expand_signs[(common.cdiv(n, BLOCK_ROWS) * common.cdiv(columns, BLOCK_COLUMNS),)](
                    factor, sign[j], grad_target[j], signs, sums, first, last, n, D=width, COLUMNS=columns, COPIES=1, **TILE)
                if late:
                    common.product(signs[:n], right, unscaled[:n])
                    torch.mul(unscaled[:n], factor, out=grad_x[j][first:last])
                else:
                    common.product(signs[:n], right, grad_x[j][first:last])
                common.product(signs[:n, :width].t(), x[j][first:last], grad_phi[place])
            torch.mul(common.total(grad_phi), factor, out=grad_weight[j])
            torch.mul(sums.sum(0), factor, out=grad_bias[j])
    return factors


def backward_in_parts(factors: dict[float, Tensor], x: list[Tensor], sign: list[Tensor], weight: list[Tensor], coefficient: Sequence[float],
                      grad_x: list[Tensor], grad_target: Sequence[Tensor | None], grad_weight: list[Tensor], grad_bias: list[Tensor]) -> None:
    """The same in float32 on tensor cores. factors: g_L c by c."""
    rows = x[0].shape[0]
    with common.device_of(x[0]):
        for j, c in enumerate(coefficient):
            width, factor = x[j].shape[1], factors[c]
            columns = common.padded(width)
            wide = PARTS * columns
            ranges = common.chunks(rows, 2 * wide)
            most = common.cdiv(ranges[0][1], 8 * common.ROW_SPLITS) * 8 * common.ROW_SPLITS
            signs, parts = (x[j].new_empty((most, wide), dtype=torch.bfloat16) for _ in range(2))
            sums = x[j].new_empty((common.cdiv(rows, BLOCK_ROWS), width))
            # Whole rows and columns of 8 throughout: with fewer the library takes kernels of several times the time.
            grad_phi = x[j].new_empty((len(ranges), common.ROW_SPLITS, columns, wide))
            right = weight_in_parts(weight[j], factor, grad_x[j].shape[1], 1, width)        # (c Phi)^T
            for place, (first, last) in enumerate(ranges):
                n = common.cdiv(last - first, 8 * common.ROW_SPLITS) * 8 * common.ROW_SPLITS
                grid = (common.cdiv(n, BLOCK_ROWS) * common.cdiv(columns, BLOCK_COLUMNS),)
                expand_signs[grid](factor, sign[j], grad_target[j], signs, sums, first, last, n, D=width, COLUMNS=columns, COPIES=PARTS, **TILE)
                split_rows[grid](x[j], None, parts, first, last, n, ROW_STRIDE=width, COLUMN_STRIDE=1, D=width, COLUMNS=columns, PARTS=PARTS, **TILE)
                common.product(signs[:last - first], right.t(), grad_x[j][first:last])
                left = signs[:n].view(common.ROW_SPLITS, n // common.ROW_SPLITS, wide)[:, :, :columns]
                common.product(left.transpose(1, 2), parts[:n].view(common.ROW_SPLITS, n // common.ROW_SPLITS, wide), grad_phi[place])
            of_parts = grad_phi.view(-1, columns, PARTS, columns)[:, :width, :, :width]
            torch.mul(of_parts.sum((0, 2)), factor, out=grad_weight[j])
            torch.mul(sums.sum(0), factor, out=grad_bias[j])


def constants(dtype: torch.dtype) -> dict:
    """Compile-time sizes and modes that the kernels share; the wider an operand, the smaller the tiles, or they spill."""
    precision = common.precision(dtype)
    return {"OPERAND": common.storage_operand(dtype), "PRECISION": precision, "BLOCK_N": 64 if dtype.itemsize == 2 else 32,
            "BLOCK_D": 32 if precision == "ieee" or dtype == torch.float16 else 64, "BLOCK_K": 32, "num_warps": 4, "enable_fp_fusion": True}


def why_not(device: str, dtype: torch.dtype, widths: Sequence[int], rank: int = 1) -> str | None:
    """Why these kernels cannot serve M tensors [N, widths[j]] on a device type, or None. Any widths will do; rank plays no part."""
    return common.why_not(device, dtype)
