"""The head (eq. 9), log-probabilities and the losses of the labels (eq. 14) on packed rows.

    z = W_2 max(0, W_1 x + b_1) + b_2,  or  z = x  without a head          x: joint logits [N, C]; W_1 [I, C], W_2 [C, I]
    p = softmax(z),  q = softmax(x),  log_prob = log p
    loss = - sum_n log p[n, y_n] / K  (+ extra)  (- sum_n log q[n, y_n] / K  with a head)

over the K rows that have a label. With the gradients g of the loss and G of log_prob, e = onehot(y) and rows without a label dropped
from the first term,

    g_z = g / K (p - e) + G - p sum_c G,        g_h = (W_2^T g_z) [h > 0],      h = W_1 x + b_1
    g_x = W_1^T g_h + g / K (q - e),            or  g_z  without a head
    g_W_1 = g_h^T x,   g_b_1 = sum g_h,         g_W_2 = g_z^T max(0, h),        g_b_2 = sum g_z

Backward recomputes h and q; of log_prob and x it needs no more than they are.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from .dropout import gradients_through

__all__ = ["head_losses"]


def head_losses_torch(joint: Tensor, head: Sequence[Tensor], labels: Tensor | None, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The formula in plain PyTorch: any device, any number of derivatives; autocast has its say."""
    logits = joint
    if head:
        w_1, b_1, w_2, b_2 = head
        logits = F.linear(F.relu(F.linear(joint, w_1, b_1)), w_2, b_2)
    log_prob = F.log_softmax(logits, dim=1)
    if labels is None:
        return log_prob, None
    loss = F.nll_loss(log_prob, labels)
    if extra is not None:
        loss = loss + extra
    if head:
        loss = loss + F.cross_entropy(joint, labels)
    return log_prob, loss


# ------------------------------------------------------------------------------------------------------- the registered ops

_ops = torch.library.Library("ada2i_fast", "FRAGMENT")
_ops.define("""head_losses_forward(Tensor joint, Tensor[] head, Tensor? labels, Tensor? extra, ScalarType dtype,
    str backend) -> Tensor[]""")
_ops.define("""head_losses_backward(Tensor? grad_log_prob, Tensor? grad_loss, Tensor joint, Tensor[] head, Tensor? labels,
    Tensor log_prob, Tensor? count, str backend) -> Tensor[]""")


def _forward(joint, head, labels, extra, dtype, backend):
    """log_prob in `dtype`; with labels the loss and K, 0-dimensional, in float32 or float64."""
    return backends.module("head_losses", backend).forward(joint, head, labels, extra, dtype)


def _backward(grad_log_prob, grad_loss, joint, head, labels, log_prob, count, backend):
    """Gradients of joint and head. grad_loss, labels and count: all or none."""
    return backends.module("head_losses", backend).backward(grad_log_prob, grad_loss, joint, head, labels, log_prob, count)


for _device in ("CPU", "CUDA"):
    _ops.impl("head_losses_forward", _forward, _device)
    _ops.impl("head_losses_backward", _backward, _device)


@torch.library.register_fake("ada2i_fast::head_losses_forward")
def _(joint, head, labels, extra, dtype, backend):
    found = [joint.new_empty(joint.shape, dtype=dtype)]
    return found if labels is None else found + [joint.new_empty((), dtype=backends.accumulator(joint.dtype)) for _ in range(2)]


@torch.library.register_fake("ada2i_fast::head_losses_backward")
def _(grad_log_prob, grad_loss, joint, head, labels, log_prob, count, backend):
    return [t.new_empty(t.shape) for t in (joint, *head)]


# ------------------------------------------------------------------------------------------------------------------ autograd


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, backend, labels, extra, joint, *head):
        log_prob, *of_labels = torch.ops.ada2i_fast.head_losses_forward(joint, head, labels, extra, dtype, backend)
        loss, count = of_labels or (None, None)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(labels, extra, log_prob, count, joint, *head)
        return log_prob, loss

    @staticmethod
    def backward(ctx, grad_log_prob, grad_loss):
        labels, extra, log_prob, count, joint, *head = ctx.saved_tensors
        if grad_log_prob is None and grad_loss is None:
            return (None,) * (5 + len(head))
        if torch.is_grad_enabled():                             # create_graph=True: the ops have no derivative, the formula has
            def formula(extra, joint, *head):
                wide = backends.accumulator(joint.dtype)
                found, loss = head_losses_torch(joint.to(wide), [t.to(wide) for t in head], labels, extra)
                return found.to(log_prob.dtype), loss if loss is None else loss.to(wide)

            with torch.autocast(joint.device.type, enabled=False):
                grads = gradients_through(formula, [extra, joint, *head], [grad_log_prob, grad_loss])
            return None, None, None, *grads
        if grad_loss is None:
            labels = count = None
        grads = torch.ops.ada2i_fast.head_losses_backward(grad_log_prob, grad_loss, joint, head, labels, log_prob, count, ctx.backend)
        of_extra = None if extra is None or grad_loss is None else grad_loss.to(extra.dtype)
        return None, None, None, of_extra, *grads


def head_losses(joint: Tensor, head: Sequence[Tensor] | None = None, labels: Tensor | None = None, extra: Tensor | None = None, *,
                backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the classes and the loss of the labels, see above.

    joint: [N, C]; head: W_1 [I, C], b_1 [I], W_2 [C, I], b_2 [C], or None; labels: int64 [N], 0 to C - 1 or -100 for a row that does
    not count, or None; extra: [], a loss that is added (with labels), or None.
    backend: "auto" | "torch" | "triton", see `ada2i_fast.backends`.

    Returns log_prob [N, C] and loss [], None without labels and NaN where no row counts.

    "torch" is plain PyTorch, dtypes and autocast included. Triton, up to 32 classes and 1024 inner units: arithmetic and loss in float32
    whatever the dtypes, log_prob in float32 under autocast, else in the dtype of joint.

    Raises ValueError where shapes, dtypes or devices do not fit. A label that is no class raises on the CPU; on other devices, which are
    not asked, Triton makes the loss NaN.
    """
    if joint.dim() != 2:
        raise ValueError(f"joint: expected [N, C], got {list(joint.shape)}")
    rows, classes = joint.shape
    head = [] if head is None else list(head)
    if head:
        inner = head[0].shape[0] if head[0].dim() else 0
        shapes = [(inner, classes), (inner,), (classes, inner), (classes,)]
        if [tuple(t.shape) for t in head] != shapes:
            found = [list(t.shape) for t in head]
            raise ValueError(f"head: expected [I, {classes}], [I], [{classes}, I], [{classes}] or None, got {found}")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != joint.shape[:1]):
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"labels: expected int64 [{rows}] or None, got {kind} {list(labels.shape)}")
    if extra is not None and extra.dim():
        raise ValueError(f"extra: expected a tensor without dimensions or None, got {list(extra.shape)}")
    for name, t in (*((f"head[{j}]", t) for j, t in enumerate(head)), ("labels", labels), ("extra", extra)):
        if t is not None and t.device != joint.device:
            raise ValueError(f"{name}: expected a tensor on {joint.device}, got one on {t.device}")
    backend = backends.choose("head_losses", [joint, head[2]] if head else [joint], backend)
    if backend == "torch":
        return head_losses_torch(joint, head, labels, extra)
    if labels is None:
        extra = None
    dtype = torch.float32 if torch.is_autocast_enabled(joint.device.type) else joint.dtype
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (joint, *head, extra)):
        return _HeadLosses.apply(dtype, backend, labels, extra, joint, *head)
    log_prob, *of_labels = torch.ops.ada2i_fast.head_losses_forward(joint, head, labels, extra, dtype, backend)
    return log_prob, of_labels[0] if of_labels else None
