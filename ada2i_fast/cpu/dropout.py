"""The dropout family on the CPU; see ada2i_fast/ops/dropout.py and csrc/cpu/dropout.inl. float32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import call, contiguous, float32_only, pointers

why_not = float32_only


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("threads", "rows", "width", "stream")),
                *((name, ctypes.c_double) for name in ("dropout", "eps")),
                *((name, ctypes.c_void_p) for name in ("seed", "tensors"))]


def _call(name: str, x: Tensor, p: float, seed: Tensor | None, stream: int, eps: float, *tensors: Tensor) -> None:
    addresses = pointers(tensors)
    call(name, _Arguments(torch.get_num_threads(), *x.shape, stream, p, eps, None if p == 0 else seed.data_ptr(),
                          ctypes.addressof(addresses)))


def relu_forward(x: Tensor, bias: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    (x, bias), = contiguous((x, bias))
    out = torch.empty_like(x)
    _call("ada2i_relu_dropout_forward", x, p, seed, stream, 0.0, x, bias, out)
    return out


def relu_backward(grad_out: Tensor, out: Tensor, p: float) -> list[Tensor]:
    (grad_out, out), = contiguous((grad_out, out))
    grads = [torch.empty_like(out), out.new_empty(out.shape[1])]
    _call("ada2i_relu_dropout_backward", out, p, grad_out, 0, 0.0, grad_out, out, *grads)
    return grads


def norm_forward(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, p: float, eps: float,
                 seed: Tensor | None, stream: int) -> list[Tensor]:
    (x, bias, residual, weight, norm_bias), = contiguous((x, bias, residual, weight, norm_bias))
    result = [torch.empty_like(x), x.new_empty(x.shape[0]), x.new_empty(x.shape[0])]
    _call("ada2i_dropout_norm_forward", x, p, seed, stream, eps, x, bias, residual, weight, norm_bias, *result)
    return result


def norm_backward(grad_out: Tensor, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, p: float,
                  seed: Tensor | None, stream: int) -> list[Tensor]:
    (grad_out, x, bias, residual, weight), = contiguous((grad_out, x, bias, residual, weight))
    grads = [torch.empty_like(x), torch.empty_like(bias), torch.empty_like(x), torch.empty_like(bias), torch.empty_like(bias)]
    _call("ada2i_dropout_norm_backward", x, p, seed, stream, 0.0, x, bias, residual, weight, mean, rstd, grad_out, *grads)
    return grads
