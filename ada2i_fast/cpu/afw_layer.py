"""A layer of AFW on the CPU, loss included: tensor_ring and attention_mapping in one pass (csrc/cpu/tensor_ring.inl)."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from ..backends import accumulator
from . import contiguous, pointers
from .tensor_ring import run


def forward(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
            map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], phi_weight: Sequence[Tensor], phi_bias: Sequence[Tensor],
            ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None, gated_target: bool,
            coefficient: Sequence[float] | None) -> list[Tensor]:
    """M outputs; with coefficients the loss too, and what backward takes: M projections, M means, M attentions, M signs."""
    x, proj_weight, proj_bias, map_weight, map_bias, phi_weight, phi_bias = contiguous(
        x, proj_weight, proj_bias, map_weight, map_bias, phi_weight, phi_bias)
    first, count, rank, offsets = x[0], len(x), proj_bias[0].numel(), offsets.contiguous()
    out, none = [torch.empty_like(t) for t in x], [None] * count
    common = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    given = (x, proj_weight, proj_bias, map_weight, map_bias, out, none)
    if coefficient is None:
        run("ada2i_tensor_ring_forward", *common, pointers(*given, none, none, none))
        return out
    precise = accumulator(first.dtype)
    loss = first.new_empty((), dtype=precise)
    # Nobody sees these but backward, so those of all modalities share their memory.
    proj = first.new_empty((count, first.shape[0], 4 * rank), dtype=precise).unbind()
    mean = first.new_empty((count, offsets.numel() - 1, rank, rank), dtype=precise).unbind()
    attention, sign = [torch.empty_like(t) for t in x], [torch.empty_like(t, dtype=torch.int8) for t in x]
    run("ada2i_tensor_ring_forward", *common, pointers(*given, proj, mean, attention, phi_weight, phi_bias, sign), coefficient, loss)
    return [*out, loss, *proj, *mean, *attention, *sign]


def backward(grad_out: Sequence[Tensor], grad_loss: Tensor | None, x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor],
             map_weight: Sequence[Tensor], phi_weight: Sequence[Tensor], saved: Sequence[Tensor], ring: Sequence[int], scale: float,
             beta: float, dropout: float, seed: Tensor | None, gated_target: bool, coefficient: Sequence[float]) -> list[Tensor | None]:
    """Gradients in the order of the parameters of `forward`; None for those of Phi without grad_loss."""
    grad_out, x, proj_weight, map_weight, phi_weight, saved = contiguous(grad_out, x, proj_weight, map_weight, phi_weight, saved)
    first, count, rank, offsets = x[0], len(x), proj_weight[0].shape[0], offsets.contiguous()
    widths = [t.shape[1] for t in x]
    state, sign = saved[:3 * count], saved[3 * count:]
    grad_x = [torch.empty_like(t) for t in x]
    # Four projections lie in one tensor, and the biases of a kind in another: fewer tensors to make, and views to give away.
    grad_proj = [first.new_empty(4 * rank, width) for width in widths]
    grad_map = [torch.empty_like(w) for w in map_weight]
    grad_proj_bias = first.new_empty(4 * rank * count)
    grad_map_bias = first.new_empty(sum(widths)).split(widths)
    grads = (grad_x, grad_proj, grad_proj_bias.split(4 * rank), grad_map, grad_map_bias)
    given = (x, proj_weight, map_weight, state, grad_out, [None] * count)
    common = (x, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    if grad_loss is None:
        run("ada2i_tensor_ring_backward", *common, pointers(*given, *grads))
        of_phi = [None] * (2 * count)
    else:
        of_phi = [*(torch.empty_like(w) for w in phi_weight), *first.new_empty(sum(widths)).split(widths)]
        run("ada2i_tensor_ring_backward", *common, pointers(*given, *grads, phi_weight, sign, of_phi), coefficient, grad_loss.contiguous())
    return [*grad_x, *(part for t in grad_proj for part in t.split(rank)), *grad_proj_bias.split(rank), *grad_map, *grad_map_bias, *of_phi]
