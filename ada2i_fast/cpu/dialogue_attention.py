"""dialogue_attention on the CPU; see ada2i_fast/ops/dialogue_attention.py and csrc/cpu/dialogue_attention.inl."""

from __future__ import annotations

import ctypes
import itertools
from typing import Sequence

import torch
from torch import Tensor

from . import DTYPES, call, int64s, pointers, up_to_float32

why_not = up_to_float32


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("dtype", "threads", "heads", "width", "dialogues", "stream")),
                *((name, ctypes.c_double) for name in ("scale", "dropout")),
                *((name, ctypes.c_void_p) for name in ("offsets", "seed", "tensors"))]


def starts(lengths: Sequence[int]) -> ctypes.Array:
    """Where each dialogue begins, and where the last one ends. `forward` and `backward` take it in place of lengths, made once for many."""
    return int64s([0, *itertools.accumulate(lengths)])


def _call(name: str, qkv: Tensor, lengths: Sequence[int] | ctypes.Array, heads: int, p: float, seed: Tensor | None, stream: int,
          *tensors: Tensor) -> None:
    width = qkv.shape[1] // 3
    offsets, addresses = lengths if isinstance(lengths, ctypes.Array) else starts(lengths), pointers(tensors)
    call(name, _Arguments(DTYPES[qkv.dtype], torch.get_num_threads(), heads, width, len(offsets) - 1, stream, (width // heads) ** -0.5, p,
                          ctypes.addressof(offsets), None if p == 0 else seed.data_ptr(), ctypes.addressof(addresses)),
         offsets, addresses, seed, tensors)


def forward(qkv: Tensor, lengths: Sequence[int] | ctypes.Array, heads: int, p: float, seed: Tensor | None, stream: int) -> list[Tensor]:
    qkv = qkv.contiguous()
    out, logsum = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), qkv.new_empty(qkv.shape[0], heads, 2, dtype=torch.float32)
    _call("ada2i_dialogue_attention_forward", qkv, lengths, heads, p, seed, stream, qkv, out, logsum)
    return [out, logsum]


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, logsum: Tensor, lengths: Sequence[int] | ctypes.Array, heads: int,
             p: float, seed: Tensor | None, stream: int) -> Tensor:
    grad_out, qkv, out = grad_out.contiguous(), qkv.contiguous(), out.contiguous()
    grad = torch.empty_like(qkv)
    _call("ada2i_dialogue_attention_backward", qkv, lengths, heads, p, seed, stream, qkv, out, logsum, grad_out, grad)
    return grad
