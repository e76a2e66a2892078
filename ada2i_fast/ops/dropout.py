"""Counter-based dropout: which elements are kept is a function of a seed and their place, so backward recomputes it.

Philox4x32-10 (Salmon et al., SC 2011), key = the low and high 32 bits of the seed. The element in row n and column d of
stream j takes word d % 4 of the block with counter (d // 4, n low 32 bits, n high 32 bits, j) and is kept where that word,
as an unsigned integer, is at least round(p 2^32). Kept elements are multiplied by 1 / (1 - p).

Two fused forms, with the mask drawn where it is used and, with z = (mask / (1 - p)), per row of width d:

    relu_dropout             y = z max(0, x + b);            g_x = z g [y > 0]
    dropout_residual_norm    s = r + z (x + b),  n = (s - mean s) / sqrt(var s + eps),  y = w n + c
                             h = w g;  g_s = (h - mean h - n mean(h n)) / sqrt(var s + eps);  g_r = g_s,  g_x = z g_s

and the gradients of b, w and c are the sums over rows of g_x, g n and g.

x may be bfloat16 or float16 where the residual r, and with it y, is float32: so torch's autocast mixes them, with products in 16 bits
and a residual stream and LayerNorm in float32. Arithmetic, statistics and sums are float32 then (float64 for float64).
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends

__all__ = ["dropout_residual_norm", "gradients_through", "keep_mask", "philox_words", "relu_dropout", "threshold"]

_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Words below this value are dropped: round(p 2^32), at most 2^32 - 1."""
    return min(round(p * 2.0 ** 32), _LOW)


def keep_mask(seed: Tensor, stream: int, rows: int, width: int, p: float) -> Tensor:
    """bool [rows, width], True where the element is kept with probability 1 - p.

    seed: int64 scalar tensor or [1], on the device of the result. stream: a number below 2^32 that tells apart the
    tensors that share a seed (the modality's position).
    """
    return philox_words(seed, stream, range(rows), width) >= threshold(p)


def philox_words(seed: Tensor, stream: int, rows: range | int, width: int) -> Tensor:
    """The words of some rows: int64 [rows, width], or [width] for one row."""
    device = seed.device
    seed = seed.reshape(())
    blocks = -(-width // 4)
    first, count = (rows.start, len(rows)) if isinstance(rows, range) else (rows, 1)
    n = torch.arange(first, first + count, device=device)[:, None]
    d = torch.arange(blocks, device=device)[None, :]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    c0, c1, c2, c3 = torch.broadcast_tensors(d, n & _LOW, n >> 32, torch.full_like(n, stream))
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    words = torch.stack((c0, c1, c2, c3), dim=-1).reshape(count, 4 * blocks)[:, :width]
    return words if isinstance(rows, range) else words[0]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in 16-bit halves: int64 has no room for the product itself."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


# ----------------------------------------------------------------------------------------- the fused forms, in plain PyTorch


def _drop(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    if p == 0.0:
        return x
    if seed is None:
        return F.dropout(x, p)
    return x * keep_mask(seed, stream, *x.shape, p) * (1.0 / (1.0 - p))


def relu_dropout_torch(x, bias, p, seed, stream):
    return _drop(F.relu(x + bias), p, seed, stream).to(x.dtype)


def dropout_norm_torch(x, bias, residual, weight, norm_bias, p, eps, seed, stream):
    s = residual + _drop(x + bias, p, seed, stream)
    return F.layer_norm(s, x.shape[1:], weight.to(s.dtype), norm_bias.to(s.dtype), eps).to(residual.dtype)


# ------------------------------------------------------------------------------------------------------- the registered ops

_ops = torch.library.Library("ada2i_fast", "FRAGMENT")
_ops.define("relu_dropout_forward(Tensor x, Tensor bias, float p, Tensor? seed, int stream, str backend) -> Tensor")
_ops.define("relu_dropout_backward(Tensor grad_out, Tensor out, float p, str backend) -> Tensor[]")
_ops.define("""dropout_norm_forward(Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor norm_bias, float p, float eps,
    Tensor? seed, int stream, str backend) -> Tensor[]""")
_ops.define("""dropout_norm_backward(Tensor grad_out, Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor mean, Tensor rstd,
    float p, Tensor? seed, int stream, str backend) -> Tensor[]""")


def _relu_forward(x, bias, p, seed, stream, backend):
    return backends.module("dropout", backend).relu_forward(x, bias, p, seed, stream)


def _relu_backward(grad_out, out, p, backend):
    """Gradients of x and, in float32 or float64, of bias."""
    return backends.module("dropout", backend).relu_backward(grad_out, out, p)


def _norm_forward(x, bias, residual, weight, norm_bias, p, eps, seed, stream, backend):
    """out in the residual's dtype, and mean and 1 / sqrt(var + eps) of every row, [N], in float32 or float64."""
    return backends.module("dropout", backend).norm_forward(x, bias, residual, weight, norm_bias, p, eps, seed, stream)


def _norm_backward(grad_out, x, bias, residual, weight, mean, rstd, p, seed, stream, backend):
    """Gradients of x, bias, residual, weight, norm_bias."""
    return backends.module("dropout", backend).norm_backward(grad_out, x, bias, residual, weight, mean, rstd, p, seed, stream)


for _device in ("CPU", "CUDA"):
    _ops.impl("relu_dropout_forward", _relu_forward, _device)
    _ops.impl("relu_dropout_backward", _relu_backward, _device)
    _ops.impl("dropout_norm_forward", _norm_forward, _device)
    _ops.impl("dropout_norm_backward", _norm_backward, _device)


@torch.library.register_fake("ada2i_fast::relu_dropout_forward")
def _(x, bias, p, seed, stream, backend):
    return x.new_empty(x.shape)


@torch.library.register_fake("ada2i_fast::relu_dropout_backward")
def _(grad_out, out, p, backend):
    return [out.new_empty(out.shape), out.new_empty(out.shape[1:], dtype=backends.accumulator(out.dtype))]


@torch.library.register_fake("ada2i_fast::dropout_norm_forward")
def _(x, bias, residual, weight, norm_bias, p, eps, seed, stream, backend):
    return [residual.new_empty(x.shape), *(x.new_empty(x.shape[:1], dtype=backends.accumulator(x.dtype)) for _ in range(2))]


@torch.library.register_fake("ada2i_fast::dropout_norm_backward")
def _(grad_out, x, bias, residual, weight, mean, rstd, p, seed, stream, backend):
    return [t.new_empty(t.shape) for t in (x, bias, residual, weight, weight)]


# ------------------------------------------------------------------------------------------------------------------ autograd


def gradients_through(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None],
                      grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of function(*tensors) by torch and with derivatives of their own: for create_graph=True.

    The function sees views, so that what a tensor owes to another of them (x to the residual that it was computed from) is left to the
    graph that they come from, and does not count twice.
    """
    own = [t if t is None else t.view_as(t) for t in tensors]
    given = [(t, g) for t, g in zip(function(*own), grads) if g is not None]
    wanted = [t for t in own if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad([t for t, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in own]


class _ReluDropout(torch.autograd.Function):
    """Saves its output alone: an element of x mattered where the output is above 0, and nowhere else."""

    @staticmethod
    def forward(ctx, x, bias, p, seed, stream, backend):
        out = torch.ops.ada2i_fast.relu_dropout_forward(x, bias, p, seed, stream, backend)
        ctx.settings = (p, backend)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, = ctx.saved_tensors
        p, backend = ctx.settings
        if torch.is_grad_enabled():                             # piecewise linear: this is differentiable in all that it depends on
            g = grad * (out > 0) * (1.0 / (1.0 - p))
            return g, g.sum(0, dtype=backends.accumulator(g.dtype)), None, None, None, None
        return *torch.ops.ada2i_fast.relu_dropout_backward(grad, out, p, backend), None, None, None, None


class _DropoutNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, weight, norm_bias, p, eps, seed, stream, backend):
        out, mean, rstd = torch.ops.ada2i_fast.dropout_norm_forward(x, bias, residual, weight, norm_bias, p, eps, seed, stream, backend)
        ctx.settings = (p, eps, stream, backend)
        ctx.save_for_backward(x, bias, residual, weight, norm_bias, mean, rstd, seed)
        return out

    @staticmethod
    def backward(ctx, grad):
        *tensors, mean, rstd, seed = ctx.saved_tensors
        p, eps, stream, backend = ctx.settings
        if torch.is_grad_enabled():
            grads = gradients_through(lambda *t: [dropout_norm_torch(*t, p, eps, seed, stream)], tensors, [grad])
        else:
            grads = torch.ops.ada2i_fast.dropout_norm_backward(grad, *tensors[:4], mean, rstd, p, seed, stream, backend)
        return *grads, None, None, None, None, None


def _prepared(x: Tensor, p: float, seed: Tensor | None, backend: str) -> tuple[str, Tensor | None]:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability below 1, got {p}")
    if x.dim() != 2:
        raise ValueError(f"x: expected [N, d], got {list(x.shape)}")
    backend = backends.choose("dropout", [x], backend)
    if p == 0.0:
        seed = None
    elif seed is None and backend != "torch":
        seed = torch.randint(2 ** 63 - 1, (1,), device=x.device)
    return backend, seed


def relu_dropout(x: Tensor, bias: Tensor, *, p: float, seed: Tensor | None = None, stream: int = 0, backend: str = "auto") -> Tensor:
    """dropout(max(0, x + bias)). x: [N, d]; bias: [d]; p: probability of dropping; seed, stream: as in `keep_mask`, by default drawn
    from torch's generator. backend: "auto" | "torch" | "cpu" | "triton", see `ada2i_fast.backends`. Returns [N, d] in the
    dtype of x."""
    backend, seed = _prepared(x, p, seed, backend)
    backends.check_shapes(x, bias=(bias, (x.shape[1],)))
    if backend == "torch":
        return relu_dropout_torch(x, bias, p, seed, stream)
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        return _ReluDropout.apply(x, bias, p, seed, stream, backend)
    return torch.ops.ada2i_fast.relu_dropout_forward(x, bias, p, seed, stream, backend)


def dropout_residual_norm(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, *, p: float, eps: float = 1e-5,
                          seed: Tensor | None = None, stream: int = 0, backend: str = "auto") -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) over the width (Ba, Kiros, Hinton 2016).

    x: [N, d]; residual: [N, d], in the dtype of x or float32; bias, weight, norm_bias: [d]; the rest as in `relu_dropout`. Statistics in
    float32. Returns [N, d] in the dtype of the residual.
    """
    if residual.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"residual: expected {x.dtype} (that of x) or torch.float32, got {residual.dtype}")
    backend, seed = _prepared(x, p, seed, backend)
    along = (x.shape[1],)
    backends.check_shapes(x, bias=(bias, along), residual=(residual, x.shape), weight=(weight, along), norm_bias=(norm_bias, along))
    if backend == "torch":
        return dropout_norm_torch(x, bias, residual, weight, norm_bias, p, eps, seed, stream)
    tensors = (x, bias, residual, weight, norm_bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _DropoutNorm.apply(*tensors, p, eps, seed, stream, backend)
    return torch.ops.ada2i_fast.dropout_norm_forward(*tensors, p, eps, seed, stream, backend)[0]
