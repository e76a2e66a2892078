"""A layer of AFW on CUDA, loss included: the launches of tensor_ring and attention_mapping, and as little as can be on the host between.

The kernels take addresses, so what only they see lies in few tensors: the parameters of one dtype, the state for backward, gradients of
the parameters one after the other. Beside the kernels there are two launches, the stack of the projections and the sum of two gradients
of x; two more where parameters are not of the dtype of x, to which they are cast all at once, as are their gradients back.
"""

from __future__ import annotations

import functools
import itertools
from typing import Sequence

import torch
from torch import Tensor

from ..backends import uniform
from ..ops.afw_layer import layout
from ..ops.attention_mapping import masked
from . import attention_mapping, call, fill, prepare, tensor_ring


def fits(dtype: torch.dtype, parameters: Sequence[Tensor]) -> bool:
    """Whether parameters are taken as they are."""
    return True


@functools.lru_cache(maxsize=64)
def _kinds(widths: tuple[int, ...], rank: int) -> list[list[int]]:
    """In elements, where in a layer's parameters those of each kind lie, per modality; the four projections of a modality are one stack."""
    m, starts = len(widths), layout(widths, rank).starts[:-1]
    first = [*starts[:8 * m:4], *starts[8 * m:]]
    return [first[i * m:(i + 1) * m] for i in range(6)]


@functools.lru_cache(maxsize=256)
def _places(rows: int, dialogues: int, widths: tuple[int, ...], rank: int, size: int) -> tuple[list[list[int]], int, list[int], int]:
    """Bytes at which the state holds each modality's projections, averages, attentions and signs, and its length; elements at which a
    tensor holds gradients like x, and its length. Aligned as torch aligns tensors."""
    m, elements = len(widths), [rows * d for d in widths]
    sizes = [*[4 * rank * rows * size] * m, *[4 * dialogues * rank * rank] * m, *[n * size for n in elements], *elements]
    *state, state_end = itertools.accumulate([(n + 511) // 512 * 512 for n in sizes], initial=0)
    *like_x, like_x_end = itertools.accumulate([(n + 255) // 256 * 256 for n in elements], initial=0)
    return [state[i * m:(i + 1) * m] for i in range(4)], state_end, like_x, like_x_end


def _at(t: Tensor, starts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Addresses inside a tensor."""
    base = t.data_ptr()
    return [[base + start * size for start in kind] for kind in starts]


def forward(x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float,
            dropout: float, seed: Tensor | None, gated_target: bool, coefficient: Sequence[float] | None,
            rows: Tensor | None = None) -> list[Tensor]:
    """M outputs; with coefficients the loss too, and what `backward` takes from here. parameters: 12M tensors as in `ops.afw_layer`.
    rows: int64 []; rows of x from there on are 0 and add nothing to the loss."""
    m, rank, first = len(x), parameters[4 * len(x)].shape[0], x[0]
    widths, dtype = tuple([t.shape[1] for t in x]), first.dtype
    gated = gated_target and coefficient is not None
    args, alive = tensor_ring.arguments(x, widths, offsets, rank, ring, scale, beta, dropout, seed, gated)
    x, size = alive[:m], first.element_size()
    starts = _kinds(widths, rank)
    if uniform(parameters, first.get_device(), dtype):
        flat = torch._C._nn.flatten_dense_tensors(parameters[:8 * m])
        own = [t if t.is_contiguous() else t.contiguous() for t in parameters[8 * m:]]
        given = [*_at(flat, starts[:2], size), *[own[i * m:(i + 1) * m] for i in range(4)]]
    else:
        flat = torch._C._nn.flatten_dense_tensors(parameters).to(dtype)
        given = _at(flat, starts, size)
    places, end, _, _ = _places(first.shape[0], args.dialogues, widths, rank, size)
    out, state = [torch.empty_like(t) for t in x], first.new_empty(end, dtype=torch.uint8)
    proj, average, attention, sign = _at(state, places, 1)
    target = [torch.empty_like(t) for t in x] if gated else attention
    fill(args, proj_weight=given[0], proj_bias=given[1], map_weight=given[2], map_bias=given[3], proj=proj, average=average,
         attention=attention, out=out, target=target if gated else [])
    call("tensor_ring_forward", args, first)
    if coefficient is None:
        return out
    if rows is not None:
        kept = target if gated else [state[place:place + t.numel() * size].view(dtype).view(t.shape) for place, t in zip(places[2], x)]
        target = masked(kept, parameters[11 * m:], rows)
    loss = first.new_empty((), dtype=torch.float32)
    mapping = attention_mapping.arguments(args.dtype, widths, first.shape[0], coefficient)
    fill(mapping, x=x, target=target, weight=given[4], bias=given[5], sign=sign)
    mapping.loss = loss.data_ptr()
    call("attention_mapping_forward", mapping, first)
    return [*out, loss, flat, state]


def backward(grad_out: Sequence[Tensor], grad_loss: Tensor | None, x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor],
             state: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None,
             gated_target: bool, coefficient: Sequence[float]) -> list[Tensor | None]:
    """Gradients of x and of the parameters, in their dtypes; None for those of Phi without grad_loss. state: the last that `forward`
    returned."""
    m, rank, first, (flat, state) = len(x), parameters[4 * len(x)].shape[0], x[0], state
    widths, rows, size = tuple([t.shape[1] for t in x]), first.shape[0], first.element_size()
    args, alive = tensor_ring.arguments(x, widths, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    x, shared, starts = alive[:m], layout(widths, rank), _kinds(widths, rank)
    places, end, like_x, like_x_end = _places(rows, args.dialogues, widths, rank, size)
    if flat.numel() == shared.starts[-1]:
        given = _at(flat, starts, size)
        map_weight, phi_weight = given[2], given[4]
    else:
        map_weight = prepare("map_weight", parameters[8 * m:9 * m], first, shared.shapes[8 * m:9 * m])
        phi_weight = prepare("phi_weight", parameters[10 * m:11 * m], first, shared.shapes[10 * m:11 * m])
    grad_out = prepare("grad_out", grad_out, first, [(rows, d) for d in widths])
    proj, average, attention, sign = _at(state, places, 1)

    wanted = 12 * m if grad_loss is not None else 10 * m
    grads = first.new_empty(shared.starts[wanted])
    to = _at(grads, starts, size)
    grad_x = first.new_empty(like_x_end)
    fill(args, proj_weight=_at(flat, starts[:1], size)[0], map_weight=map_weight, proj=proj, average=average, attention=attention,
         grad_out=grad_out, grad_x=_at(grad_x, [like_x], size)[0], grad_proj_weight=to[0], grad_proj_bias=to[1], grad_map_weight=to[2],
         grad_map_bias=to[3])
    if grad_loss is None:
        call("tensor_ring_backward", args, first)
    else:
        grad_loss, = prepare("grad_loss", [grad_loss], first, [()], torch.float32)
        also_x, grad_target = first.new_empty(like_x_end), first.new_empty(like_x_end)
        target = _at(grad_target, [like_x], size)[0]
        mapping = attention_mapping.arguments(args.dtype, widths, rows, coefficient)
        fill(mapping, x=x, weight=phi_weight, sign=sign, grad_x=_at(also_x, [like_x], size)[0], grad_target=target, grad_weight=to[4],
             grad_bias=to[5])
        mapping.grad_loss = grad_loss.data_ptr()
        call("attention_mapping_backward", mapping, first)
        fill(args, grad_target=target)
        call("tensor_ring_backward", args, first)
        grad_x.add_(also_x)
    if parameters[0].dtype != first.dtype:
        grads = grads.to(parameters[0].dtype)
    return [*[grad_x.as_strided((rows, d), (d, 1), place) for d, place in zip(widths, like_x)],
            *shared.views(grads), *[None] * (len(parameters) - wanted)]
