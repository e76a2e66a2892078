"""attention_mapping on the CPU; see ada2i_fast/ops/attention_mapping.py and csrc/cpu/attention_mapping.inl."""

from __future__ import annotations

import ctypes
from typing import Sequence

import torch
from torch import Tensor

from ..backends import accumulator
from . import DTYPES, call, contiguous, int64s, pointers


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("dtype", "threads", "modalities", "rows")),
                *((name, ctypes.c_void_p) for name in ("widths", "coefficient", "loss", "tensors"))]


def _call(name: str, x: Sequence[Tensor], coefficient: Sequence[float], loss: Tensor, tensors: ctypes.Array) -> None:
    widths, coefficient = int64s([t.shape[1] for t in x]), (ctypes.c_double * len(x))(*coefficient)
    call(name, _Arguments(DTYPES[x[0].dtype], torch.get_num_threads(), len(x), x[0].shape[0], ctypes.addressof(widths),
                          ctypes.addressof(coefficient), loss.data_ptr(), ctypes.addressof(tensors)))


def forward(x: Sequence[Tensor], target: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor],
            coefficient: Sequence[float]) -> list[Tensor]:
    x, target, weight, bias = contiguous(x, target, weight, bias)
    loss = x[0].new_empty((), dtype=accumulator(x[0].dtype))
    sign = [torch.empty_like(t, dtype=torch.int8) for t in x]
    _call("ada2i_attention_mapping_forward", x, coefficient, loss, pointers(x, target, weight, bias, sign))
    return [loss, *sign]


def backward(grad_loss: Tensor, x: Sequence[Tensor], sign: Sequence[Tensor], weight: Sequence[Tensor],
             coefficient: Sequence[float]) -> list[Tensor]:
    x, sign, weight = contiguous(x, sign, weight)
    grads = [*(torch.empty_like(t) for t in x), *(torch.empty_like(t) for t in x), *(torch.empty_like(w) for w in weight),
             *(w.new_empty(w.shape[0]) for w in weight)]
    _call("ada2i_attention_mapping_backward", x, coefficient, grad_loss.contiguous(), pointers(x, sign, weight, grads))
    return grads
