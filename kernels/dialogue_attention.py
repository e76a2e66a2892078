"""Self-attention inside dialogues in Triton; mathematics and notation in `ada2i_fast.ops.dialogue_attention`.

One launch forward, one backward. Scores exist for a tile of BLOCK_N queries and BLOCK_N keys at a time, so memory is linear in N.

    attend              a tile of queries of one head: out, and log sum exp of its scores (softmax on the fly: Milakov, Gimelshein 2018)
    attend_gradients    a tile of queries: g_q;  in other programs of the launch a tile of keys: g_k, g_v

Heads no wider than BLOCK_D stay in registers while a program walks over the others' tiles. Wider ones are cut into blocks of columns: every
block's program sums the scores over all blocks, and writes its own.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import keep, locate, multiply, nearest

MOST_BATCHES = 256      # whose offsets stay on the device

# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def columns(at, rows, inside, d0, STRIDE: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns d0 ... d0 + BLOCK_D - 1 of a head of rows [BLOCK_N], 0 outside."""
    d = d0 + tl.arange(0, BLOCK_D)
    return tl.load(at + rows[:, None] * STRIDE + d[None, :], mask=inside[:, None] & (d < HEAD)[None, :], other=0.0)


@triton.jit
def inner(a, rows_a, inside_a, b, rows_b, inside_b, STRIDE_A: tl.constexpr, STRIDE_B: tl.constexpr, HEAD: tl.constexpr,
          OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inner products over a head of rows of a with rows of b: float32 [BLOCK_N, BLOCK_N]."""
    total = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for d0 in range(0, HEAD, BLOCK_D):
        left = columns(a, rows_a, inside_a, d0, STRIDE_A, HEAD, BLOCK_D).to(OPERAND)
        right = columns(b, rows_b, inside_b, d0, STRIDE_B, HEAD, BLOCK_D).to(OPERAND)
        total = multiply(left, tl.trans(right), total, PRECISION)
    return total


@triton.jit
def row_products(a, b, rows, inside, STRIDE: tl.constexpr, HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inner products over a head of each row of a with the same row of b: float32 [BLOCK_N]."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for d0 in range(0, HEAD, BLOCK_D):
        left = columns(a, rows, inside, d0, STRIDE, HEAD, BLOCK_D).to(tl.float32)
        total += tl.sum(left * columns(b, rows, inside, d0, STRIDE, HEAD, BLOCK_D).to(tl.float32), axis=1)
    return total


@triton.jit
def product(left, right, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """left right^T of two tiles from storage, [BLOCK_N, BLOCK_N]."""
    return multiply(left.to(OPERAND), tl.trans(right.to(OPERAND)), None, PRECISION)


@triton.jit
def keep_statistics(logsum, rows, inside, largest, total, HEADS: tl.constexpr):
    """What backward needs of each row to find its weights again; `weights_again` reads it."""
    tl.store(logsum + 2 * rows * HEADS, largest, mask=inside)
    tl.store(logsum + 2 * rows * HEADS + 1, tl.log(total), mask=inside)


@triton.jit
def weights_again(scores, logsum, rows, inside, others_inside, HEADS: tl.constexpr):
    """W of scores [queries, keys], 0 outside."""
    largest = tl.load(logsum + 2 * rows * HEADS, mask=inside, other=0.0)
    log_sum = tl.load(logsum + 2 * rows * HEADS + 1, mask=inside, other=0.0)
    return tl.where(inside[:, None] & others_inside[None, :], tl.exp(scores - largest[:, None] - log_sum[:, None]), 0.0)


@triton.jit(do_not_specialize=["dialogues", "stream"])
def attend(qkv, offsets, out, logsum, seed, dialogues, stream, scale, keep_scale, HEADS: tl.constexpr, HEAD: tl.constexpr,
           THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (tiles, HEADS * cdiv(HEAD, BLOCK_D)). logsum: float32 [N, HEADS, 2]."""
    BLOCKS: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    WIDTH: tl.constexpr = HEADS * HEAD
    tile = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) // BLOCKS
    own = tl.program_id(1) % BLOCKS * BLOCK_D
    _, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
    first = start + (tile - first_tile) * BLOCK_N
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_N)
    inside = rows < end
    q = qkv + h * HEAD
    k = q + WIDTH
    v = k + WIDTH

    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if BLOCKS == 1:
        queries = columns(q, rows, inside, 0, 3 * WIDTH, HEAD, BLOCK_D)
    for key in range(start, end, BLOCK_N):
        others = (key + tl.arange(0, BLOCK_N)).to(tl.int64)
        there = others < end
        if BLOCKS == 1:
            scores = product(queries, columns(k, others, there, 0, 3 * WIDTH, HEAD, BLOCK_D), OPERAND, PRECISION)
        else:
            scores = inner(q, rows, inside, k, others, there, 3 * WIDTH, 3 * WIDTH, HEAD, OPERAND, PRECISION, BLOCK_N, BLOCK_D)
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, axis=1))        # finite from the first keys on
        weights = tl.exp(scores - largest[:, None])
        shrink = tl.exp(before - largest)
        total = total * shrink + tl.sum(weights, axis=1)
        if DROPOUT:
            kept = keep(seed, stream + h, rows, key - start, THRESHOLD, BLOCK_N, BLOCK_N)
            weights = tl.where(kept, weights * keep_scale, 0.0)
        values = columns(v, others, there, own, 3 * WIDTH, HEAD, BLOCK_D)
        sums = multiply(weights, values, sums * shrink[:, None], PRECISION)
    if own == 0:
        keep_statistics(logsum + 2 * h, rows, inside, largest, total, HEADS)
    d = own + tl.arange(0, BLOCK_D)
    tl.store(out + h * HEAD + rows[:, None] * WIDTH + d[None, :], (sums / total[:, None]).to(out.dtype.element_ty),
             mask=inside[:, None] & (d < HEAD)[None, :])


@triton.jit(do_not_specialize=["dialogues", "tiles", "stream"])
def attend_gradients(grad_out, qkv, offsets, out, logsum, grad, seed, dialogues, tiles, stream, scale, keep_scale,
                     HEADS: tl.constexpr, HEAD: tl.constexpr, THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr,
                     OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (2 * tiles, HEADS * cdiv(HEAD, BLOCK_D)): first the tiles of queries, then those of keys."""
    BLOCKS: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    h = tl.program_id(1) // BLOCKS
    own = tl.program_id(1) % BLOCKS * BLOCK_D
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    _, first_tile, start, end = locate(tile, offsets, dialogues, BLOCK_N)
    first = start + (tile - first_tile) * BLOCK_N
    if first >= end:
        return
    at = h * HEAD
    if tl.program_id(0) < tiles:
        gradients_of_queries(grad_out + at, qkv + at, out + at, logsum + 2 * h, grad + at, seed, stream + h, first, start, end, own,
                             scale, keep_scale, HEADS, HEAD, THRESHOLD, DROPOUT, OPERAND, PRECISION, BLOCK_N, BLOCK_D)
    else:
        gradients_of_keys(grad_out + at, qkv + at, out + at, logsum + 2 * h, grad + at, seed, stream + h, first, start, end, own,
                          scale, keep_scale, HEADS, HEAD, THRESHOLD, DROPOUT, OPERAND, PRECISION, BLOCK_N, BLOCK_D)


@triton.jit
def weights_and_gradients(scores, g, logsum, delta, seed, stream, rows, inside, others, there, place, scale, keep_scale,
                          HEADS: tl.constexpr, THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """z W and W * (G - delta) of BLOCK_N queries (rows) and keys (others), 0 outside. scores: q k^T; g: g v^T; delta: g . out of each query;
    place: of the first key in its dialogue."""
    weights = weights_again(scores * scale, logsum, rows, inside, there, HEADS)
    dropped = weights
    if DROPOUT:
        kept = keep(seed, stream, rows, place, THRESHOLD, BLOCK_N, BLOCK_N)
        dropped = tl.where(kept, weights * keep_scale, 0.0)
        g = tl.where(kept, g * keep_scale, 0.0)
    return dropped, weights * (g - delta[:, None])


@triton.jit
def gradients_of_queries(grad_out, qkv, out, logsum, grad, seed, stream, first, start, end, own, scale, keep_scale,
                         HEADS: tl.constexpr, HEAD: tl.constexpr, THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr,
                         OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """g_q = g_S k of the queries from `first` on, columns `own` on; pointers are those of the head."""
    WIDTH: tl.constexpr = HEADS * HEAD
    WHOLE: tl.constexpr = (HEAD <= BLOCK_D) and (PRECISION != "ieee")     # or it spills
    rows = first + tl.arange(0, BLOCK_N)
    inside = rows < end
    if WHOLE:
        queries = columns(qkv, rows, inside, 0, 3 * WIDTH, HEAD, BLOCK_D)
        g_out = columns(grad_out, rows, inside, 0, WIDTH, HEAD, BLOCK_D)
        delta = tl.sum(g_out.to(tl.float32) * columns(out, rows, inside, 0, WIDTH, HEAD, BLOCK_D).to(tl.float32), axis=1)
    else:
        delta = row_products(grad_out, out, rows, inside, WIDTH, HEAD, BLOCK_N, BLOCK_D)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for key in range(start, end, BLOCK_N):
        others = (key + tl.arange(0, BLOCK_N)).to(tl.int64)
        there = others < end
        if WHOLE:
            keys = columns(qkv + WIDTH, others, there, 0, 3 * WIDTH, HEAD, BLOCK_D)
            scores = product(queries, keys, OPERAND, PRECISION)
            g = product(g_out, columns(qkv + 2 * WIDTH, others, there, 0, 3 * WIDTH, HEAD, BLOCK_D), OPERAND, PRECISION)
        else:
            scores = inner(qkv, rows, inside, qkv + WIDTH, others, there, 3 * WIDTH, 3 * WIDTH, HEAD, OPERAND, PRECISION, BLOCK_N, BLOCK_D)
            g = inner(grad_out, rows, inside, qkv + 2 * WIDTH, others, there, WIDTH, 3 * WIDTH, HEAD, OPERAND, PRECISION, BLOCK_N, BLOCK_D)
        _, g_s = weights_and_gradients(scores, g, logsum, delta, seed, stream, rows, inside, others, there, key - start, scale, keep_scale,
                                       HEADS, THRESHOLD, DROPOUT, BLOCK_N)
        if not WHOLE:
            keys = columns(qkv + WIDTH, others, there, own, 3 * WIDTH, HEAD, BLOCK_D)
        sums = multiply(g_s, keys, sums, PRECISION)
    d = own + tl.arange(0, BLOCK_D)
    tl.store(grad + rows[:, None] * (3 * WIDTH) + d[None, :], (sums * scale).to(grad.dtype.element_ty),
             mask=inside[:, None] & (d < HEAD)[None, :])


@triton.jit
def gradients_of_keys(grad_out, qkv, out, logsum, grad, seed, stream, first, start, end, own, scale, keep_scale,
                      HEADS: tl.constexpr, HEAD: tl.constexpr, THRESHOLD: tl.constexpr, DROPOUT: tl.constexpr,
                      OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """g_k = g_S^T q and g_v = (z W)^T g of the keys from `first` on, columns `own` on."""
    WIDTH: tl.constexpr = HEADS * HEAD
    WHOLE: tl.constexpr = (HEAD <= BLOCK_D) and (PRECISION != "ieee")     # or it spills
    others = first + tl.arange(0, BLOCK_N)
    there = others < end
    if WHOLE:
        keys = columns(qkv + WIDTH, others, there, 0, 3 * WIDTH, HEAD, BLOCK_D)
        values = columns(qkv + 2 * WIDTH, others, there, 0, 3 * WIDTH, HEAD, BLOCK_D)
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for query in range(start, end, BLOCK_N):
        rows = (query + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = rows < end
        if WHOLE:
            queries = columns(qkv, rows, inside, 0, 3 * WIDTH, HEAD, BLOCK_D)
            g_out = columns(grad_out, rows, inside, 0, WIDTH, HEAD, BLOCK_D)
            delta = tl.sum(g_out.to(tl.float32) * columns(out, rows, inside, 0, WIDTH, HEAD, BLOCK_D).to(tl.float32), axis=1)
            scores = product(queries, keys, OPERAND, PRECISION)
            g = product(g_out, values, OPERAND, PRECISION)
        else:
            delta = row_products(grad_out, out, rows, inside, WIDTH, HEAD, BLOCK_N, BLOCK_D)
            scores = inner(qkv, rows, inside, qkv + WIDTH, others, there, 3 * WIDTH, 3 * WIDTH, HEAD, OPERAND, PRECISION, BLOCK_N, BLOCK_D)
            g = inner(grad_out, rows, inside, qkv + 2 * WIDTH, others, there, WIDTH, 3 * WIDTH, HEAD, OPERAND, PRECISION, BLOCK_N, BLOCK_D)
        dropped, g_s = weights_and_gradients(scores, g, logsum, delta, seed, stream, rows, inside, others, there, first - start, scale,
                                             keep_scale, HEADS, THRESHOLD, DROPOUT, BLOCK_N)
        if not WHOLE:
            g_out = columns(grad_out, rows, inside, own, WIDTH, HEAD, BLOCK_D)
        sum_v = tl.dot(tl.trans(nearest(dropped, PRECISION)), nearest(g_out, PRECISION), sum_v, input_precision=PRECISION)
        if not WHOLE:
            queries = columns(qkv, rows, inside, own, 3 * WIDTH, HEAD, BLOCK_D)
        sum_k = tl.dot(tl.trans(nearest(g_s, PRECISION)), nearest(queries, PRECISION), sum_k, input_precision=PRECISION)
    d = own + tl.arange(0, BLOCK_D)
    to = grad + WIDTH + others[:, None] * (3 * WIDTH) + d[None, :]
    mask = there[:, None] & (d < HEAD)[None, :]
    tl.store(to, (sum_k * scale).to(grad.dtype.element_ty), mask=mask)
    tl.store(to + WIDTH, sum_v.to(grad.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------ offsets without waiting


class Batch(NamedTuple):
    offsets: Tensor
    stream: torch.cuda.Stream | None    # that copies them
    copied: torch.cuda.Event | None


_batches: dict[tuple, Batch] = {}       # the last used last
_captured: dict[tuple, Tensor] = {}     # what CUDA graphs read, for good


def dialogue_offsets(lengths: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """int64 [B + 1] on the device, without waiting for it: copied once for batches of the same lengths.

    A CUDA graph would copy again from memory that is gone, so during capture only lengths that a step before it had are served.
    Offsets that are on the device already are taken as they are.
    """
    if isinstance(lengths, Tensor):
        return lengths
    key = (tuple(lengths), device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key in _captured:
        return _captured[key]
    batch = _batches.pop(key, None)
    if batch is None:
        if capturing:
            raise RuntimeError("lengths: a CUDA graph is being captured, and no step before it had these; run one first (warm-up)")
        batch = copied(lengths, device)
    _batches[key] = batch
    while len(_batches) > MOST_BATCHES:
        del _batches[next(iter(_batches))]
    if capturing:
        _captured[key] = batch.offsets
    elif batch.stream is not None and batch.stream != (stream := torch.cuda.current_stream(device)):
        stream.wait_event(batch.copied)
        batch.offsets.record_stream(stream)
    return batch.offsets


def count(lengths: Sequence[int] | Tensor) -> int:
    """Dialogues, of lengths [B] or offsets [B + 1]."""
    return lengths.numel() - 1 if isinstance(lengths, Tensor) else len(lengths)


def copied(lengths: Sequence[int], device: torch.device) -> Batch:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    if device.type != "cuda":
        return Batch(torch.tensor(starts, dtype=torch.int64, device=device), None, None)
    with torch.cuda.device(device):
        offsets = torch.tensor(starts, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
        return Batch(offsets, torch.cuda.current_stream(), torch.cuda.current_stream().record_event())


# -------------------------------------------------------------------------------------------------------- forward launcher


def forward(qkv: Tensor, lengths: Sequence[int] | Tensor, heads: int, p: float, seed: Tensor | None, stream: int) -> list[Tensor]:
    """qkv: [N, 3 d], float32, bfloat16 or float16; lengths: B, summing to N, or offsets int64 [B + 1] on the device;
    seed: int64 [1], needed where p > 0.

    Returns out [N, d], as qkv, and of the scores of a row and head the maximum and log sum exp above it, float32 [N, heads, 2].
    """
    (qkv,), = common.contiguous((qkv,))
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    out, logsum = qkv.new_empty((rows, width)), qkv.new_empty((rows, heads, 2), dtype=torch.float32)
    if rows:
        meta = constants(qkv.dtype, width, heads, rows, count(lengths))
        offsets = dialogue_offsets(lengths, qkv.device)
        with common.device_of(qkv):
            attend[grid(meta, rows, count(lengths))](
                qkv, offsets, out, logsum, seed, count(lengths), stream, meta["HEAD"] ** -0.5, 1.0 / (1.0 - p),
                **common.dropout_arguments(p), **meta)
    return [out, logsum]


# ------------------------------------------------------------------------------------------------------- backward launcher


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, logsum: Tensor, lengths: Sequence[int] | Tensor, heads: int, p: float,
             seed: Tensor | None, stream: int) -> Tensor:
    """grad_out: [N, d]; out, logsum: from `forward`. Returns the gradient of qkv, in its dtype."""
    (grad_out, qkv, out), = common.contiguous((grad_out, qkv, out))
    rows, width = out.shape
    grad = torch.empty_like(qkv)
    if rows:
        meta = constants(qkv.dtype, width, heads, rows, count(lengths))
        if meta["PRECISION"] == "ieee":     # or it spills
            meta.update(BLOCK_N=16, num_warps=8 if meta["HEAD"] <= meta["BLOCK_D"] else 4, num_stages=1)
        elif qkv.dtype == torch.float32 and meta["BLOCK_D"] > 64:
            meta.update(BLOCK_N=16, num_warps=8)
        offsets = dialogue_offsets(lengths, qkv.device)
        tiles, programs = grid(meta, rows, count(lengths))
        with common.device_of(qkv):
            attend_gradients[(2 * tiles, programs)](
                grad_out, qkv, offsets, out, logsum, grad, seed, count(lengths), tiles, stream, meta["HEAD"] ** -0.5, 1.0 / (1.0 - p),
                **common.dropout_arguments(p), **meta)
    return grad


def grid(meta: dict, rows: int, dialogues: int) -> tuple[int, int]:
    return rows // meta["BLOCK_N"] + dialogues, meta["HEADS"] * common.cdiv(meta["HEAD"], meta["BLOCK_D"])


def constants(dtype: torch.dtype, width: int, heads: int, rows: int, dialogues: int) -> dict:
    """Compile-time sizes and modes; larger blocks spill, float32 first, see `tensor_ring.constants`."""
    head = width // heads
    precision = common.precision(dtype)
    block = min(max(16, triton.next_power_of_2(head)), 64 if precision == "ieee" else 128)
    return {"HEADS": heads, "HEAD": head, "OPERAND": common.storage_operand(dtype), "PRECISION": precision,
            "BLOCK_N": 16 if head > 128 and block > 64 else common.rows_per_block(rows, dialogues), "BLOCK_D": block, "num_warps": 4, "num_stages": 1 if block > 64 else 2, "enable_fp_fusion": True}


def why_not(device: str, dtype: torch.dtype, widths: Sequence[int], rank: int = 1) -> str | None:
    """Why these kernels cannot serve tensors [N, widths[0]] on a device type, or None. Any heads will do; rank plays no part."""
    return common.why_not(device, dtype)
