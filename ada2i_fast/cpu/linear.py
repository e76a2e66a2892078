"""A linear map and its gradients on the CPU, of rows of at most 32 bits by float32 parameters; see ada2i_fast/ops/linear.py and csrc/cpu/linear.inl."""

from __future__ import annotations

import ctypes
from typing import Sequence

import torch
from torch import Tensor

from . import DTYPES, call, contiguous, pointers, up_to_float32

why_not = up_to_float32


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("dtype", "threads", "rows", "inputs", "outputs", "relu", "stream")),
                ("dropout", ctypes.c_double), ("seed", ctypes.c_void_p), ("tensors", ctypes.c_void_p)]


def _call(name: str, x: Tensor, rows: int, inputs: int, outputs: int, tensors: Sequence[Tensor | None], relu: bool = False, p: float = 0.0,
          seed: Tensor | None = None, stream: int = 0) -> None:
    addresses = pointers(tensors)
    call(name, _Arguments(DTYPES[x.dtype], torch.get_num_threads(), rows, inputs, outputs, relu, stream, p, seed.data_ptr() if p else None,
                          ctypes.addressof(addresses)), addresses, seed, tensors)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, p: float = 0.0, seed: Tensor | None = None, stream: int = 0) -> Tensor:
    """relu: max(0, .) of it, and then the dropout of `dropout.relu_forward`, which the last three are as in."""
    x, weight, *bias = contiguous([x, weight] if bias is None else [x, weight, bias])[0]
    out = x.new_empty(x.shape[0], weight.shape[0])
    _call("ada2i_linear_forward", x, x.shape[0], *weight.shape[::-1], (x, weight, *(bias or [None]), out), relu, p, seed, stream)
    return out


def input_gradient(grad_out: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
    """into: contiguous, in the dtype of grad_out; the product is added to it."""
    (grad_out, weight), = contiguous((grad_out, weight))
    grad_x = grad_out.new_empty(grad_out.shape[0], weight.shape[1]) if into is None else into
    _call("ada2i_linear_input", grad_out, grad_out.shape[0], *weight.shape[::-1], (grad_out, weight, into, grad_x))
    return grad_x


def backward(grad_out: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    (grad_out, x), = contiguous((grad_out, x))
    (rows, inputs), outputs = x.shape, grad_out.shape[1]
    grads = [x.new_empty((outputs, inputs), dtype=torch.float32), *([x.new_empty(outputs, dtype=torch.float32)] if bias else [])]
    _call("ada2i_linear_backward", x, rows, inputs, outputs, (grad_out, x, *grads, *([] if bias else [None])))
    return grads
