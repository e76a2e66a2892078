"""A layer of AFW on the CPU, loss included: tensor_ring and attention_mapping in one pass (csrc/cpu/tensor_ring.inl)."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from ..backends import accumulator
from . import contiguous, pointers
from .tensor_ring import run


def _places(x: Sequence[Tensor], dialogues: int, rank: int) -> list[int]:
    """Where in the state each modality's projections, means, attentions and signs begin, kind by kind, and where it ends; in bytes."""
    rows, size, precise = x[0].shape[0], x[0].element_size(), accumulator(x[0].dtype).itemsize
    places = [0]
    for width in (*([4 * rank * rows * precise] * len(x)), *([dialogues * rank * rank * precise] * len(x)),
                  *(t.numel() * size for t in x), *(t.numel() for t in x)):
        places.append(places[-1] + (width + 63) // 64 * 64)
    return places


def forward(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
            map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], phi_weight: Sequence[Tensor], phi_bias: Sequence[Tensor],
            ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None, gated_target: bool,
            coefficient: Sequence[float] | None) -> list[Tensor]:
    """M outputs; with coefficients the loss too, and in one tensor of bytes what `backward` takes from here."""
    x, proj_weight, proj_bias, map_weight, map_bias, phi_weight, phi_bias = contiguous(
        x, proj_weight, proj_bias, map_weight, map_bias, phi_weight, phi_bias)
    count, rank, offsets = len(x), proj_bias[0].numel(), offsets.contiguous()
    out, none = [torch.empty_like(t) for t in x], [None] * count
    common = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    given = (x, proj_weight, proj_bias, map_weight, map_bias, out, none)
    if coefficient is None:
        run("ada2i_tensor_ring_forward", *common, pointers(*given, none, none, none))
        return out
    *places, end = _places(x, offsets.numel() - 1, rank)
    state, loss = x[0].new_empty(end, dtype=torch.uint8), x[0].new_empty((), dtype=accumulator(x[0].dtype))
    places = [state.data_ptr() + place for place in places]
    run("ada2i_tensor_ring_forward", *common, pointers(*given, places[:3 * count], phi_weight, phi_bias, places[3 * count:]),
        coefficient, loss)
    return [*out, loss, state]


def backward(grad_out: Sequence[Tensor], grad_loss: Tensor | None, x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor],
             map_weight: Sequence[Tensor], phi_weight: Sequence[Tensor], state: Tensor, ring: Sequence[int], scale: float, beta: float,
             dropout: float, seed: Tensor | None, gated_target: bool, coefficient: Sequence[float]) -> list[Tensor | None]:
    """Gradients in the order of the parameters of `forward`; None for those of Phi without grad_loss."""
    grad_out, x, proj_weight, map_weight, phi_weight = contiguous(grad_out, x, proj_weight, map_weight, phi_weight)
    first, count, rank, offsets = x[0], len(x), proj_weight[0].shape[0], offsets.contiguous()
    widths = [t.shape[1] for t in x]
    places = [state.data_ptr() + place for place in _places(x, offsets.numel() - 1, rank)[:-1]]
    grad_x = [torch.empty_like(t) for t in x]
    # Four projections lie in one tensor, and the biases of a kind in another: fewer tensors to make, and views to give away.
    grad_proj = [first.new_empty(4 * rank, width) for width in widths]
    grad_map = [torch.empty_like(w) for w in map_weight]
    grad_proj_bias = first.new_empty(4 * rank * count)
    grad_map_bias = first.new_empty(sum(widths)).split(widths)
    grads = (grad_x, grad_proj, grad_proj_bias.split(4 * rank), grad_map, grad_map_bias)
    given = (x, proj_weight, map_weight, places[:3 * count], grad_out, [None] * count)
    common = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    if grad_loss is None:
        run("ada2i_tensor_ring_backward", *common, pointers(*given, *grads))
        of_phi = [None] * (2 * count)
    else:
        of_phi = [*(torch.empty_like(w) for w in phi_weight), *first.new_empty(sum(widths)).split(widths)]
        run("ada2i_tensor_ring_backward", *common, pointers(*given, *grads, phi_weight, places[3 * count:], of_phi), coefficient,
            grad_loss.contiguous())
    return [*grad_x, *(part for t in grad_proj for part in t.split(rank)), *grad_proj_bias.split(rank), *grad_map, *grad_map_bias, *of_phi]
