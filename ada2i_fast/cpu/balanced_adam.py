"""balanced_adam on the CPU; see ada2i_fast/ops/balanced_adam.py and csrc/cpu/balanced_adam.inl. float32, contiguous."""

from __future__ import annotations

import ctypes
from typing import Sequence

import torch
from torch import Tensor

from . import call, float32_only, int64s, pointers

why_not = float32_only


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("threads", "count")),
                *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps")),
                *((name, ctypes.c_void_p) for name in ("seed", "sizes", "numbers", "settings", "measures", "tensors"))]


def _call(name: str, tensors: ctypes.Array, sizes: Sequence[int], *, numbers: Sequence[int] = (), beta1: float = 0.0, beta2: float = 0.0,
          eps: float = 0.0, seed: Tensor | None = None, settings: Tensor | None = None,
          measures: Tensor | None = None) -> None:
    sizes_, numbers_ = int64s(sizes), int64s(numbers)
    call(name, _Arguments(torch.get_num_threads(), len(sizes), beta1, beta2, eps,
                          *(None if t is None else t.data_ptr() for t in (seed,)), ctypes.addressof(sizes_),
                          ctypes.addressof(numbers_), *(None if t is None else t.data_ptr() for t in (settings, measures)),
                          ctypes.addressof(tensors)))


def measure(grads: Sequence[Tensor]) -> Tensor:
    measures = torch.empty(len(grads), 2, dtype=torch.float64)
    _call("ada2i_balanced_adam_measure", pointers(grads), [g.numel() for g in grads], measures=measures)
    return measures


def update(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
           settings: Tensor, numbers: Sequence[int], seed: Tensor | None, beta1: float, beta2: float, eps: float) -> None:
    _call("ada2i_balanced_adam_update", pointers(params, grads, exp_avg, exp_avg_sq), [p.numel() for p in params], numbers=numbers,
          beta1=beta1, beta2=beta2, eps=eps, seed=seed, settings=settings)


def modulate(grads: Sequence[Tensor], settings: Tensor, numbers: Sequence[int], seed: Tensor | None) -> None:
    _call("ada2i_balanced_adam_modulate", pointers(grads), [g.numel() for g in grads], numbers=numbers, seed=seed,
          settings=settings)


def noise(seed: Tensor, number: int, step: int, size: int) -> Tensor:
    """The normals that `update` draws for the elements of tensor `number`; for tests."""
    out = torch.empty(size)
    _call("ada2i_balanced_adam_noise", pointers([out]), [size], numbers=[number],
          seed=torch.cat((seed, torch.tensor([step]))))
    return out
