"""The gradients of a linear map's parameters on the CPU; see ada2i_fast/ops/linear.py and csrc/cpu/linear.inl."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import DTYPES, call, contiguous, pointers, up_to_float32

why_not = up_to_float32


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("dtype", "threads", "rows", "inputs", "outputs")), ("tensors", ctypes.c_void_p)]


def backward(grad_out: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    (grad_out, x), = contiguous((grad_out, x))
    (rows, inputs), outputs = x.shape, grad_out.shape[1]
    grads = [x.new_empty((outputs, inputs), dtype=torch.float32), *([x.new_empty(outputs, dtype=torch.float32)] if bias else [])]
    addresses = pointers((grad_out, x, *grads, *([] if bias else [None])))
    call("ada2i_linear_backward", _Arguments(DTYPES[x.dtype], torch.get_num_threads(), rows, inputs, outputs, ctypes.addressof(addresses)))
    return grads
