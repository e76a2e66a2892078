"""attention_mapping on CUDA; see ada2i_fast/ops/attention_mapping.py and csrc/cuda/attention_mapping.cuh."""

from __future__ import annotations

import ctypes
import functools
from typing import Sequence

import torch
from torch import Tensor

from . import MAX_MODALITIES, Ints, Pointers, Sizes, call, dtype_code, fill, limits, prepare


class _Arguments(ctypes.Structure):
    """struct AttentionMapping of csrc/cuda/ada2i_cuda.h, field by field."""

    _fields_ = [
        ("dtype", ctypes.c_int32), ("count", ctypes.c_int32), ("rows", ctypes.c_int64),
        ("coefficient", ctypes.c_float * MAX_MODALITIES), ("width", Sizes),
        ("x", Pointers), ("target", Pointers), ("weight", Pointers), ("bias", Pointers), ("sign", Pointers),
        ("loss", ctypes.c_void_p), ("grad_loss", ctypes.c_void_p), ("grad_x", Pointers), ("grad_target", Pointers),
        ("grad_weight", Pointers), ("grad_bias", Pointers), ("scratch", ctypes.c_void_p),
        ("vector", Ints), ("splits", ctypes.c_int32), ("input_blocks", ctypes.c_int64), ("blocks", ctypes.c_int64),
        ("partial", ctypes.c_void_p), ("piece", Pointers),
    ]


def why_not(device: str, dtype: torch.dtype, widths: tuple[int, ...], rank: int) -> str | None:
    return limits(len(widths))


@functools.lru_cache(maxsize=256)
def _settings(dtype: int, widths: tuple[int, ...], rows: int, coefficient: tuple[float, ...]) -> bytes:
    """The arguments that calls for as many rows share."""
    args = _Arguments(dtype=dtype, count=len(widths), rows=rows)
    args.width[:len(widths)], args.coefficient[:len(widths)] = widths, coefficient
    return bytes(args)


def arguments(dtype: int, widths: tuple[int, ...], rows: int, coefficient: Sequence[float]) -> _Arguments:
    """All but tensors. dtype: a `dtype_code`."""
    if reason := limits(len(widths)):
        raise ValueError(reason)
    if len(coefficient) != len(widths):
        raise ValueError(f"coefficient: expected {len(widths)} numbers, got {len(coefficient)}")
    return _Arguments.from_buffer_copy(_settings(dtype, widths, rows, tuple(coefficient)))


def _arguments(x: Sequence[Tensor], weight: Sequence[Tensor],
               coefficient: Sequence[float]) -> tuple[_Arguments, list[Tensor]]:
    """What both directions share, and the tensors that must outlive the call."""
    widths, rows = tuple([t.shape[1] for t in x]), x[0].shape[0]
    args = arguments(dtype_code(x[0].dtype), widths, rows, coefficient)
    inputs = {"x": prepare("x", x, x[0], [(rows, d) for d in widths]),
              "weight": prepare("weight", weight, x[0], [(d, d) for d in widths])}
    fill(args, **inputs)
    return args, [t for tensors in inputs.values() for t in tensors]


def forward(x: Sequence[Tensor], target: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor],
            coefficient: Sequence[float]) -> list[Tensor]:
    """Two launches. Returns the loss, float32 [], and M signs of the difference, int8 [N, D_j]."""
    args, alive = _arguments(x, weight, coefficient)
    targets = prepare("target", target, x[0], [t.shape for t in x])
    biases = prepare("bias", bias, x[0], [t.shape[1:] for t in x])
    loss = x[0].new_empty((), dtype=torch.float32)
    sign = [t.new_empty(t.shape, dtype=torch.int8) for t in x]
    fill(args, target=targets, bias=biases, sign=sign)
    args.loss = loss.data_ptr()
    call("attention_mapping_forward", args, x[0])
    del alive
    return [loss, *sign]


def backward(grad_loss: Tensor, x: Sequence[Tensor], sign: Sequence[Tensor], weight: Sequence[Tensor],
             coefficient: Sequence[float]) -> list[Tensor]:
    """Two launches. Returns the gradients of x, target, weight, bias, M each."""
    args, alive = _arguments(x, weight, coefficient)
    grad_loss, = prepare("grad_loss", [grad_loss.to(torch.float32)], x[0], [()], torch.float32)
    signs = prepare("sign", sign, x[0], [t.shape for t in x], torch.int8)
    grads = {"grad_x": [t.new_empty(t.shape) for t in x], "grad_target": [t.new_empty(t.shape) for t in x],
             "grad_weight": [t.new_empty(t.shape) for t in weight], "grad_bias": [t.new_empty(t.shape[:1]) for t in weight]}
    fill(args, sign=signs, **grads)
    args.grad_loss = grad_loss.data_ptr()
    call("attention_mapping_backward", args, x[0])
    del alive
    return [t for tensors in grads.values() for t in tensors]
