"""cosine_fusion on the CPU; see ada2i_fast/ops/cosine_fusion.py and csrc/cpu/cosine_fusion.inl."""

from __future__ import annotations

import ctypes
from typing import Sequence

import torch
from torch import Tensor

from ..backends import accumulator
from . import DTYPES, call, contiguous, pointers


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("dtype", "threads", "modalities", "rows", "width", "classes", "amw", "over_classes",
                                                      "linear_scores")),
                ("scale", ctypes.c_double), *((name, ctypes.c_void_p) for name in ("labels", "outside", "tensors"))]


def _call(name: str, hidden: Sequence[Tensor], weight: Tensor, labels: Tensor | None, amw: bool, cosine_norm: str, scale: float,
          score_from: str, *tensors: Tensor | None) -> int:
    """The position of the first label that is no class, or -1."""
    outside, addresses = ctypes.c_int64(-1), pointers(hidden, [weight, *tensors])
    call(name, _Arguments(DTYPES[weight.dtype], torch.get_num_threads(), len(hidden), *hidden[0].shape, weight.shape[0], amw,
                          cosine_norm == "classes", score_from == "linear", scale, None if labels is None else labels.data_ptr(),
                          ctypes.addressof(outside), ctypes.addressof(addresses)))
    return outside.value


def forward(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, labels: Tensor | None, amw: bool, cosine_norm: str,
            scale: float, score_from: str) -> list[Tensor]:
    hidden, (weight, *bias), labels = contiguous(hidden, [weight] if bias is None else [weight, bias], [] if labels is None else [labels])
    count, rows, classes, dtype = len(hidden), hidden[0].shape[0], weight.shape[0], accumulator(weight.dtype)
    joint = weight.new_empty((rows, classes))
    log_prob, norm = (weight.new_empty(shape, dtype=dtype) for shape in ((count, rows, classes), (count, rows)))
    of_labels = [weight.new_empty((count,), dtype=dtype) for _ in range(2 * len(labels))]
    outside = _call("ada2i_cosine_fusion_forward", hidden, weight, labels[0] if labels else None, amw, cosine_norm, scale, score_from,
                    bias[0] if bias else None, joint, log_prob, norm, *(of_labels or (None, None)))
    if outside >= 0:
        raise ValueError(f"labels: expected classes from 0 to {classes - 1}, got {labels[0][outside].item()} at position {outside}")
    return [joint, log_prob, norm, *of_labels]


def backward(grad_joint: Tensor, hidden: Sequence[Tensor], weight: Tensor, norm: Tensor, with_bias: bool, amw: bool, cosine_norm: str,
             scale: float) -> list[Tensor]:
    hidden, (weight, grad_joint, norm) = contiguous(hidden, [weight, grad_joint, norm])
    grads = [*(torch.empty_like(h) for h in hidden), torch.empty_like(weight)]
    if with_bias:
        grads.append(weight.new_empty(weight.shape[0]))
    _call("ada2i_cosine_fusion_backward", hidden, weight, None, amw, cosine_norm, scale, "linear", grad_joint, norm, *grads,
          *(() if with_bias else (None,)))
    return grads
