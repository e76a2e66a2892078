"""A layer of AFW on the CPU, loss included: tensor_ring and attention_mapping in one pass (csrc/cpu/tensor_ring.inl).

A layer has 12M parameters. What they are rounded to and their gradients lie in one tensor each, one after the other.
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


def _addresses(parameters: Sequence[Tensor], rounded: Tensor | None) -> list[int]:
    if rounded is None:
        return [t.data_ptr() for t in parameters]
    base, size = rounded.data_ptr(), rounded.element_size()
    return [base + size * start for start in _starts([t.numel() for t in parameters])[:-1]]


def forward(x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float,
            seed: Tensor | None, gated_target: bool, coefficient: Sequence[float] | None) -> list[Tensor | None]:
    """M outputs; with coefficients the loss too, and what `backward` takes from here: the parameters rounded to x's dtype (None where
    they have it), and the state, a tensor of bytes."""
    x, = contiguous(x)
    first, count, rank, offsets = x[0], len(x), parameters[4 * len(x)].numel(), offsets.contiguous()
    rounded = None
    if all([t.dtype == first.dtype for t in parameters]):
        parameters, = contiguous(parameters)
    else:
        rounded = torch.cat([t.reshape(-1) for t in parameters], out=first.new_empty(sum([t.numel() for t in parameters])))
    at = _addresses(parameters, rounded)
    out = [torch.empty_like(t) for t in x]
    common = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    none = [None] * count
    if coefficient is None:
        run("ada2i_tensor_ring_forward", *common, pointers(x, at[:10 * count], out, none * 4))
        return out
    *places, end = _state_places(x, offsets.numel() - 1, rank)
    state, loss = first.new_empty(end, dtype=torch.uint8), first.new_empty((), dtype=accumulator(first.dtype))
    places = [state.data_ptr() + place for place in places]
    run("ada2i_tensor_ring_forward", *common,
        pointers(x, at[:10 * count], out, none, places[:3 * count], at[10 * count:], places[3 * count:]), coefficient, loss)
    return [*out, loss, rounded, state]


def backward(grad_out: Sequence[Tensor], grad_loss: Tensor | None, x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor],
             rounded: Tensor | None, state: Tensor, ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None,
             gated_target: bool, coefficient: Sequence[float]) -> list[Tensor | None]:
    """Gradients of x and of the parameters, in their dtypes; None for those of Phi without grad_loss."""
    grad_out, x = contiguous(grad_out, x)
    if rounded is None:
        parameters, = contiguous(parameters)
    first, count, rank, offsets = x[0], len(x), parameters[4 * len(x)].numel(), offsets.contiguous()
    at = _addresses(parameters, rounded)
    places = [state.data_ptr() + place for place in _state_places(x, offsets.numel() - 1, rank)[:-1]]
    wanted = parameters if grad_loss is not None else parameters[:10 * count]
    sizes = [t.numel() for t in wanted]
    grads, grad_x = first.new_empty(sum(sizes)), [torch.empty_like(t) for t in x]
    to = _addresses(wanted, grads)
    given = (x, at[:4 * count], at[8 * count:9 * count], places[:3 * count], grad_out, [None] * count, grad_x,
             to[:4 * count:4], to[4 * count:8 * count:4], to[8 * count:10 * count])           # those of four projections are one after the other
    common = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    if grad_loss is None:
        run("ada2i_tensor_ring_backward", *common, pointers(*given))
    else:
        run("ada2i_tensor_ring_backward", *common, pointers(*given, at[10 * count:11 * count], places[3 * count:], to[10 * count:]),
            coefficient, grad_loss.contiguous())
    parts = (grads if rounded is None else grads.to(parameters[0].dtype)).split(sizes)
    found = [part if t.dim() == 1 else part.view(t.shape) for part, t in zip(parts, wanted)]
    return [*grad_x, *found, *([None] * (len(parameters) - len(wanted)))]
