"""balanced_adam on CUDA; see ada2i_fast/ops/balanced_adam.py and csrc/cuda/balanced_adam.cuh. float32, contiguous."""

from __future__ import annotations

import ctypes
from typing import Sequence

import torch
from torch import Tensor

from ..backends import uniform
from ..cpu import float32_only, int64s, pointers
from . import call, prepare

why_not = float32_only


class _Arguments(ctypes.Structure):
    """struct BalancedAdam of csrc/cuda/balanced_adam.cu, field by field."""

    _fields_ = [("count", ctypes.c_int64), *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps")),
                *((name, ctypes.c_void_p) for name in ("sizes", "numbers", "tensors", "seed", "settings", "measures", "scratch"))]


class _Settings(ctypes.Structure):
    """struct AdamSettings of csrc/cuda/balanced_adam.cuh, field by field."""

    _fields_ = [("count", ctypes.c_int64), ("noise", ctypes.c_int32), ("clip_first", ctypes.c_int32),
                *((name, ctypes.c_double) for name in ("clip_norm", "alpha", "beta1", "beta2")),
                *((name, ctypes.c_void_p) for name in ("measures", "sizes", "step", "lr", "decay", "owner", "ratio", "key", "settings",
                                                       "norm", "seed", "scratch"))]


def _checked(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """ValueError unless the kernels can trust these addresses."""
    if len(tensors) != len(like):
        raise ValueError(f"{name}: expected {len(like)} tensors, got {len(tensors)}")
    if uniform(tensors, like[0].get_device(), torch.float32) and all(map(Tensor.is_contiguous, tensors)) and \
            [*map(Tensor.numel, tensors)] == [*map(Tensor.numel, like)]:
        return
    device = like[0].device
    for i, (t, l) in enumerate(zip(tensors, like)):
        if t.dtype != torch.float32 or t.device != device or t.numel() != l.numel() or not t.is_contiguous():
            raise ValueError(f"{name}[{i}]: expected contiguous torch.float32 {list(l.shape)} on {device}, got "
                             f"{'' if t.is_contiguous() else 'strided '}{t.dtype} {list(t.shape)} on {t.device}")


def measure(grads: Sequence[Tensor]) -> Tensor:
    """Two launches for up to 256 tensors."""
    _checked("grads", grads, grads)
    measures = grads[0].new_empty((len(grads), 2), dtype=torch.float64)
    sizes, table = int64s([*map(Tensor.numel, grads)]), pointers(grads)
    args = _Arguments(count=len(grads), sizes=ctypes.addressof(sizes), tensors=ctypes.addressof(table), measures=measures.data_ptr())
    call("balanced_adam_measure", args, measures)
    return measures


def settings(measures: Tensor, sizes: Tensor, step: Tensor, lr: Tensor, decay: Tensor, owner: Tensor, ratio: Tensor | None,
             key: Tensor | None, noise: str, clip_norm: float, clip_first: bool, alpha: float, beta1: float,
             beta2: float) -> list[Tensor]:
    """One launch."""
    count, f64 = len(sizes), torch.float64
    given = {}
    for name, t, shape, dtype in (("measures", measures, (count, 2), f64), ("sizes", sizes, (count,), f64), ("step", step, (count,), torch.float32),
                                  ("lr", lr, (count,), f64), ("decay", decay, (count,), f64), ("owner", owner, (count,), torch.int64),
                                  *([] if ratio is None else [("ratio", ratio, ratio.shape, f64)]),
                                  *([] if key is None else [("key", key, (1,), torch.int64)])):
        given[name], = prepare(name, [t], measures, [shape], dtype)
    out = [measures.new_empty(count, 6), measures.new_empty((), dtype=torch.float32), measures.new_empty(2, dtype=torch.int64)]
    args = _Settings(count=count, noise=("none", "gradient", "parameter").index(noise), clip_first=clip_first, clip_norm=clip_norm,
                     alpha=alpha, beta1=beta1, beta2=beta2, **{name: t.data_ptr() for name, t in given.items()},
                     **{name: t.data_ptr() for name, t in zip(("settings", "norm", "seed"), out)})
    call("balanced_adam_settings", args, measures)
    return out


def update(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
           settings: Tensor, numbers: Sequence[int], seed: Tensor | None, beta1: float, beta2: float, eps: float) -> None:
    """One launch for up to 256 tensors."""
    for name, tensors in (("params", params), ("grads", grads), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _checked(name, tensors, params)
    for name, t, shape, dtype in (("settings", settings, (len(params), 6), torch.float64), ("seed", seed, (2,), torch.int64)):
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != params[0].device or not t.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous {dtype} {list(shape)} on {params[0].device}, got {t.dtype} {list(t.shape)} "
                             f"on {t.device}")
    if len(numbers) != len(params):
        raise ValueError(f"numbers: expected {len(params)} of them, got {len(numbers)}")
    sizes, own, table = int64s([*map(Tensor.numel, params)]), int64s(numbers), pointers(params, grads, exp_avg, exp_avg_sq)
    args = _Arguments(count=len(params), beta1=beta1, beta2=beta2, eps=eps, sizes=ctypes.addressof(sizes), numbers=ctypes.addressof(own),
                      tensors=ctypes.addressof(table), settings=settings.data_ptr(), seed=None if seed is None else seed.data_ptr())
    call("balanced_adam_update", args, settings)
