"""A layer of AFW on the CPU, loss included: tensor_ring and attention_mapping in one pass (csrc/cpu/tensor_ring.inl).

A layer has 12M parameters, whose gradients lie in one tensor, one after the other.
"""

from __future__ import annotations

import itertools
from typing import Sequence

import torch
from torch import Tensor

from ..backends import accumulator
from . import contiguous, pointers
from .tensor_ring import run


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each begins, and where the last one ends."""
    return [0, *itertools.accumulate(sizes)]


def _state_places(x: Sequence[Tensor], dialogues: int, rank: int) -> list[int]:
    """Where in the state each modality's projections, means, attentions and signs begin, kind by kind, and where it ends; in bytes."""
    rows, size, precise = x[0].shape[0], x[0].element_size(), accumulator(x[0].dtype).itemsize
    sizes = [*([4 * rank * rows * precise] * len(x)), *([dialogues * rank * rank * precise] * len(x)), *(t.numel() * size for t in x),
             *(t.numel() for t in x)]
    return _starts([(n + 63) // 64 * 64 for n in sizes])


def fits(dtype: torch.dtype, parameters: Sequence[Tensor]) -> bool:
    """Whether parameters, all of one dtype, are taken as they are with x of this dtype: that of x, or float32 with 16 bits."""
    own = parameters[0].dtype
    return (own == dtype or own == torch.float32 and dtype.itemsize == 2) and all([t.dtype == own for t in parameters])


def forward(x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float,
            seed: Tensor | None, gated_target: bool, coefficient: Sequence[float] | None) -> list[Tensor]:
    """M outputs; with coefficients the loss too, and in one tensor of bytes what `backward` takes from here."""
    x, parameters = contiguous(x, parameters)
    first, count, rank, offsets = x[0], len(x), parameters[4 * len(x)].numel(), offsets.contiguous()
    out, none, others = [torch.empty_like(t) for t in x], [None] * count, parameters[10 * count:]
    common, dtype = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target), parameters[0].dtype
    if coefficient is None:
        run("ada2i_tensor_ring_forward", *common, pointers(x, parameters[:10 * count], out, none * 4), parameters=dtype)
        return out
    *places, end = _state_places(x, offsets.numel() - 1, rank)
    state, loss = first.new_empty(end, dtype=torch.uint8), first.new_empty((), dtype=accumulator(first.dtype))
    places = [state.data_ptr() + place for place in places]
    run("ada2i_tensor_ring_forward", *common,
        pointers(x, parameters[:10 * count], out, none, places[:3 * count], others, places[3 * count:]), coefficient, loss, dtype)
    return [*out, loss, state]


def backward(grad_out: Sequence[Tensor], grad_loss: Tensor | None, x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor],
             state: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None, gated_target: bool,
             coefficient: Sequence[float]) -> list[Tensor | None]:
    """Gradients of x and of the parameters, in their dtypes; None for those of Phi without grad_loss."""
    grad_out, x, parameters = contiguous(grad_out, x, parameters)
    count, rank, offsets, (state,) = len(x), parameters[4 * len(x)].numel(), offsets.contiguous(), state
    places = [state.data_ptr() + place for place in _state_places(x, offsets.numel() - 1, rank)[:-1]]
    wanted = parameters if grad_loss is not None else parameters[:10 * count]
    sizes = [t.numel() for t in wanted]
    grads, grad_x = parameters[0].new_empty(sum(sizes)), [torch.empty_like(t) for t in x]
    to = [grads.data_ptr() + start * grads.element_size() for start in _starts(sizes)]
    given = (x, parameters[:4 * count], parameters[8 * count:9 * count], places[:3 * count], grad_out, [None] * count, grad_x,
             to[:4 * count:4], to[4 * count:8 * count:4], to[8 * count:10 * count])           # those of four projections are one after the other
    common, dtype = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target), grads.dtype
    if grad_loss is None:
        run("ada2i_tensor_ring_backward", *common, pointers(*given), parameters=dtype)
    else:
        run("ada2i_tensor_ring_backward", *common,
            pointers(*given, parameters[10 * count:11 * count], places[3 * count:], to[10 * count:-1]), coefficient, grad_loss.contiguous(),
            dtype)
    found = torch._C._nn.unflatten_dense_tensors(grads, wanted)     # one call for what a loop would do
    return [*grad_x, *found, *([None] * (len(parameters) - len(wanted)))]
