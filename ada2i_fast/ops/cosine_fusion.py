"""Adaptive modality weighting (eq. 8) on packed rows: joint logits, unimodal log-probabilities and the disparity ratio.

    cos_m = s  (h_m / |h_m|) . W_m / |W_m|  + b / M          W_m [D, C], |W_m| over classes (released) or features (published)
    joint = sum_m cos_m,        or  W [h_1; h_2; ..] + b  without AMW
    unimodal_m = h_m W_m + b / M  ("linear")  or  cos_m  ("cosine"),  without gradient
    s_m = sum_i softmax(unimodal_m)[i, y_i],     rho_m = s_m / min_j s_j

Norms below 1e-12 count as 1e-12, so a row of zeros has cosines of 0. With V = W / |W|, a_m = 1 / |h_m| and the gradient G of the joint
logits, everything that backward needs beside its inputs is |h_m|, a number per row:

    u_m = s a_m G V_m^T,      g_h_m = u_m - a_m^2 h_m (h_m . u_m)
    t_m = s (a_m h_m)^T G,    g_W_m = (t_m - V_m (V_m . t_m)) / |W_m|,      g_b = sum_n G

where V . t sums over the axis of |W|; where a norm is below 1e-12 the subtracted term is absent.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from .dropout import gradients_through

__all__ = ["cosine_fusion"]

NO_LABEL = -100      # ignore_index of torch's losses: a row without a score


def cosine_fusion_torch(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, labels: Tensor | None, amw: bool,
                        cosine_norm: str, scale: float, score_from: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The formula in plain PyTorch: any device, any number of derivatives."""
    count = len(hidden)
    weights = weight.chunk(count, dim=1)
    share = 0.0 if bias is None else bias / count
    axis = 0 if cosine_norm == "classes" else 1

    def cosines() -> list[Tensor]:
        return [scale * F.linear(F.normalize(h, dim=1), F.normalize(w, dim=axis)) + share for h, w in zip(hidden, weights)]

    if amw:
        fused = cosines()
        joint = torch.stack(fused).sum(0)
    else:
        fused = None
        joint = F.linear(torch.cat(list(hidden), dim=1), weight, bias)
    with torch.no_grad():
        if score_from == "cosine":
            unimodal = torch.stack([f.detach() for f in fused] if fused is not None else cosines())
        else:
            unimodal = torch.stack([F.linear(h, w) + share for h, w in zip(hidden, weights)])
        log_prob = F.log_softmax(unimodal, dim=2, dtype=backends.accumulator(unimodal.dtype))
        scores = ratio = None
        if labels is not None:
            without = labels == NO_LABEL
            given = log_prob.gather(2, labels.masked_fill(without, 0).expand(count, -1)[:, :, None]).exp()
            scores = given.masked_fill(without[:, None], 0.0).sum(dim=(1, 2))
            ratio = scores / scores.min()
    return joint, log_prob, scores, ratio


# ------------------------------------------------------------------------------------------------------- the registered ops

_ops = torch.library.Library("ada2i_fast", "FRAGMENT")
_ops.define("""cosine_fusion_forward(Tensor[] hidden, Tensor weight, Tensor? bias, Tensor? labels, bool amw, str cosine_norm,
    float scale, str score_from, str backend) -> Tensor[]""")
_ops.define("""cosine_fusion_backward(Tensor grad_joint, Tensor[] hidden, Tensor weight, Tensor norm, bool with_bias, bool amw,
    str cosine_norm, float scale, str backend) -> Tensor[]""")


def _forward(hidden, weight, bias, labels, amw, cosine_norm, scale, score_from, backend):
    """joint, log_prob and norms |h_m| [M, N]; with labels the scores and their ratio too."""
    return backends.module("cosine_fusion", backend).forward(hidden, weight, bias, labels, amw, cosine_norm, scale, score_from)


def _backward(grad_joint, hidden, weight, norm, with_bias, amw, cosine_norm, scale, backend):
    """Gradients of hidden, M of them, of weight and, with one, of bias."""
    return backends.module("cosine_fusion", backend).backward(grad_joint, hidden, weight, norm, with_bias, amw, cosine_norm, scale)


for _device in ("CPU", "CUDA"):
    _ops.impl("cosine_fusion_forward", _forward, _device)
    _ops.impl("cosine_fusion_backward", _backward, _device)


@torch.library.register_fake("ada2i_fast::cosine_fusion_forward")
def _(hidden, weight, bias, labels, amw, cosine_norm, scale, score_from, backend):
    (rows, _), classes, first = hidden[0].shape, weight.shape[0], hidden[0]
    precise = backends.accumulator(first.dtype)
    found = [first.new_empty((rows, classes)), first.new_empty((len(hidden), rows, classes), dtype=precise),
             first.new_empty((len(hidden), rows), dtype=precise)]
    return found if labels is None else found + [first.new_empty((len(hidden),), dtype=precise) for _ in range(2)]


@torch.library.register_fake("ada2i_fast::cosine_fusion_backward")
def _(grad_joint, hidden, weight, norm, with_bias, amw, cosine_norm, scale, backend):
    found = [*(h.new_empty(h.shape) for h in hidden), weight.new_empty(weight.shape)]
    return found + [weight.new_empty(weight.shape[:1])] if with_bias else found


# ------------------------------------------------------------------------------------------------------------------ autograd


class _CosineFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, amw, cosine_norm, scale, score_from, backend, labels, weight, bias, *hidden):
        joint, log_prob, norm, *of_labels = torch.ops.ada2i_fast.cosine_fusion_forward(
            hidden, weight, bias, labels, amw, cosine_norm, scale, score_from, backend)
        ctx.settings = (amw, cosine_norm, scale, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(log_prob, *of_labels)
        ctx.save_for_backward(weight, bias, norm, *hidden)
        return joint, log_prob, *of_labels

    @staticmethod
    def backward(ctx, grad_joint, *_):
        weight, bias, norm, *hidden = ctx.saved_tensors
        amw, cosine_norm, scale, backend = ctx.settings
        if grad_joint is None:
            return (None,) * (8 + len(hidden))
        if torch.is_grad_enabled():                             # create_graph=True: the ops have no derivative, the formula has
            grads = gradients_through(lambda *t: [cosine_fusion_torch(t[:-2], *t[-2:], None, amw, cosine_norm, scale, "linear")[0]],
                                      [*hidden, weight, bias], [grad_joint])
        else:
            grads = torch.ops.ada2i_fast.cosine_fusion_backward(grad_joint, hidden, weight, norm, bias is not None, amw, cosine_norm,
                                                                scale, backend)
            if bias is None:
                grads = [*grads, None]
        return None, None, None, None, None, None, *grads[-2:], *grads[:-2]


def cosine_fusion(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, labels: Tensor | None = None, *,
                  amw: bool = True, cosine_norm: str = "features", scale: float = 10.0, score_from: str = "cosine",
                  backend: str = "auto") -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Joint logits of M modalities and how well each does alone, see above.

    hidden: M tensors [N, D]; weight [C, M D], block m being W_m^T; bias [C] or None; labels int64 [N], 0 to C - 1 or -100 for a row
    without a score, or None.
    amw: cosines, or a linear map of the concatenation; cosine_norm "features" | "classes"; scale: s; score_from "cosine" | "linear".
    backend: "auto" | "torch" | "cpu" | "triton", see `ada2i_fast.backends`.

    Returns joint logits [N, C] in the dtype of hidden, to which weight and bias are cast; and without gradient, in float32 (float64
    for float64), unimodal log-probabilities [M, N, C], scores s [M] and their ratio rho [M] (None and None without labels; NaN for
    an empty batch). Sums are taken in float32 (float64 for float64); autocast has no say here.

    Raises ValueError where shapes, dtypes, devices or options do not fit. A label that is no class raises on the CPU; on other
    devices, which are not asked, Triton gives it the score 0.
    """
    if cosine_norm not in ("classes", "features"):
        raise ValueError(f"cosine_norm: expected 'classes' or 'features', got {cosine_norm!r}")
    if score_from not in ("linear", "cosine"):
        raise ValueError(f"score_from: expected 'linear' or 'cosine', got {score_from!r}")
    hidden = list(hidden)
    if not hidden or hidden[0].dim() != 2 or any(h.shape != hidden[0].shape for h in hidden):
        raise ValueError(f"hidden: expected one or more tensors [N, D] of one shape, got {[list(h.shape) for h in hidden]}")
    first = hidden[0]
    if any(h.dtype != first.dtype for h in hidden):
        raise ValueError(f"hidden: expected one dtype, got {[h.dtype for h in hidden]}")
    rows, width = first.shape
    if weight.dim() != 2 or weight.shape[1] != len(hidden) * width:
        raise ValueError(f"weight: expected [C, {len(hidden)} * {width}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}] or None, got {list(bias.shape)}")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != first.shape[:1]):
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"labels: expected int64 [{rows}] or None, got {kind} {list(labels.shape)}")
    for name, t in (*((f"hidden[{m}]", h) for m, h in enumerate(hidden)), ("weight", weight), ("bias", bias), ("labels", labels)):
        if t is not None and t.device != first.device:
            raise ValueError(f"{name}: expected a tensor on {first.device}, got one on {t.device}")
    if weight.dtype != first.dtype:
        weight = weight.to(first.dtype)
    if bias is not None and bias.dtype != first.dtype:
        bias = bias.to(first.dtype)
    backend = backends.choose("cosine_fusion", hidden, backend)
    if backend == "torch":
        with torch.autocast(first.device.type, enabled=False):
            return cosine_fusion_torch(hidden, weight, bias, labels, amw, cosine_norm, scale, score_from)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*hidden, weight, bias)):
        joint, log_prob, *of_labels = _CosineFusion.apply(amw, cosine_norm, scale, score_from, backend, labels, weight, bias, *hidden)
    else:
        joint, log_prob, _, *of_labels = torch.ops.ada2i_fast.cosine_fusion_forward(hidden, weight, bias, labels, amw, cosine_norm, scale,
                                                                                 score_from, backend)
    scores, ratio = of_labels or (None, None)
    return joint, log_prob, scores, ratio
