"""What the kernels of several ops share: run-time indexing of tuples, the walk over dialogues, dropout, split reductions.

Modalities of one width go into one launch: their tensors are passed as tuples, and a program picks its own by a run-time
index. So the number of launches depends on the number of distinct widths, not on the number of modalities.

Widths, rank and modes are compile-time constants, numbers of rows and dialogues are not: batches never recompile, except
that there are two sizes of row tiles (`rows_per_block`).

Row tiles follow dialogues without a table and without asking the device for lengths. Dialogue b may use the tile indices
from offsets[b] // BLOCK_N + b on: rows floor(offsets / BLOCK_N) advance at least once per full block, and the `+ b` leaves
room for the one partial block, so dialogues never share an index and N // BLOCK_N + B indices suffice for every batch.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import ContextManager, Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ada2i_fast.backends import tf32
from ada2i_fast.ops.dropout import threshold

MAX_RANK = 32
MAX_PARTS = 32      # partial sums per dialogue: bounds what a reader adds up, so long dialogues stay linear
MAX_SPLITS = 32     # partial weight gradients
ROW_SPLITS = 16     # parts of very many rows in a product that sums over them: its few tiles alone would leave most multiprocessors idle
# Rows from which on dense products go through the library (cuBLAS), by `precision`. Below, few launches win: one AFW layer takes
# 8 forward and backward instead of several dozens, at 5 us and more each from the host and 1 to 2 us in a CUDA graph, while the
# fused kernels spend per 1000 rows (H100, 3 modalities, D 300, R 11) 0.4 ms in "ieee" and 0.1 ms in "tf32" and 16 bits.
LIBRARY_ROWS = {"ieee": 4096, "tf32": 8192}
# Bytes of one modality's share of a scratch array between two launches: bounds memory at very many rows, which are then worked off
# in chunks. 100,000 rows of 300 float32 are one chunk: launches cost more than the second-level cache would save.
SCRATCH = 2 ** 27
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def select(index, items, COUNT: tl.constexpr):
    """items[index] at run time; items: a tuple of COUNT pointers or integers."""
    chosen = items[0]
    for m in tl.static_range(1, COUNT):
        chosen = tl.where(index == m, items[m], chosen)
    return chosen


@triton.jit
def rounded(value, KIND: tl.constexpr):
    """value in the type KIND, to nearest: also under the interpreter, which truncates on the way to bfloat16."""
    if _INTERPRETED and KIND == tl.bfloat16 and value.dtype == tl.float32:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(KIND)


@triton.jit
def nearest(value, PRECISION: tl.constexpr):
    """A factor of a product of float32; of a "tf32" product the nearest TF32 number, which one of 16 bits is already.

    Tensor cores truncate. That shrinks every factor, so sums do not average it out, and an output of AFW is a product of a dozen of them.
    The interpreter multiplies float32. A factor of several products, or of a transposed one, is rounded once and before: it takes fewer registers.
    """
    if PRECISION == "tf32" and value.dtype == tl.float32 and not _INTERPRETED:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return value.to(tl.float32)


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """a b, added to total unless that is None, in float32; PRECISION: where not both are of one 16-bit type."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, total)
    else:
        return tl.dot(nearest(a, PRECISION), nearest(b, PRECISION), total, input_precision=PRECISION)


@triton.jit
def lookup(index, TABLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COLUMN: tl.constexpr):
    """TABLE[index, COLUMN] at run time; TABLE: a flat tuple of ROWS * COLUMNS integers."""
    value = index * 0 + TABLE[COLUMN]
    for row in tl.static_range(1, ROWS):
        value = tl.where(index == row, TABLE[row * COLUMNS + COLUMN], value)
    return value


@triton.jit
def locate(tile, offsets, dialogues, BLOCK_N: tl.constexpr):
    """The dialogue that owns a tile index: (dialogue, its first tile index, its first row, the row after its last), int64.

    A 128-ary search: one round of loads for up to 128 dialogues, two up to 16,384.
    """
    LANES: tl.constexpr = 128
    lane = tl.arange(0, LANES)
    low = tl.full((), 0, tl.int32)
    count = tl.full((), 0, tl.int32) + dialogues
    while count > 1:
        step = (count + LANES - 1) // LANES
        candidate = low + lane * step
        inside = lane * step < count
        first_tile = tl.load(offsets + candidate, mask=inside, other=0) // BLOCK_N + candidate
        last = tl.sum((inside & (first_tile <= tile)).to(tl.int32), axis=0) - 1
        low += last * step
        count = tl.minimum(step, count - last * step)
    start = tl.load(offsets + low)
    end = tl.load(offsets + low + 1)
    return low.to(tl.int64), start // BLOCK_N + low, start, end


@triton.jit
def part_rows(length, BLOCK_N: tl.constexpr, MAX_PARTS: tl.constexpr):
    """Rows per part when a dialogue is cut into at most MAX_PARTS parts of whole blocks; at least one block."""
    blocks = (length + BLOCK_N - 1) // BLOCK_N
    return tl.maximum((blocks + MAX_PARTS - 1) // MAX_PARTS, 1) * BLOCK_N


@triton.jit
def keep(seed, stream, rows, d0, THRESHOLD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """`ada2i_fast.ops.dropout.keep_mask` for rows [BLOCK_N] (int64) and columns d0 ... d0 + BLOCK_D - 1; d0 % 4 == 0."""
    key = tl.load(seed)
    shape: tl.constexpr = (BLOCK_N, BLOCK_D // 4)
    block = (d0 // 4 + tl.arange(0, BLOCK_D // 4)).to(tl.uint32)
    c0 = tl.broadcast_to(block[None, :], shape)
    c1 = tl.broadcast_to((rows & 0xFFFFFFFF).to(tl.uint32)[:, None], shape)
    c2 = tl.broadcast_to((rows >> 32).to(tl.uint32)[:, None], shape)
    c3 = tl.zeros(shape, tl.uint32) + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3)
    # join appends an axis: [.., a, b] of join(join(w0, w2), join(w1, w3)) is word 2 a + b.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_N, BLOCK_D))
    return words >= tl.full((BLOCK_N, BLOCK_D), THRESHOLD, tl.uint32)


@triton.jit(do_not_specialize=["splits"])
def reduce_splits(partial, outputs, splits, LENGTH: tl.constexpr, BOUNDS: tl.constexpr, KINDS: tl.constexpr,
                  GROUP: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """Add up partial gradients in a fixed order, TOGETHER at a time. Grid (cdiv(LENGTH, BLOCK), GROUP).

    partial: float32 [splits, GROUP, LENGTH]; columns BOUNDS[k]:BOUNDS[k + 1] belong to outputs[k * GROUP + j].
    """
    j = tl.program_id(1)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < LENGTH
    total = tl.zeros((BLOCK,), tl.float32)
    split = tl.arange(0, TOGETHER)
    at = partial + j * LENGTH + split[:, None] * (GROUP * LENGTH) + column[None, :]
    for first in range(0, splits, TOGETHER):
        total += tl.sum(tl.load(at, mask=(first + split < splits)[:, None] & inside[None, :], other=0.0), axis=0)
        at += TOGETHER * GROUP * LENGTH
    for kind in tl.static_range(KINDS):
        output = outputs[kind * GROUP]
        for m in tl.static_range(1, GROUP):
            output = tl.where(j == m, outputs[kind * GROUP + m], output)
        mine = (column >= BOUNDS[kind]) & (column < BOUNDS[kind + 1])
        tl.store(output + (column - BOUNDS[kind]), total.to(output.dtype.element_ty), mask=mine)


@triton.jit
def column_tile(first, last, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a grid (cdiv(last - first, BLOCK_N) * cdiv(D, BLOCK_D),), columns fastest: rows [BLOCK_N] (int64), first column."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = first.to(tl.int64) + tl.program_id(0).to(tl.int64) // D_BLOCKS * BLOCK_N
    return row + tl.arange(0, BLOCK_N), tl.program_id(0) % D_BLOCKS * BLOCK_D


# -------------------------------------------------------------------------------------------------------------- launchers


def reduce(partial: Tensor, outputs: Sequence[Sequence[Tensor]], block: int = 512 if INTERPRETED else 32, together: int = 64) -> None:
    """partial: float32 [splits, G, >= sum of sizes]; outputs: kinds of G tensors each, in the order of the columns.

    Tiles [together, block] are small: as many programs as possible, each with few loads one after the other. The interpreter runs
    programs one after the other, some 20 ms each.
    """
    splits, group, length = partial.shape
    bounds = [0]
    for kind in outputs:
        bounds.append(bounds[-1] + kind[0].numel())
    reduce_splits[(cdiv(length, block), group)](
        partial, tuple(t for kind in outputs for t in kind), splits, LENGTH=length, BOUNDS=tuple(bounds), KINDS=len(outputs),
        GROUP=group, BLOCK=block, TOGETHER=together, num_warps=4, enable_fp_fusion=True)


def reduced(partial: Tensor, like: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """`reduce` into new tensors like these, kind after kind."""
    sums = [[torch.empty_like(t, memory_format=torch.contiguous_format) for t in kind] for kind in like]
    reduce(partial, sums)
    return [t for kind in sums for t in kind]


def cdiv(a: int, b: int) -> int:
    """`triton.cdiv`, which takes the host 3 us: it is a function of kernels too."""
    return -(-a // b)


def groups(keys: Iterable) -> tuple[tuple[int, ...], ...]:
    """Positions of equal keys, one group per launch, in order of first appearance."""
    return _groups(tuple(keys))


@lru_cache(maxsize=256)
def _groups(keys: tuple) -> tuple[tuple[int, ...], ...]:
    found: dict = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return tuple(tuple(positions) for positions in found.values())


def contiguous(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[t if t.is_contiguous() else t.contiguous() for t in tensors] for tensors in lists]


def device_of(t: Tensor) -> ContextManager:
    """`torch.cuda.device_of`, for nothing where that device is the current one."""
    if t.is_cuda and t.get_device() != torch.cuda.current_device():
        return torch.cuda.device_of(t)
    return nullcontext()


def pick(group: Sequence[int], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensors[j] for j in group)


def rows_per_block(rows: int, dialogues: int) -> int:
    """16 or 32 utterances per tile, as fits the mean dialogue."""
    return 32 if rows > 16 * dialogues else 16


def storage_operand(dtype: torch.dtype) -> tl.dtype:
    """Operand type of products whose factors are both read from storage, and so are exact in it.

    The interpreter keeps bfloat16 as bit patterns and multiplies those; there the factors are widened first.
    """
    return tl.float32 if INTERPRETED else _TRITON[dtype]


def precision(dtype: torch.dtype) -> str:
    """Tensor-core mode of float32 products.

    float32 storage: "ieee", or "tf32" where PyTorch's own float32 products may use it. 16-bit storage: "tf32", whose
    significand holds at least as many bits as that of storage.
    """
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if tf32() else "ieee"


def through_library(dtype: torch.dtype, rows: int) -> bool:
    """Whether dense products over so many rows are left to the library."""
    return rows >= LIBRARY_ROWS[precision(dtype)]


def chunks(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Ranges (first, last) of rows, equal and multiples of 64 but for the last, of at most SCRATCH bytes (or 64 rows)."""
    count = cdiv(rows * row_bytes, SCRATCH)
    size = cdiv(cdiv(rows, count), 64) * 64
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b through the library, or a batch of them; a and b of one dtype, out of that or float32, sums in float32.

    `out=` besides: it is what autocast leaves alone.
    """
    if not a.is_cuda:                           # the interpreter's: 16-bit products there may sum in 16 bits
        out.copy_(a.float() @ b.float())
        return
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype == out.dtype:
        multiply(a, b, out=out)
    else:
        multiply(a, b, out_dtype=out.dtype, out=out)


def padded(columns: int) -> int:
    """Row length that suits the library's 16-bit products."""
    return cdiv(columns, 8) * 8


def total(parts: Tensor) -> Tensor:
    """The sum over the first dimension."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b, all of one dtype, sums in float32."""
    if not a.is_cuda:
        out.copy_(out.float() + a.float() @ b.float())
    else:
        torch.addmm(out, a, b, out=out)


@lru_cache(maxsize=64)
def dropout_arguments(dropout: float) -> dict:
    return {"THRESHOLD": threshold(dropout), "DROPOUT": dropout > 0.0}


def why_not(device: str, dtype: torch.dtype, rank: int = 1) -> str | None:
    """Why Triton cannot serve tensors of this kind, or None. Asks the driver only about a device that tensors already are on."""
    if device != "cuda" and not (INTERPRETED and device == "cpu"):
        return f"device {device}: Triton kernels need CUDA, or TRITON_INTERPRET=1 set before Triton is imported"
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')}: float32, bfloat16 and float16 only"
    if not 1 <= rank <= MAX_RANK:
        return f"rank {rank}: 1 to {MAX_RANK} only"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "compute capability below 8.0"
    return None
