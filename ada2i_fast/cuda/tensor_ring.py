"""tensor_ring on CUDA; see ada2i_fast/ops/tensor_ring.py and csrc/cuda/tensor_ring.cuh."""

from __future__ import annotations

import ctypes
import functools
from typing import Sequence

import torch
from torch import Tensor

from ..ops.dropout import threshold
from . import MAX_MODALITIES, Ints, Pointers, Sizes, call, dtype_code, fill, limits, prepare


class _Arguments(ctypes.Structure):
    """struct TensorRing of csrc/cuda/ada2i_cuda.h, field by field."""

    _fields_ = [
        ("dtype", ctypes.c_int32), ("count", ctypes.c_int32), ("rank", ctypes.c_int32), ("gated_target", ctypes.c_int32),
        ("rows", ctypes.c_int64), ("dialogues", ctypes.c_int64),
        ("scale", ctypes.c_float), ("beta", ctypes.c_float), ("keep_scale", ctypes.c_float), ("threshold", ctypes.c_uint32),
        ("offsets", ctypes.c_void_p), ("seed", ctypes.c_void_p), ("ring", Ints * MAX_MODALITIES), ("width", Sizes),
        ("x", Pointers), ("proj_weight", Pointers), ("proj_bias", Pointers), ("map_weight", Pointers),
        ("map_bias", Pointers), ("proj", Pointers), ("average", Pointers), ("attention", Pointers), ("out", Pointers),
        ("target", Pointers), ("grad_out", Pointers), ("grad_target", Pointers), ("grad_x", Pointers),
        ("grad_proj_weight", Pointers), ("grad_proj_bias", Pointers), ("grad_map_weight", Pointers),
        ("grad_map_bias", Pointers), ("scratch", ctypes.c_void_p),
        ("vector", Ints), ("map_vector", Ints), ("splits", ctypes.c_int32), ("segment", Pointers), ("cores", Pointers),
        ("grad_cores", Pointers), ("grad_average", Pointers), ("grad_attention", Pointers), ("grad_proj", Pointers),
        ("piece", Pointers),
    ]


def why_not(device: str, dtype: torch.dtype, widths: tuple[int, ...], rank: int) -> str | None:
    return limits(len(widths), rank)


@functools.lru_cache(maxsize=64)
def _settings(dtype: int, widths: tuple[int, ...], rank: int, ring: tuple[int, ...], scale: float, beta: float, dropout: float,
              gated_target: bool) -> bytes:
    """The arguments that batches share; ValueError for what the kernels cannot take."""
    count = len(widths)
    if reason := limits(count, rank):
        raise ValueError(reason)
    if len(ring) != count * (count - 1):
        raise ValueError(f"ring: expected {count * (count - 1)} modalities, got {len(ring)}")
    args = _Arguments(dtype=dtype, count=count, rank=rank, gated_target=gated_target, scale=scale, beta=beta, keep_scale=1.0)
    if dropout > 0.0:
        args.threshold, args.keep_scale = threshold(dropout), 1.0 / (1.0 - dropout)
    args.width[:count] = widths
    for j in range(count):
        args.ring[j][:count - 1] = ring[j * (count - 1):(j + 1) * (count - 1)]
    return bytes(args)


def arguments(x: Sequence[Tensor], widths: tuple[int, ...], offsets: Tensor, rank: int, ring: Sequence[int], scale: float, beta: float,
              dropout: float, seed: Tensor | None, gated_target: bool) -> tuple[_Arguments, list[Tensor]]:
    """All but parameters and results, and the tensors that must outlive the call: x, contiguous, and offsets."""
    like, rows = x[0], x[0].shape[0]
    args = _Arguments.from_buffer_copy(_settings(dtype_code(like.dtype), widths, rank, tuple(ring), scale, beta, dropout, gated_target))
    alive = prepare("x", x, like, [(rows, d) for d in widths])
    alive += prepare("offsets", [offsets], like, [(offsets.numel(),)], torch.int64)
    args.rows, args.dialogues, args.offsets = rows, offsets.numel() - 1, alive[-1].data_ptr()
    if dropout > 0.0:
        if seed is None or seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != like.device:
            got = "none" if seed is None else f"{seed.dtype} {list(seed.shape)} on {seed.device}"
            raise ValueError(f"seed: dropout needs int64 [1] on {like.device}, got {got}")
        args.seed = seed.data_ptr()
    fill(args, x=alive[:-1])
    return args, alive


def _arguments(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
               map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], *settings) -> tuple[_Arguments, list[Tensor]]:
    """What both directions share, and the tensors that must outlive the call."""
    rank, like, widths = proj_bias[0].shape[0] // 4, x[0], tuple([t.shape[1] for t in x])
    args, alive = arguments(x, widths, offsets, rank, *settings)
    inputs = {
        "proj_weight": prepare("proj_weight", proj_weight, like, [(4 * rank, d) for d in widths]),
        "proj_bias": prepare("proj_bias", proj_bias, like, [(4 * rank,)] * len(x)),
        "map_weight": prepare("map_weight", map_weight, like, [(d, rank * rank) for d in widths]),
        "map_bias": prepare("map_bias", map_bias, like, [(d,) for d in widths]),
    }
    fill(args, **inputs)
    return args, [*alive, *(t for tensors in inputs.values() for t in tensors)]


def forward(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
            map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float,
            dropout: float, seed: Tensor | None, gated_target: bool, with_target: bool = True) -> list[Tensor]:
    """Three launches. Returns M outputs; M targets if `with_target`; then what backward needs: M projections [N, 4R], M averages
    float32 [B, R, R], M attentions (the very targets, where the target is the attention)."""
    args, alive = _arguments(x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed,
                             gated_target)
    rows, dialogues, rank = args.rows, args.dialogues, args.rank
    out = [t.new_empty(t.shape) for t in x]
    attention = [t.new_empty(t.shape) for t in x]
    gated = [t.new_empty(t.shape) for t in x] if with_target and gated_target else []
    proj = [t.new_empty((rows, 4 * rank)) for t in x]
    average = [t.new_empty((dialogues, rank, rank), dtype=torch.float32) for t in x]
    fill(args, out=out, attention=attention, target=gated, proj=proj, average=average)
    call("tensor_ring_forward", args, x[0])
    del alive
    return out + (gated or attention if with_target else []) + proj + average + attention


def backward(grad_out: Sequence[Tensor], grad_target: Sequence[Tensor], x: Sequence[Tensor], offsets: Tensor,
             proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor], map_weight: Sequence[Tensor], map_bias: Sequence[Tensor],
             saved: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None,
             gated_target: bool) -> list[Tensor]:
    """Five launches, four for one modality. grad_target may be empty; saved: the last 3 M results of `forward`. Returns the
    gradients of x, proj_weight, proj_bias, map_weight, map_bias, M each."""
    args, alive = _arguments(x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed,
                             gated_target)
    m, like, rank, shapes = args.count, x[0], args.rank, [t.shape for t in x]
    if len(saved) != 3 * m:
        raise ValueError(f"saved: expected {3 * m} tensors, got {len(saved)}")
    inputs = {
        "grad_out": prepare("grad_out", grad_out, like, shapes),
        "grad_target": prepare("grad_target", grad_target, like, shapes) if grad_target else [],
        "proj": prepare("saved", saved[:m], like, [(args.rows, 4 * rank)] * m),
        "average": prepare("saved", saved[m:2 * m], like, [(args.dialogues, rank, rank)] * m, torch.float32),
        "attention": prepare("saved", saved[2 * m:], like, shapes),
    }
    grads = {f"grad_{name}": [t.new_empty(t.shape) for t in tensors] for name, tensors in (
        ("x", x), ("proj_weight", proj_weight), ("proj_bias", proj_bias), ("map_weight", map_weight), ("map_bias", map_bias))}
    fill(args, **inputs, **grads)
    call("tensor_ring_backward", args, like)
    del alive
    return [t for tensors in grads.values() for t in tensors]
