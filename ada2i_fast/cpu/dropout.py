"""The dropout family on the CPU; see ada2i_fast/ops/dropout.py and csrc/cpu/dropout.inl."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import DTYPES, call, cast, pointers, up_to_float32

why_not = up_to_float32


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("dtype", "threads", "rows", "width", "stream")),
                *((name, ctypes.c_double) for name in ("dropout", "eps")),
                *((name, ctypes.c_void_p) for name in ("seed", "tensors"))]


def _call(name: str, x: Tensor, p: float, seed: Tensor | None, stream: int, eps: float, *tensors: Tensor) -> None:
    addresses = pointers(tensors)
    call(name, _Arguments(DTYPES[x.dtype], torch.get_num_threads(), *x.shape, stream, p, eps, None if p == 0 else seed.data_ptr(),
                          ctypes.addressof(addresses)), addresses, seed, tensors)


def _float32(*tensors: Tensor) -> list[Tensor]:
    return [cast(t, torch.float32).contiguous() for t in tensors]


def relu_forward(x: Tensor, bias: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    x, (bias,) = x.contiguous(), _float32(bias)
    out = torch.empty_like(x)
    _call("ada2i_relu_dropout_forward", x, p, seed, stream, 0.0, x, bias, out)
    return out


def relu_backward(grad_out: Tensor, out: Tensor, p: float) -> list[Tensor]:
    grad_out, out = grad_out.contiguous(), out.contiguous()
    grads = [torch.empty_like(out), out.new_empty(out.shape[1], dtype=torch.float32)]
    _call("ada2i_relu_dropout_backward", out, p, grad_out, 0, 0.0, grad_out, out, *grads)
    return grads


def norm_forward(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, p: float, eps: float,
                 seed: Tensor | None, stream: int) -> list[Tensor]:
    x, tensors = x.contiguous(), _float32(bias, residual, weight, norm_bias)
    out, mean, rstd = torch.empty_like(tensors[1]), tensors[1].new_empty(x.shape[0]), tensors[1].new_empty(x.shape[0])
    _call("ada2i_dropout_norm_forward", x, p, seed, stream, eps, x, *tensors, out, mean, rstd)
    return [cast(out, residual.dtype), mean, rstd]


def norm_backward(grad_out: Tensor, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, p: float,
                  seed: Tensor | None, stream: int) -> list[Tensor]:
    x, tensors = x.contiguous(), _float32(bias, residual, weight, mean, rstd, grad_out)
    grads = [torch.empty_like(t) for t in (x, *tensors[:3], tensors[2])]
    _call("ada2i_dropout_norm_backward", x, p, seed, stream, 0.0, x, *tensors, *grads)
    return [cast(g, t.dtype) for g, t in zip(grads, (x, bias, residual, weight, weight))]
