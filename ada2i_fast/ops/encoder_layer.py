"""Post-norm Transformer layers (Vaswani et al. 2017) on packed rows: the layers of the encoders (eq. 2).

    y = norm1(x + drop(attention(x W_qkv^T + b_qkv) W_o^T + b_o))
    z = norm2(y + drop(drop(max(0, y W_1^T + b_1)) W_2^T + b_2))

with `linear` for the products, `dialogue_attention`, and `dropout_residual_norm` and `relu_dropout` of `dropout` for the rest. The masks of
layer i take the streams from s = stream + i (h + 3) on: s .. s + h - 1 the weights of the h heads, s + h, s + h + 1 and s + h + 2 the outer,
the inner and the last dropout.

Gradients, with g_s, g_a those that `dropout_residual_norm` has of its residual and of what it drops:

    g_y, g_a  of norm2;   g_inner = g_a W_2;   g_u = (relu_dropout's) g_inner;   g_y += g_u W_1
    g_x, g_a  of norm1;   g_mixed = g_a W_o;   g_qkv = (attention's) g_mixed;    g_x += g_qkv W_qkv

On a CPU `node` takes an encoder in one call, where that is there and everything is plain; what follows is for all that it declines.

A layer is one node of the graph that calls the backend without registered ops between, on a CPU one that is not large: the same numbers, on
a CPU to the last bit. With small batches what Python and autograd cost between the ops is as much as the arithmetic. On a CPU the library's
calls of all layers, and those of one layer's gradients, happen `together` as far as they can, and the inner product with its ReLU and dropout is
one pass where it is the library's own, in bf16 with a rounding less than the ops of these names. On CUDA a layer's weights are rounded for
autocast by one launch (`_Weights`), LayerNorm writes its result rounded too, for the product that follows, and the gradients of weights are a `branch`.
"""

from __future__ import annotations

import contextlib
from typing import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends, cpu, node
from .dialogue_attention import DialogueOffsets, check_sizes, dialogue_attention
from .dropout import dropout_residual_norm, gradients_through, relu_dropout
from .linear import KEPT, Branch, branch, here, linear, planned, product_backward, product_dtype, product_forward

__all__ = ["encoder_layer", "encoder_layers"]

# Multiply-adds of W_qkv from which a layer is taken op by op: what a node saves is less than 1 % of its time then, and a node holds all that it
# makes until it ends, the gradients of its weights among it, which could be added to what they accumulate in one by one.
_LARGE = 1 << 29


def _as_forward(device: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast as it was where products were in this dtype."""
    mixed = dtype != torch.float32
    return torch.autocast(device, dtype if mixed else None, enabled=mixed)


class _Inner(torch.autograd.Function):
    """`_inner` as one node, without registered ops."""

    @staticmethod
    def forward(ctx, x, weight, bias, p, seed, stream, dtype, backend):
        inner, kept = product_forward(x, weight, bias, False, dtype, dropout=(p, seed, stream, backend))
        ctx.settings = (p, stream, dtype, backend)
        ctx.save_for_backward(seed, bias, inner, *kept)
        return inner

    @staticmethod
    def backward(ctx, grad):
        seed, bias, inner, *kept = ctx.saved_tensors
        p, stream, dtype, backend = ctx.settings
        device = grad.device.type
        if torch.is_grad_enabled():                             # create_graph=True
            with _as_forward(device, dtype):
                grads = gradients_through(
                    lambda *t: [relu_dropout(linear(*t[:2]), t[2], p=p, seed=seed, stream=stream, backend=backend)], (*kept[:2], bias), [grad])
        else:
            ctx.maybe_clear_saved_tensors()                     # unless retain_graph: the result is not needed while the product's gradients are made
            with torch.autocast(device, enabled=False):
                g, grad_bias = backends.module("dropout", backend).relu_backward(grad, inner, p)
                del inner
                grads = [*product_backward(g, kept, *ctx.needs_input_grad[:2], False, None)[:2], grad_bias.to(bias.dtype)]
        return *grads, None, None, None, None, None


def _inner(x: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor | None, stream: int, product: str, backend: str) -> Tensor:
    """drop(max(0, x W^T + b)), on a CPU in one pass where the product is this package's own. product, backend: those of its parts."""
    dtype = product_dtype(x, weight, None) if product != "torch" and backend == "cpu" and backends.eager((x, weight, bias)) else None
    if dtype is None:
        return relu_dropout(linear(x, weight, backend=product), bias, p=p, seed=seed, stream=stream, backend=backend)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _Inner.apply(x, weight, bias, p, seed, stream, dtype, backend)
    return product_forward(x, weight, bias, False, dtype, dropout=(p, seed, stream, backend))[0]


def _attended(x: Tensor, parameters: Sequence[Tensor], lengths: Sequence[int] | DialogueOffsets, heads: int, p: float, eps: float,
              seed: Tensor | None, stream: int, attention: str, dropout: str, product: str) -> Tensor:
    """y, op by op. parameters: the six up to norm1. The last three: backends of the parts."""
    qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, norm_bias = parameters
    qkv = linear(x, qkv_weight, qkv_bias, backend=product)
    mixed = dialogue_attention(qkv, lengths, heads, dropout=p, seed=None if attention == "torch" else seed, stream=stream, backend=attention)
    if dropout == "torch":
        y = F.dropout(linear(mixed, out_weight, out_bias, backend=product), p)
        return F.layer_norm(x + y, norm_weight.shape, norm_weight, norm_bias, eps)
    return dropout_residual_norm(linear(mixed, out_weight, backend=product), out_bias, x, norm_weight, norm_bias, p=p, eps=eps, seed=seed,
                                 stream=stream + heads, backend=dropout)


def _fed_forward(y: Tensor, parameters: Sequence[Tensor], p: float, eps: float, seed: Tensor | None, stream: int, dropout: str,
                 product: str) -> Tensor:
    """z, op by op. parameters: the six from W_1 on. stream: that of the inner dropout."""
    weight1, bias1, weight2, bias2, norm_weight, norm_bias = parameters
    if dropout == "torch":
        inner = F.dropout(linear(y, weight1, bias1, relu=True, backend=product), p)
        z = F.dropout(linear(inner, weight2, bias2, backend=product), p)
        return F.layer_norm(y + z, norm_weight.shape, norm_weight, norm_bias, eps)
    inner = _inner(y, weight1, bias1, p, seed, stream, product, dropout)
    return dropout_residual_norm(linear(inner, weight2, backend=product), bias2, y, norm_weight, norm_bias, p=p, eps=eps, seed=seed,
                                 stream=stream + 1, backend=dropout)


def _chain(x: Tensor, lengths: Sequence[int] | DialogueOffsets, parameters: Sequence[Tensor], heads: int, p: float, eps: Sequence[float],
           seed: Tensor | None, stream: int, attention: str, dropout: str, product: str) -> Tensor:
    """One layer, op by op: any device, any number of derivatives, and what compiled code takes. The last three: backends of the parts."""
    y = _attended(x, parameters[:6], lengths, heads, p, eps[0], seed, stream, attention, dropout, product)
    return _fed_forward(y, parameters[6:], p, eps[1], seed, stream + heads + 1, dropout, product)


def _differentiable(function: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype, grad: Tensor) -> list[Tensor | None]:
    """The gradients of the tensors that a function takes, with derivatives of their own: a backend has none, the ops have all."""
    with _as_forward(grad.device.type, dtype):
        return gradients_through(lambda x, *parameters: [function(x, parameters)], tensors, [grad])


def differentiable_attention(tensors, lengths, heads, p, eps, seed, stream, dtype, grad) -> list[Tensor | None]:
    """For the first half of a layer by `node`: x and six parameters."""
    return _differentiable(lambda x, t: _attended(x, t, lengths, heads, p, eps, seed, stream, "cpu", "cpu", "auto"), tensors, dtype, grad)


def differentiable_inner(tensors, lengths, heads, p, eps, seed, stream, dtype, grad) -> list[Tensor | None]:
    """For the second one."""
    return _differentiable(lambda y, t: _fed_forward(y, t, p, eps, seed, stream, "cpu", "auto"), tensors, dtype, grad)


# -------------------------------------------------------------------------------------------------------------- one node


class _Weights:
    """What the products of layers read, W_qkv, b_qkv, W_o, W_1 and W_2, and behind them what `out` reads, rounded to their dtype: a launch for a
    layer, or, in a CUDA graph, beside what runs before they are needed."""

    def __init__(self, layers: Sequence[Sequence[Tensor]], out: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._tensors = [[layer[place] for place in (0, 1, 2, 6, 8)] for layer in layers] + [out]
        self._ready: list[list[Tensor]] = [[] for _ in self._tensors]

    def round(self, i: int, upto: int | None = None, beside: Branch | None = None) -> None:
        """Of layer i the tensors before place `upto`, but for those that are there: one launch, or with `beside` one for each."""
        ready = self._ready[i]
        missing = self._tensors[i][len(ready):upto]
        if missing:
            ready += self._rounded(*missing) if beside is None else beside(self._rounded_one_by_one, *missing)

    def _rounded(self, *tensors: Tensor) -> list[Tensor]:
        found = [torch.empty_like(t, dtype=self._dtype) for t in tensors]
        torch._foreach_copy_(found, tensors)
        return found

    def _rounded_one_by_one(self, *tensors: Tensor) -> list[Tensor]:
        """More launches, which cost a graph little, of many more threads."""
        return [t.to(self._dtype) for t in tensors]

    def take(self, i: int) -> list[Tensor]:
        self.round(i)
        ready, self._ready[i] = self._ready[i], []
        return ready


def _forward(x, parameters, where, heads, p, eps, seed, stream, dtype, backend, weights=None, i=0, rounded=None):
    """z, z in `dtype` where LayerNorm writes that too, else None, and what `_backward` takes beside x and the parameters.

    where: the dialogues, as the backend takes them.  dtype: of the products.  weights, i: the layers', and the place of this one among them,
    on CUDA where `dtype` is not that of x.  rounded: x in it, if it is there.
    """
    attention, fused = backends.module("dialogue_attention", backend), backends.module("dropout", backend)
    qkv_weight, qkv_bias, out_weight, out_bias, norm1_weight, norm1_bias, weight1, bias1, weight2, bias2, norm2_weight, norm2_bias = parameters
    own = [None] * 5
    twice = {}
    with branch(x.device) as beside:
        if weights is not None:
            if beside is not here:
                weights.round(i, 2, here)
                weights.round(i, None, beside)
            own, twice = weights.take(i), {"rounded": dtype}
        qkv, kept_qkv = product_forward(x, qkv_weight, qkv_bias, False, dtype, (rounded, *own[:2]))
        mixed, logsum = attention.forward(qkv, where, heads, p, seed, stream)
    stream += heads
    with branch(x.device) as beside:
        if weights is not None and beside is not here:
            weights.round(i + 1, None, beside)
        outer, kept_out = product_forward(mixed, out_weight, None, False, dtype, (None, own[2], None))
        y, mean1, rstd1, *rounded = fused.norm_forward(outer, out_bias, x, norm1_weight, norm1_bias, p, eps[0], seed, stream, **twice)
        inner, kept_1 = product_forward(y, weight1, bias1, False, dtype, (rounded[0] if rounded else None, own[3], None),
                                        (p, seed, stream + 1, backend))
        last, kept_2 = product_forward(inner, weight2, None, False, dtype, (None, own[4], None))
        z, mean2, rstd2, *rounded = fused.norm_forward(last, bias2, y, norm2_weight, norm2_bias, p, eps[1], seed, stream + 2, **twice)
    return z, rounded[0] if rounded else None, (*kept_qkv, qkv, mixed, logsum, *kept_out, outer, mean1, rstd1, *kept_1, inner, *kept_2, last,
                                                y, mean2, rstd2)


def _backward(grad, needs, saved, where, heads, p, seed, stream, backend, beside):
    """Gradients of x and the parameters, None from where on no gradient is needed.

    needs: of each.  saved: a list of x, the parameters and what `_forward` gave, which this takes apart from its end, so that what has
    served is free for what is still to come.  beside: from `branch`, for the gradients of parameters.
    """
    attention, fused = backends.module("dialogue_attention", backend), backends.module("dropout", backend)
    sums = {"beside": beside} if grad.is_cuda else {}
    x, _, qkv_bias, _, out_bias, norm1_weight, _, _, _, _, bias2, norm2_weight, _ = saved[:13]

    def taken(number: int) -> list[Tensor | None]:
        part = saved[-number:]
        del saved[-number:]
        return part

    found: list[Tensor | None] = [None] * 13
    last, y, *moments = taken(4)
    g, found[10], g_y, found[11], found[12] = fused.norm_backward(grad, last, bias2, y, norm2_weight, *moments, p, seed, stream + heads + 2, **sums)
    del last, y
    g, found[9], _ = product_backward(g, taken(KEPT), any(needs[:9]), needs[9], False, None, None, beside)
    if g is None:
        return found
    g, found[8] = fused.relu_backward(g, *taken(1), p, **sums)
    g, found[7], _ = product_backward(g, taken(KEPT), any(needs[:7]), needs[7], False, None, g_y, beside)
    if g is None:
        return found
    outer, *moments = taken(3)
    g, found[4], g_x, found[5], found[6] = fused.norm_backward(g, outer, out_bias, x, norm1_weight, *moments, p, seed, stream + heads, **sums)
    del outer, g_y
    g, found[3], _ = product_backward(g, taken(KEPT), any(needs[:3]), needs[3], False, None, None, beside)
    if g is None:
        return found
    g = attention.backward(g, *taken(3), where, heads, p, seed, stream)
    found[:3] = product_backward(g, taken(KEPT), *needs[:3], qkv_bias.dtype, g_x, beside)
    return found


class _EncoderLayer(torch.autograd.Function):
    """Returns z, and z as the next layer's products take it, without a gradient, or None."""

    @staticmethod
    def forward(ctx, lengths, state, settings, x, *parameters):
        z, twice, kept = _forward(x, parameters, *settings, *state)
        ctx.settings = (lengths, *settings)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parameters, *kept)
        if twice is not None:
            ctx.mark_non_differentiable(twice)
        return z, twice

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 16
        lengths, where, heads, p, eps, seed, stream, dtype, backend = ctx.settings
        saved, device = [*ctx.saved_tensors], grad.device
        if torch.is_grad_enabled():                             # create_graph=True
            return None, None, None, *_differentiable(
                lambda x, t: _chain(x, lengths, t, heads, p, eps, seed, stream, backend, backend, "auto"), saved[:13], dtype, grad)
        ctx.maybe_clear_saved_tensors()                         # unless retain_graph: a layer's gradients take as much as it saved
        autocast = torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else contextlib.nullcontext()
        with autocast, cpu.together() if backend == "cpu" else contextlib.nullcontext(), branch(device) as beside:
            found = _backward(grad, ctx.needs_input_grad[3:], saved, where, heads, p, seed, stream, backend, beside)
        return None, None, None, *found


def plan(dtype: torch.dtype, rows: int, width: int, inside: int, outputs: int, gradients: bool) -> tuple[int, ...] | None:
    """`linear.planned` for W_qkv, W_o, W_1, W_2 and, unless outputs is 0, what `out` brings."""
    shapes = ((width, 3 * width, True), (width, width, False), (width, inside, False), (inside, width, False), (width, outputs, True))
    return planned(dtype, rows, shapes[:5 if outputs else 4], gradients)


# ----------------------------------------------------------------------------------------------------------- the functions


def encoder_layers(x: Tensor, lengths: Sequence[int] | DialogueOffsets, layers: Sequence[Sequence[Tensor]], *, heads: int, p: float = 0.0,
                   eps: Sequence[Sequence[float]] | None = None, seed: Tensor | None = None, stream: int = 0,
                   out: tuple[Tensor, Tensor] | None = None, backend: str = "auto") -> Tensor:
    """Layer after layer, then `linear` with the weight and bias `out`, if there are any. Returns [N, d] in the dtype of x, or what `linear` does.

    x: [N, d].  lengths: as in `dialogue_attention`.  layers: for each its twelve parameters in the order of the equations, W_qkv [3 d, d],
    b_qkv [3 d], W_o [d, d], b_o [d], weight and bias [d] of norm1, W_1 [f, d], b_1 [f], W_2 [d, f], b_2 [d], weight and bias [d] of norm2.
    heads: h, a divisor of d.  p: probability of dropping.  eps: for each layer those of norm1 and norm2, by default 1e-5.
    seed, stream: as in `dropout.keep_mask`, by default drawn from torch's generator.

    backend: "torch" is plain PyTorch, whose masks come from torch's generator; with "auto" each part takes the best there is; a name is
    passed on to attention and dropout, which raise where it cannot serve. Under autocast the products and their results are in its
    dtype; x, z and the statistics keep the dtype of x. Gradients come in the dtypes of what they belong to.
    """
    if backend == "auto" and not torch.compiler.is_compiling():
        found = node.encoder_layers(x, lengths, layers, heads, p, eps, seed, stream, out)
        if found is not None:
            return found
    if x.dim() != 2:
        raise ValueError(f"x: expected [N, d], got {list(x.shape)}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability below 1, got {p}")
    for i, parameters in enumerate(layers):
        _check(x, parameters, i)
    attention = dropout = backend
    if backend == "auto":
        device, dtype = x.device.type, x.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        attention, dropout = [backends.best(op, device, dtype, x.shape[1]) for op in ("dialogue_attention", "dropout")]
    if p == 0.0:
        seed = None
    elif seed is None and (attention, dropout) != ("torch", "torch"):
        seed = torch.randint(2 ** 63 - 1, (1,), device=x.device)
    own = attention == dropout != "torch" and backends.eager([x, *(t for parameters in layers for t in parameters)])
    dtype = _one_node(x, layers, dropout) if own else None
    if dtype is not None:
        if dropout == "cpu":
            lengths = lengths.offsets.diff().tolist() if isinstance(lengths, DialogueOffsets) else list(lengths)
        on_device = isinstance(lengths, DialogueOffsets)
        check_sizes(x.shape[0], 3 * x.shape[1], None if on_device else lengths, heads)
        where = backends.module("dialogue_attention", "cpu").starts(lengths) if dropout == "cpu" else lengths.offsets if on_device else list(lengths)
    rounded = None
    weights = None
    if dtype is not None and x.is_cuda and dtype != x.dtype:
        weights = _Weights(layers, out or (), dtype)
    # Calls that wait hold what they take and give: without gradients more than is needed, too much where layers are large.
    waiting = dropout == "cpu" and (dtype is not None or own and torch.is_grad_enabled())
    with cpu.together() if waiting else contextlib.nullcontext():
        for i, parameters in enumerate(layers):
            norms, at = (1e-5, 1e-5) if eps is None else eps[i], stream + i * (heads + 3)
            if dtype is None:
                x = _chain(x, lengths, parameters, heads, p, norms, seed, at, attention, dropout, "torch" if backend == "torch" else "auto")
                continue
            settings = (where, heads, p, norms, seed, at, dtype, dropout)
            if torch.is_grad_enabled() and (x.requires_grad or any([t.requires_grad for t in parameters])):
                x, rounded = backends.apply(_EncoderLayer, lengths, (weights, i, rounded), settings, x, *parameters)
            else:
                x, rounded, _ = _forward(x, parameters, *settings, weights, i, rounded)
    if out is None:
        return x
    of_products = (None,) * 3 if weights is None else (rounded, *weights.take(len(layers)))
    return linear(x, *out, backend="torch" if backend == "torch" else "auto", rounded=of_products)


_NAMES = ("qkv_weight", "qkv_bias", "out_weight", "out_bias", "norm1_weight", "norm1_bias", "weight1", "bias1", "weight2", "bias2",
          "norm2_weight", "norm2_bias")


def _check(x: Tensor, parameters: Sequence[Tensor], i: int) -> None:
    """ValueError unless those of layer i fit x."""
    if len(parameters) != 12:
        raise ValueError(f"layers[{i}]: expected 12 parameters, got {len(parameters)}")
    d, f = x.shape[1], parameters[6].shape[0]
    shapes = [(3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (f, d), (f,), (d, f), (d,), (d,), (d,)]
    if [t.shape for t in parameters] != shapes:
        backends.check_shapes(x, **{f"layers[{i}] {name}": pair for name, *pair in zip(_NAMES, parameters, shapes)})


def _one_node(x: Tensor, layers: Sequence[Sequence[Tensor]], backend: str) -> torch.dtype | None:
    """The products' dtype where eager layers can be a node each; None where they cannot."""
    if x.numel() == 0 or backend == "cpu" and 3 * x.numel() * x.shape[1] >= _LARGE:
        return None
    device, dtypes = x.device.type, {x.dtype, *(t.dtype for parameters in layers for t in parameters)}
    if not torch.is_autocast_enabled(device):
        return torch.float32 if dtypes == {torch.float32} else None
    dtype = torch.get_autocast_dtype(device)
    return dtype if dtypes <= {torch.float32, torch.bfloat16, torch.float16} and x.dtype in (dtype, torch.float32) else None


def encoder_layer(x: Tensor, lengths: Sequence[int] | DialogueOffsets, *parameters: Tensor, eps: Sequence[float] = (1e-5, 1e-5),
                  **options) -> Tensor:
    """One of them. parameters: the twelve; everything else as in `encoder_layers`."""
    return encoder_layers(x, lengths, [parameters], eps=[eps], **options)
