"""tensor_ring on the CPU; see ada2i_fast/ops/tensor_ring.py and csrc/cpu/tensor_ring.inl."""

from __future__ import annotations

import ctypes
from typing import Sequence

import torch
from torch import Tensor

from ..backends import accumulator
from . import DTYPES, call, contiguous, int64s, pointers


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in
                  ("dtype", "threads", "modalities", "rows", "dialogues", "rank", "gated_target", "parameters")),
                *((name, ctypes.c_double) for name in ("scale", "beta", "dropout")),
                *((name, ctypes.c_void_p) for name in ("widths", "ring", "offsets", "seed", "coefficient", "loss", "tensors"))]


def run(name: str, x: Sequence[Tensor], offsets: Tensor, rank: int, ring: Sequence[int], scale: float, beta: float, dropout: float,
        seed: Tensor | None, gated_target: bool, tensors: ctypes.Array, coefficient: Sequence[float] | None = None,
        loss: Tensor | None = None, parameters: torch.dtype | None = None) -> None:
    """One call of the library, with the feature loss where there are coefficients. Every tensor is contiguous. parameters: their dtype,
    if it is not that of x but float32."""
    widths, ring = int64s([t.shape[1] for t in x]), int64s(ring)
    weights = None if coefficient is None else (ctypes.c_double * len(x))(*coefficient)
    call(name, _Arguments(
        DTYPES[x[0].dtype], torch.get_num_threads(), len(x), x[0].shape[0], offsets.numel() - 1, rank, gated_target,
        DTYPES[parameters or x[0].dtype], scale, beta, dropout, ctypes.addressof(widths), ctypes.addressof(ring), offsets.data_ptr(),
        None if seed is None else seed.data_ptr(), None if weights is None else ctypes.addressof(weights), None if loss is None else loss.data_ptr(), ctypes.addressof(tensors)))


def _quarters(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses of the four parts of each tensor, which are stacked along its first dimension."""
    return [t.data_ptr() + i * (t.numel() // 4) * t.element_size() for t in tensors for i in range(4)]


def forward(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
            map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float,
            dropout: float, seed: Tensor | None, gated_target: bool, with_target: bool) -> list[Tensor]:
    x, proj_weight, proj_bias, map_weight, map_bias = contiguous(x, proj_weight, proj_bias, map_weight, map_bias)
    offsets = offsets.contiguous()
    rank, rows, dialogues, precise = proj_bias[0].numel() // 4, x[0].shape[0], offsets.numel() - 1, accumulator(x[0].dtype)
    out = [torch.empty_like(t) for t in x]
    common = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    given = (x, _quarters(proj_weight), _quarters(proj_bias), map_weight, map_bias, out)
    if not with_target:
        run("ada2i_tensor_ring_forward", *common, pointers(*given, [None] * (4 * len(x))))
        return out
    attention = [torch.empty_like(t) for t in x]
    gated = [torch.empty_like(t) for t in x] if gated_target else []
    proj = [t.new_empty((rows, 4 * rank), dtype=precise) for t in x]
    mean = [t.new_empty((dialogues, rank, rank), dtype=precise) for t in x]
    run("ada2i_tensor_ring_forward", *common, pointers(*given, gated or [None] * len(x), proj, mean, attention))
    return out + (gated or attention) + proj + mean + attention


def backward(grad_out: Sequence[Tensor], grad_target: Sequence[Tensor], x: Sequence[Tensor], offsets: Tensor,
             proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor], map_weight: Sequence[Tensor], map_bias: Sequence[Tensor],
             saved: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None,
             gated_target: bool) -> list[Tensor]:
    grad_out, grad_target, x, proj_weight, map_weight, saved = contiguous(grad_out, grad_target, x, proj_weight, map_weight, saved)
    offsets = offsets.contiguous()
    rank = proj_bias[0].numel() // 4
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format)
             for tensors in (x, proj_weight, proj_bias, map_weight, map_bias) for t in tensors]
    run("ada2i_tensor_ring_backward", x, offsets, rank, ring, scale, beta, dropout, seed, gated_target,
        pointers(x, _quarters(proj_weight), map_weight, saved, grad_out, grad_target or [None] * len(x), grads))
    return grads
