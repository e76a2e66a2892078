"""A layer of AFW in Triton, loss included: the launchers of tensor_ring and attention_mapping without registered ops between."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from ada2i_fast.ops.linear import Branch, branch, here

from . import attention_mapping, tensor_ring

COUNTS_ROWS = True          # forward and backward take `rows`, beyond which x may be anything
MIXED_PARAMETERS = all([getattr(module, "MIXED_PARAMETERS", False) for module in (tensor_ring, attention_mapping)])


def fits(dtype: torch.dtype, parameters: Sequence[Tensor]) -> bool:
    """Whether parameters, all of one dtype, are taken as they are with x of this dtype."""
    own = parameters[0].dtype
    return (own == dtype or own == torch.float32 and MIXED_PARAMETERS) and all([t.dtype == own for t in parameters])


def _stacked(projections: Sequence[Tensor]) -> list[Tensor]:
    """M weights [4R, D_j], M biases [4R], of 4M each: one launch."""
    m = len(projections) // 8
    first = projections[:8 * m:4]
    parts = torch._C._nn.flatten_dense_tensors(projections).split([4 * t.numel() for t in first])
    return [part.view(-1, t.shape[1]) for part, t in zip(parts, first[:m])] + list(parts[m:])


def forward(x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float,
            dropout: float, seed: Tensor | None, gated_target: bool, coefficient: Sequence[float] | None,
            rows: Tensor | None = None, beside: Branch = here) -> list[Tensor]:
    """M outputs; with coefficients the loss too, and what `backward` takes from here. parameters: 12M tensors as in `ops.afw_layer`.
    rows: int64 []; rows of x from there on add nothing to the loss, whose means are over the others. beside: from `ops.linear.branch`, for
    the loss and what only backward needs of it."""
    m = len(x)
    stacks = _stacked(parameters[:8 * m])
    result = tensor_ring.forward(x, offsets, stacks[:m], stacks[m:], parameters[8 * m:9 * m], parameters[9 * m:10 * m], ring, scale, beta,
                                 dropout, seed, gated_target, coefficient is not None)
    if coefficient is None:
        return result[:m]
    loss, *sign = beside(lambda *t: attention_mapping.forward(t[:m], t[m:], parameters[10 * m:11 * m], parameters[11 * m:], coefficient, rows),
                         *x, *result[m:2 * m])
    return [*result[:m], loss, *stacks, *result[2 * m:], *sign]


def backward(grad_out: Sequence[Tensor], grad_loss: Tensor | None, x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor],
             state: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None,
             gated_target: bool, coefficient: Sequence[float], rows: Tensor | None = None) -> list[Tensor | None]:
    """Gradients of x and of the parameters, in their dtypes; None for those of Phi without grad_loss. state: the last that `forward`
    returned."""
    m = len(x)
    stacks, saved, sign = state[:2 * m], state[2 * m:5 * m], state[5 * m:]
    of_loss, grad_target, factors, of_phi = None, [], None, [None] * (2 * m)
    with branch(x[0].device) as beside:
        if grad_loss is not None:
            found, factors = attention_mapping.backward_for_gate(grad_loss, x, sign, parameters[10 * m:11 * m], coefficient, rows, beside)
            of_loss, grad_target, of_phi = found[:m], found[m:2 * m], found[2 * m:]
        found = tensor_ring.backward(grad_out, grad_target, x, offsets, stacks[:m], stacks[m:], parameters[8 * m:9 * m],
                                     parameters[9 * m:10 * m], saved, ring, scale, beta, dropout, seed, gated_target, of_loss, beside, factors)
    return [*found[:m], *[part for grad in found[m:3 * m] for part in grad.chunk(4)], *found[3 * m:], *of_phi]
