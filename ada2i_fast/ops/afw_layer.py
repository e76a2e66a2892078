"""One layer of AFW, its loss included (eqs. 4 to 7 and 12): `tensor_ring`, and `attention_mapping` of its target.

Both are one node of the graph. Beside two nodes that saves what Python, the dispatcher and autograd cost between them, which on a GPU, and
at ten short dialogues on a CPU too, takes longer than the arithmetic; most of stacking the projections and of taking the stacks' gradients
apart; and of adding two gradients of x. On a CPU it is one pass over the rows, which saves the target and its gradient, too, of which only
signs are left, and whose packed rows both sums of products share:

    g_target = -c S g_L,    g_x = (tensor_ring's) + c g_L S Phi,    g_Phi = c g_L S^T x,    g_phi = c g_L sum_n S
"""

from __future__ import annotations

import functools
import itertools
import math
from types import ModuleType
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from .. import backends, cuda, node
from .attention_mapping import attention_mapping, attention_mapping_torch, beyond, coefficients, masked
from .dropout import gradients_through
from .linear import Branch, here
from .tensor_ring import check_layer, ring_rows, tensor_ring, tensor_ring_torch

__all__ = ["Layout", "afw_layer", "differentiable", "layout", "stacked"]


class _Stacked(torch.autograd.Function):
    """One node of the graph for all stacks, and gradients that are views of the stacks'."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([torch.cat(tensors[i:i + 4]) for i in range(0, len(tensors), 4)])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple([part for grad in grads for part in grad.chunk(4)])


def stacked(proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The 4M projections of `afw_layer` as `tensor_ring` takes them: M weights [4R, D_j], M biases [4R]."""
    found = _Stacked.apply(*proj_weight, *proj_bias)
    return list(found[:len(found) // 2]), list(found[len(found) // 2:])


# The parameters of a layer, and how many of each a modality has.
_PARAMETERS = (("proj_weight", 4), ("proj_bias", 4), ("map_weight", 1), ("map_bias", 1), ("phi_weight", 1), ("phi_bias", 1))
# Where the kinds lie among the 13M tensors: x, proj_weight, proj_bias, map_weight, map_bias, phi_weight, phi_bias.
_PLACES = ((0, 1), (1, 5), (5, 9), (9, 10), (10, 11), (11, 12), (12, 13))


class Layout(NamedTuple):
    """Of the 12M parameters of a layer, or their gradients, one after the other in one tensor.

    starts: of each, in elements, and where the last one ends.  runs: shape, strides and start of neighbours of one shape as one tensor.
    """

    shapes: list[tuple[int, ...]]
    starts: list[int]
    runs: list[tuple[tuple[int, ...], tuple[int, ...], int]]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors in `flat`, which may end with the M biases of the map. As few calls as can be: there are dozens of them."""
        return [t for shape, strides, start in self.runs if start < flat.numel() for t in flat.as_strided(shape, strides, start).unbind()]


@functools.lru_cache(maxsize=64)
def layout(widths: tuple[int, ...], rank: int) -> Layout:
    m = len(widths)
    shapes = [*((rank, d) for d in widths for _ in range(4)), *[(rank,)] * (4 * m), *((d, rank * rank) for d in widths),
              *((d,) for d in widths), *((d, d) for d in widths), *((d,) for d in widths)]
    starts = [*itertools.accumulate(map(math.prod, shapes), initial=0)]
    runs, first = [], 0
    for shape, group in itertools.groupby(shapes):
        count = len([*group])
        runs.append(((count, *shape), (math.prod(shape), *shape[1:], 1), starts[first]))
        first += count
    return Layout(shapes, starts, runs)


def _check(x: Sequence[Tensor], parameters: Sequence[Tensor], rank: int) -> None:
    """ValueError, with the argument's name, unless the parameters fit x."""
    m, shapes = len(x), layout(tuple([t.shape[1] for t in x]), rank).shapes
    if [t.shape for t in parameters] == shapes and backends.uniform(parameters, x[0].get_device()):
        return
    start = 0
    for name, count in _PARAMETERS:
        end = start + count * m
        backends.check_shapes(x[0], **{name: (parameters[start:end], shapes[start:end])})
        start = end


def _kinds(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    m = len(tensors) // 13
    return [tensors[a * m:b * m] for a, b in _PLACES]


class _AFWLayer(torch.autograd.Function):
    """Calls a backend's layer without a registered op between: compiled code takes the two ops."""

    @staticmethod
    def forward(ctx, served, settings, beside, rows, offsets, *tensors):
        m = len(tensors) // 13
        parameters = _fitting(served, tensors)
        *out, loss, state = _forward(served, settings, beside, rows, offsets, tensors[:m], parameters)
        cast = () if parameters[0] is tensors[m] else parameters
        ctx.set_materialize_grads(False)
        ctx.served, ctx.settings, ctx.kept = served, settings, (13 * m, len(cast))
        ctx.save_for_backward(rows, offsets, *tensors, *cast, *state)
        return *out, loss

    @staticmethod
    def backward(ctx, *grads):
        rows, offsets, *tensors = ctx.saved_tensors
        m, (own, cast) = len(grads) - 1, ctx.kept
        inputs = tensors[:own]
        if torch.is_grad_enabled():                             # create_graph=True: the library has no derivative, the algebra has all
            result = differentiable(inputs, offsets, ctx.settings, grads, rows)
        else:
            x, parameters, state = inputs[:m], tensors[own:own + cast] or inputs[m:], tensors[own + cast:]
            grad_out = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, x)]
            layer, grad_loss = backends.module("afw_layer", ctx.served), grads[m]
            counted = [rows] if _counts_rows(layer, rows) else []
            if rows is not None and not counted and grad_loss is not None:
                grad_loss = grad_loss / rows * x[0].shape[0]
            result = layer.backward(grad_out, grad_loss, x, offsets, parameters, state, *ctx.settings, *counted)
        return None, None, None, None, None, *result


def _forward(served, settings, beside, rows, offsets, x, parameters) -> list:
    """M outputs, the loss, and in a list what backward needs; with `rows` from a backend that can leave the others out."""
    m, layer = len(x), backends.module("afw_layer", served)
    if beside is not here and served == "triton":
        result = layer.forward(x, offsets, parameters, *settings, rows, beside)
    elif rows is None:
        result = layer.forward(x, offsets, parameters, *settings)
    else:
        result = layer.forward(x, offsets, parameters, *settings, rows)
        if not _counts_rows(layer, rows):
            result[m] = result[m] * x[0].shape[0] / rows
    return [*result[:m + 1], result[m + 1:]]


def _counts_rows(layer: ModuleType, rows: Tensor | None) -> bool:
    """Whether a backend's layer itself leaves out what lies beyond `rows`, whatever x is there."""
    return rows is not None and getattr(layer, "COUNTS_ROWS", False)


def _fitting(served: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The parameters as the backend takes them: as they are where that is possible, else in the dtype of x, cast all at once."""
    m = len(tensors) // 13
    dtype, parameters = tensors[0].dtype, tensors[m:]
    if backends.module("afw_layer", served).fits(dtype, parameters):
        return parameters
    flat = torch._C._nn.flatten_dense_tensors(parameters).to(dtype)
    return layout(tuple([t.shape[1] for t in tensors[:m]]), parameters[4 * m].numel()).views(flat)


def _in_torch(tensors, rows, offsets, ring, scale, beta, dropout, seed, gated_target, coefficient) -> list[Tensor]:
    """M outputs and the loss by the algebra in plain PyTorch."""
    x, proj_weight, proj_bias, map_weight, map_bias, phi_weight, phi_bias = _kinds([t.to(tensors[0].dtype) for t in tensors])
    out, target = tensor_ring_torch(x, offsets, *stacked(proj_weight, proj_bias), map_weight, map_bias, ring_rows(ring, len(x)), scale,
                                    beta, dropout, seed, gated_target)
    if rows is None:
        return [*out, attention_mapping_torch(x, target, phi_weight, phi_bias, coefficient)]
    outside = beyond(x[0], rows)
    x = [t.masked_fill(outside, 0.0) for t in x]
    loss = attention_mapping_torch(x, masked(target, phi_bias, rows), phi_weight, phi_bias, coefficient)
    return [*out, loss * x[0].shape[0] / rows]


def differentiable(inputs: Sequence[Tensor], offsets: Tensor, settings: Sequence, grads: Sequence[Tensor | None],
                   rows: Tensor | None = None) -> list[Tensor | None]:
    """The gradients of a layer's 13M tensors, with derivatives of their own."""
    return gradients_through(lambda *t: _in_torch(t, rows, offsets, *settings), inputs, grads)


def afw_layer(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
              map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], phi_weight: Sequence[Tensor], phi_bias: Sequence[Tensor], *,
              ring: Sequence[Sequence[int]], scale: float = 1.0, beta: float = 0.0, dropout: float = 0.0, seed: Tensor | None = None,
              gated_target: bool = False, reduction: str = "sum", with_loss: bool = True, rows: Tensor | None = None,
              backend: str = "auto", beside: Branch = here) -> tuple[list[Tensor], Tensor | None]:
    """A layer of AFW for M modalities: M outputs [N, D_j] and the feature loss, a 0-dimensional tensor, or None without with_loss.

    x: M tensors [N, D_j].  proj_weight, proj_bias: 4M tensors [R, D_j] and [R], the projections q1, q2, k1, k2 of modality 0, then of
    1, and so on.  map_weight [D_j, R * R], map_bias [D_j].  phi_weight [D_j, D_j], phi_bias [D_j]: the map of the loss.
    rows: int64 [], on the device of x: only so many rows count for the loss, whose means are over them; the others get no gradient from it.
    beside: from `linear.branch`; the loss may be read where that ends.
    Everything else, dtypes and errors: as in `tensor_ring` and `attention_mapping`, whose results these are up to rounding: where a backend
    takes float32 parameters beside x in 16 bits (`cpu`, `triton`), they are rounded no more than the product needs, and their gradients
    not at all.
    """
    plain = rows is None and not torch.compiler.is_compiling()
    arguments = (x, offsets, (proj_weight, proj_bias, map_weight, map_bias, phi_weight, phi_bias), ring, scale, beta, dropout, seed,
                 gated_target, reduction, with_loss)
    if plain and backend in ("auto", "cpu") and (found := node.afw_layer(*arguments)) is not None:
        return found
    check_layer(x, offsets, dropout)
    served = backends.choose("tensor_ring", x, backend, rank=proj_bias[0].shape[0])
    if plain and served == "cuda" and (found := node.cuda_afw_layer(*arguments, cuda.dtype_code(x[0].dtype))) is not None:
        return found
    tensors = [*x, *proj_weight, *proj_bias, *map_weight, *map_bias, *phi_weight, *phi_bias]
    if not torch.compiler.is_compiling():
        _check(x, tensors[len(x):], proj_bias[0].shape[0])
    if dropout == 0.0:
        seed = None
    elif seed is None and backend != "torch":               # from torch's generator: manual_seed governs the masks, on whatever device
        seed = torch.randint(2 ** 63 - 1, (1,), device=x[0].device)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    unmasked = rows is not None and served == "cpu"         # the library has no mask
    separate = served == "torch" or unmasked or (graph and not with_loss) or not backends.eager(tensors)
    if rows is not None and with_loss and (separate or not _counts_rows(backends.module("afw_layer", served), rows)):
        outside = beyond(x[0], rows)
        x = [t.masked_fill(outside, 0.0) for t in x]
        tensors[:len(x)] = x
    if separate:
        weight, bias = stacked(proj_weight, proj_bias)
        out, target = tensor_ring(x, offsets, weight, bias, map_weight, map_bias, ring=ring, scale=scale, beta=beta, dropout=dropout,
                                  seed=seed, gated_target=gated_target, with_target=with_loss, backend=backend)
        if not with_loss:
            return out, None
        return out, attention_mapping(x, target, phi_weight, phi_bias, reduction=reduction, rows=rows, backend=backend)
    settings = ([l for others in ring for l in others], scale, beta, dropout, seed, gated_target,
                coefficients(x, reduction) if with_loss else None)
    if graph:
        *out, loss = backends.apply(_AFWLayer, served, settings, beside, rows, offsets, *tensors)
        return out, loss
    if not with_loss:
        return backends.module("afw_layer", served).forward(x, offsets, _fitting(served, tensors), *settings), None
    *out, loss, _ = _forward(served, settings, beside, rows, offsets, x, _fitting(served, tensors))
    return out, loss
