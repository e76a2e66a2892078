"""A layer of AFW on the CPU, loss included: tensor_ring and attention_mapping in one pass (csrc/cpu/tensor_ring.inl).

A layer has 12M parameters, whose gradients lie in one tensor, one after the other.
"""

from __future__ import annotations

import functools
import itertools
from typing import Sequence

import torch
from torch import Tensor

from ..backends import accumulator, uniform
from ..ops.afw_layer import layout
from . import contiguous, pointers
from .tensor_ring import run


@functools.lru_cache(maxsize=256)
def _state_places(rows: int, dialogues: int, widths: tuple[int, ...], rank: int, dtype: torch.dtype) -> list[int]:
    """Where in the state each modality's projections, means, attentions and signs begin, kind by kind, and where it ends; in bytes. Behind the
    signs is a bit for each of them, of rows in multiples of 64: what dropout has kept."""
    m, precise = len(widths), accumulator(dtype).itemsize
    sizes = [*[4 * rank * rows * precise] * m, *[dialogues * rank * rank * precise] * m, *(rows * d * dtype.itemsize for d in widths),
             *(rows * (d + (d + 63) // 64 * 8) for d in widths)]
    return [*itertools.accumulate([(n + 63) // 64 * 64 for n in sizes], initial=0)]


def fits(dtype: torch.dtype, parameters: Sequence[Tensor]) -> bool:
    """Whether parameters, all of one dtype, are taken as they are with x of this dtype: that of x, or float32 with 16 bits."""
    own = parameters[0].dtype
    return (own == dtype or own == torch.float32 and dtype.itemsize == 2) and uniform(parameters, -1, own)


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
    *places, end = _state_places(first.shape[0], offsets.numel() - 1, tuple([t.shape[1] for t in x]), rank, first.dtype)
    state, loss = first.new_empty(end, dtype=torch.uint8), first.new_empty((), dtype=accumulator(first.dtype))
    start = state.data_ptr()
    places = [start + place for place in places]
    run("ada2i_tensor_ring_forward", *common,
        pointers(x, parameters[:10 * count], out, none, places[:3 * count], others, places[3 * count:]), coefficient, loss, dtype)
    return [*out, loss, state]


def backward(grad_out: Sequence[Tensor], grad_loss: Tensor | None, x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor],
             state: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None, gated_target: bool,
             coefficient: Sequence[float]) -> list[Tensor | None]:
    """Gradients of x and of the parameters, in their dtypes; None for those of Phi without grad_loss."""
    grad_out, x, parameters = contiguous(grad_out, x, parameters)
    count, rank, offsets, (state,) = len(x), parameters[4 * len(x)].numel(), offsets.contiguous(), state
    widths, start = tuple([t.shape[1] for t in x]), state.data_ptr()
    shared, places = layout(widths, rank), _state_places(x[0].shape[0], offsets.numel() - 1, widths, rank, x[0].dtype)
    places = [start + place for place in places[:-1]]
    wanted = 12 * count if grad_loss is not None else 10 * count
    grads, grad_x = parameters[0].new_empty(shared.starts[wanted]), [torch.empty_like(t) for t in x]
    to, size = grads.data_ptr(), grads.element_size()
    to = [to + start * size for start in shared.starts[:wanted]]
    given = (x, parameters[:4 * count], parameters[8 * count:9 * count], places[:3 * count], grad_out, [None] * count, grad_x,
             to[:4 * count:4], to[4 * count:8 * count:4], to[8 * count:10 * count])           # those of four projections are one after the other
    common, dtype = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target), grads.dtype
    if grad_loss is None:
        run("ada2i_tensor_ring_backward", *common, pointers(*given), parameters=dtype)
    else:
        run("ada2i_tensor_ring_backward", *common,
            pointers(*given, parameters[10 * count:11 * count], places[3 * count:], to[10 * count:]), coefficient, grad_loss.contiguous(),
            dtype)
    return [*grad_x, *shared.views(grads), *([None] * (len(parameters) - wanted))]
