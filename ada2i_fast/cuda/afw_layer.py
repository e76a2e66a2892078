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

from . import attention_mapping, call, fill, prepare, tensor_ring

KINDS = (("proj_weight", 4), ("proj_bias", 4), ("map_weight", 1), ("map_bias", 1), ("phi_weight", 1), ("phi_bias", 1))


def fits(dtype: torch.dtype, parameters: Sequence[Tensor]) -> bool:
    """Whether parameters are taken as they are."""
    return True


@functools.lru_cache(maxsize=64)
def _layout(widths: tuple[int, ...], rank: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Shapes of the 12M parameters, and where each begins, in elements, when they lie one after the other; and where the last one ends."""
    shapes = [*((rank, d) for d in widths for _ in range(4)), *[(rank,)] * (4 * len(widths)), *((d, rank * rank) for d in widths),
              *((d,) for d in widths), *((d, d) for d in widths), *((d,) for d in widths)]
    return shapes, [0, *itertools.accumulate([torch.Size(shape).numel() for shape in shapes])]


def _checked(parameters: Sequence[Tensor], like: Tensor, shapes: list[tuple[int, ...]]) -> None:
    """ValueError, with the argument's name, unless parameters have these shapes."""
    device = like.device
    if [t.shape for t in parameters] == shapes and all([t.device == device for t in parameters]):
        return
    if len(parameters) != len(shapes):
        raise ValueError(f"parameters: expected {len(shapes)} tensors, got {len(parameters)}")
    names = [f"{name}[{i}]" for name, count in KINDS for i in range(count * len(shapes) // 12)]
    for name, t, shape in zip(names, parameters, shapes):
        if t.shape != shape or t.device != device:
            raise ValueError(f"{name}: expected {list(shape)} on {device}, got {list(t.shape)} on {t.device}")


def _one_dtype(parameters: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return all([t.dtype == dtype for t in parameters])


def _addresses(parameters: Sequence[Tensor], flat: Tensor, starts: Sequence[int], alive: list) -> list[int]:
    """Of the 12M parameters: in flat, but in their own tensors where flat holds the projections alone."""
    base, size, m = flat.data_ptr(), flat.element_size(), len(parameters) // 12
    if flat.numel() == starts[-1]:
        return [base + start * size for start in starts[:-1]]
    own = [t if t.is_contiguous() else t.contiguous() for t in parameters[8 * m:]]
    alive += own
    return [*[base + start * size for start in starts[:8 * m]], *[t.data_ptr() for t in own]]


def _places(sizes: Sequence[int]) -> list[int]:
    """Where pieces of so many bytes begin, aligned as torch aligns tensors, and where the last one ends."""
    return [0, *itertools.accumulate([(n + 511) // 512 * 512 for n in sizes])]


def _state_places(x: Sequence[Tensor], dialogues: int, rank: int) -> list[int]:
    """Where in the state each modality's projections, averages, attentions and signs begin, kind by kind, and where it ends; in bytes."""
    m, rows, size, elements = len(x), x[0].shape[0], x[0].element_size(), [t.numel() for t in x]
    return _places([*[4 * rank * rows * size] * m, *[4 * dialogues * rank * rank] * m, *[n * size for n in elements], *elements])


def forward(x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float,
            seed: Tensor | None, gated_target: bool, coefficient: Sequence[float] | None) -> list[Tensor]:
    """M outputs; with coefficients the loss too, and what `backward` takes from here. parameters: 12M tensors as in `ops.afw_layer`."""
    m, rank, first = len(x), parameters[4 * len(x)].shape[0], x[0]
    args, alive = tensor_ring.arguments(x, offsets, rank, ring, scale, beta, dropout, seed, gated_target and coefficient is not None)
    x = alive[:m]
    shapes, starts = _layout(tuple([t.shape[1] for t in x]), rank)
    _checked(parameters, first, shapes)
    flat = torch._C._nn.flatten_dense_tensors(parameters[:8 * m] if _one_dtype(parameters, first.dtype) else parameters).to(first.dtype)
    given = _addresses(parameters, flat, starts, alive)
    out = [torch.empty_like(t) for t in x]
    *places, end = _state_places(x, args.dialogues, rank)
    state = first.new_empty(end, dtype=torch.uint8)
    proj, average, attention, sign = _kinds(state, places)
    fill(args, proj_weight=given[:4 * m:4], proj_bias=given[4 * m:8 * m:4], map_weight=given[8 * m:9 * m], map_bias=given[9 * m:10 * m],
         proj=proj, average=average, attention=attention, out=out)
    if coefficient is None:
        call("tensor_ring_forward", args, first)
        return out
    target = attention
    if gated_target:
        target = [torch.empty_like(t) for t in x]
        fill(args, target=target)
    loss = first.new_empty((), dtype=torch.float32)
    mapping = attention_mapping.arguments(x, coefficient)
    fill(mapping, x=x, target=target, weight=given[10 * m:11 * m], bias=given[11 * m:], sign=sign)
    mapping.loss = loss.data_ptr()
    call("tensor_ring_forward", args, first)
    call("attention_mapping_forward", mapping, first)
    return [*out, loss, flat, state]


def _kinds(state: Tensor, places: Sequence[int]) -> list[list[int]]:
    """Addresses, kind by kind."""
    base, m = state.data_ptr(), len(places) // 4
    addresses = [base + place for place in places]
    return [addresses[i * m:(i + 1) * m] for i in range(4)]


def backward(grad_out: Sequence[Tensor], grad_loss: Tensor | None, x: Sequence[Tensor], offsets: Tensor, parameters: Sequence[Tensor],
             state: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float, dropout: float, seed: Tensor | None, gated_target: bool,
             coefficient: Sequence[float]) -> list[Tensor | None]:
    """Gradients of x and of the parameters, in their dtypes; None for those of Phi without grad_loss. state: what `forward` returned last."""
    m, rank, first, (flat, state) = len(x), parameters[4 * len(x)].shape[0], x[0], state
    args, alive = tensor_ring.arguments(x, offsets, rank, ring, scale, beta, dropout, seed, gated_target)
    x, size = alive[:m], first.element_size()
    shapes, starts = _layout(tuple([t.shape[1] for t in x]), rank)
    _checked(parameters, first, shapes)
    given = _addresses(parameters, flat, starts, alive)
    grad_out = prepare("grad_out", grad_out, first, [t.shape for t in x])
    *places, end = _state_places(x, args.dialogues, rank)
    if state.numel() != end:
        raise ValueError(f"state: expected {end} bytes, got {state.numel()}")
    proj, average, attention, sign = _kinds(state, places)

    wanted = parameters if grad_loss is not None else parameters[:10 * m]
    grads = first.new_empty(starts[len(wanted)])
    to = [grads.data_ptr() + start * size for start in starts]
    *rows, end = [place // size for place in _places([t.numel() * size for t in x])]
    grad_x = first.new_empty(end)
    fill(args, proj_weight=given[:4 * m:4], map_weight=given[8 * m:9 * m], proj=proj, average=average, attention=attention,
         grad_out=grad_out, grad_x=[grad_x.data_ptr() + row * size for row in rows], grad_proj_weight=to[:4 * m:4],
         grad_proj_bias=to[4 * m:8 * m:4], grad_map_weight=to[8 * m:9 * m], grad_map_bias=to[9 * m:10 * m])
    if grad_loss is not None:
        grad_loss, = prepare("grad_loss", [grad_loss], first, [()], torch.float32)
        grad_target, also_x = first.new_empty(end), first.new_empty(end)
        targets = [grad_target.data_ptr() + row * size for row in rows]
        mapping = attention_mapping.arguments(x, coefficient)
        fill(mapping, x=x, weight=given[10 * m:11 * m], sign=sign, grad_x=[also_x.data_ptr() + row * size for row in rows],
             grad_target=targets, grad_weight=to[10 * m:11 * m], grad_bias=to[11 * m:12 * m])
        mapping.grad_loss = grad_loss.data_ptr()
        call("attention_mapping_backward", mapping, first)
        fill(args, grad_target=targets)
    call("tensor_ring_backward", args, first)
    if grad_loss is not None:
        grad_x.add_(also_x)
    dtype = parameters[0].dtype
    found = torch._C._nn.unflatten_dense_tensors(grads if grads.dtype == dtype else grads.to(dtype), wanted)
    return [*[grad_x.as_strided(t.shape, (t.shape[1], 1), row) for t, row in zip(x, rows)],
            *[g if g.dtype == t.dtype else g.to(t.dtype) for g, t in zip(found, wanted)], *[None] * (len(parameters) - len(wanted))]
