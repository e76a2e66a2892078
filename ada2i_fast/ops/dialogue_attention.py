"""Self-attention inside each dialogue of a packed batch (Vaswani et al. 2017): rows attend to rows of their own dialogue.

    W[n, n'] = softmax_{n' in dialogue(n)} (q_h[n] . k_h[n'] / sqrt(d_h)),    out[n] = concat_h  sum_{n'}  z W[n, n']  v_h[n']

with z the dropout mask / (1 - p). Forward keeps of the scores S of a row and head their maximum m and l = log sum exp(S - m), apart, and
backward computes W = exp(S - m - l) again: the difference of large scores is exact, where log sum exp S = m + l would be rounded
to its own size.

    g_v = (z W)^T g,   G = z (g v^T),   g_S = W * (G - g . out) / sqrt(d_h),   g_q = g_S k,   g_k = g_S^T q

The mask of head h is that of `ops.dropout` for stream + h: row n of the batch, column = the place of n' in its dialogue.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from .dropout import philox_words, threshold

__all__ = ["DialogueOffsets", "dialogue_attention"]


class DialogueOffsets(NamedTuple):
    """Lengths that stand on the device: dialogue b owns rows offsets[b] : offsets[b + 1] (int64 [B + 1]), of which there are at most
    `longest`. With them the launches of an op depend on B, `longest` and N alone."""

    offsets: Tensor
    longest: int

    def places(self, rows: int) -> Tensor:
        """Where each of `rows` rows lies once every dialogue is padded to `longest`: int64 [rows]."""
        number = torch.arange(rows, device=self.offsets.device)
        dialogue = torch.searchsorted(self.offsets[1:], number, right=True)
        return dialogue * self.longest + number - self.offsets[dialogue]


def dialogue_attention_torch(qkv: Tensor, lengths: Sequence[int], heads: int, dropout: float) -> Tensor:
    """In plain PyTorch. Dialogues of equal length go through one batched product, so nothing is padded."""
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    groups: dict[int, list[int]] = {}
    start = 0
    for n in lengths:
        groups.setdefault(n, []).append(start)
        start += n
    groups.pop(0, None)

    def attend(block: Tensor, count: int, n: int) -> Tensor:
        q, k, v = block.view(count, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return out.transpose(1, 2).reshape(count * n, width)

    if len(groups) == 1:
        (n, starts), = groups.items()
        return attend(qkv, len(starts), n)
    # One gather that puts equal lengths together, one that puts the rows back.
    if not groups:
        return qkv.new_zeros(0, width)
    order = torch.cat([(torch.tensor(starts)[:, None] + torch.arange(n)).flatten() for n, starts in groups.items()])
    order = order.to(qkv.device)
    blocks = qkv.index_select(0, order).split([n * len(starts) for n, starts in groups.items()])
    out = [attend(block, len(starts), n) for block, (n, starts) in zip(blocks, groups.items())]
    return torch.cat(out).index_select(0, torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device)))


def dialogue_attention_offsets(qkv: Tensor, lengths: DialogueOffsets, heads: int, dropout: float) -> Tensor:
    """In plain PyTorch, with the device's offsets: every dialogue padded to the longest, one masked product, the padding left behind."""
    (rows, width), (offsets, longest) = (qkv.shape[0], qkv.shape[1] // 3), lengths
    place = torch.arange(longest, device=qkv.device)
    rows_of = (offsets[:-1, None] + place).clamp(max=rows - 1)
    # A dialogue without rows attends to a row that is nobody's result.
    real = (place < offsets.diff()[:, None]) | (place == 0)
    q, k, v = qkv.index_select(0, rows_of.flatten()).view(-1, longest, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :], dropout_p=dropout)
    return out.transpose(1, 2).reshape(-1, width).index_select(0, lengths.places(rows))


def dialogue_attention_seeded(qkv: Tensor, lengths: Sequence[int], heads: int, dropout: float, seed: Tensor | None,
                              stream: int) -> Tensor:
    """The formula, dialogue by dialogue, with the counter-based mask: any device, any number of derivatives."""
    width = qkv.shape[1] // 3
    out, start = [qkv.new_zeros(0, width)], 0
    for n in lengths:
        q, k, v = qkv[start:start + n].view(n, 3, heads, width // heads).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) * (width // heads) ** -0.5).softmax(dim=-1)
        if dropout:
            kept = torch.stack([philox_words(seed, stream + h, range(start, start + n), n) for h in range(heads)]) >= threshold(dropout)
            weights = weights * kept * (1.0 / (1.0 - dropout))
        out.append((weights @ v).transpose(0, 1).reshape(n, width))
        start += n
    return torch.cat(out)


# ------------------------------------------------------------------------------------------------------- the registered ops

_ops = torch.library.Library("ada2i_fast", "FRAGMENT")
_ops.define("""dialogue_attention_forward(Tensor qkv, SymInt[] lengths, Tensor? offsets, int heads, float dropout, Tensor? seed,
    int stream, str backend) -> Tensor[]""")
_ops.define("""dialogue_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor logsum, SymInt[] lengths,
    Tensor? offsets, int heads, float dropout, Tensor? seed, int stream, str backend) -> Tensor""")


def _forward(qkv, lengths, offsets, heads, dropout, seed, stream, backend):
    """out [N, d], and [N, heads, 2] in float32 or float64: m and l. offsets int64 [B + 1]: instead of lengths, for Triton."""
    return backends.module("dialogue_attention", backend).forward(qkv, lengths if offsets is None else offsets, heads, dropout, seed, stream)


def _backward(grad_out, qkv, out, logsum, lengths, offsets, heads, dropout, seed, stream, backend):
    return backends.module("dialogue_attention", backend).backward(
        grad_out, qkv, out, logsum, lengths if offsets is None else offsets, heads, dropout, seed, stream)


for _device in ("CPU", "CUDA"):
    _ops.impl("dialogue_attention_forward", _forward, _device)
    _ops.impl("dialogue_attention_backward", _backward, _device)


@torch.library.register_fake("ada2i_fast::dialogue_attention_forward")
def _(qkv, lengths, offsets, heads, dropout, seed, stream, backend):
    precise = backends.accumulator(qkv.dtype)
    return [qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), qkv.new_empty(qkv.shape[0], heads, 2, dtype=precise)]


@torch.library.register_fake("ada2i_fast::dialogue_attention_backward")
def _(grad_out, qkv, out, logsum, lengths, offsets, heads, dropout, seed, stream, backend):
    return qkv.new_empty(qkv.shape)


# ------------------------------------------------------------------------------------------------------------------ autograd


class _DialogueAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, lengths, offsets, heads, dropout, seed, stream, backend):
        out, logsum = torch.ops.ada2i_fast.dialogue_attention_forward(qkv, lengths, offsets, heads, dropout, seed, stream, backend)
        ctx.settings = (lengths, heads, dropout, stream, backend)
        ctx.save_for_backward(qkv, out, logsum, seed, offsets)
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, logsum, seed, offsets = ctx.saved_tensors
        lengths, heads, dropout, stream, backend = ctx.settings
        if torch.is_grad_enabled():                             # create_graph=True: the ops have no derivative, the formula has
            if offsets is not None:
                lengths = offsets.diff().tolist()
            again = dialogue_attention_seeded(qkv, lengths, heads, dropout, seed, stream)
            result, = torch.autograd.grad(again, qkv, grad, create_graph=True)
        else:
            result = torch.ops.ada2i_fast.dialogue_attention_backward(grad, qkv, out, logsum, lengths, offsets, heads, dropout, seed,
                                                                             stream, backend)
        return result, None, None, None, None, None, None, None


def check_sizes(rows: int, width: int, lengths: Sequence[int] | None, heads: int) -> None:
    """rows, width: of qkv; lengths: None where they stand on the device."""
    if lengths is not None and sum(lengths) != rows:
        raise ValueError(f"lengths: expected them to sum to {rows} (the rows of qkv), got {sum(lengths)}")
    if lengths is not None and not torch.compiler.is_compiling() and min(lengths, default=0) < 0:
        raise ValueError(f"lengths: expected no negative numbers, got {min(lengths)}")
    if width % (3 * heads):
        raise ValueError(f"heads: expected a divisor of the width, got {heads} for qkv {[rows, width]}")


def dialogue_attention(qkv: Tensor, lengths: Sequence[int] | DialogueOffsets, heads: int, *, dropout: float = 0.0, seed: Tensor | None = None,
                       stream: int = 0, backend: str = "auto") -> Tensor:
    """qkv: [N, 3 d], the query, key and value of each row side by side; lengths: rows per dialogue, summing to N, or the
    `DialogueOffsets` of a CUDA graph, whose numbers nobody checks; heads divides d. dropout: probability, on the attention weights;
    seed, stream: of its mask, by default drawn from torch's generator. backend: "auto" | "torch" | "cpu" | "triton", see
    `ada2i_fast.backends`. Returns [N, d] in the dtype of qkv; for bfloat16 and float16 the arithmetic is float32, but
    for the CPU's bf16 dot product, whose factors (the weights, the gradients of scores) are rounded to bfloat16.

    A dialogue's result has nothing to do with the others, whatever their lengths; memory is linear in N.
    """
    on_device = isinstance(lengths, DialogueOffsets)
    if on_device and not lengths.offsets.is_cuda and backend not in ("torch", "triton"):
        lengths, on_device = lengths.offsets.diff().tolist(), False
    check_sizes(*qkv.shape, None if on_device else lengths, heads)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
    backend = backends.choose("dialogue_attention", [qkv], backend)
    if on_device and backend == "torch":
        return dialogue_attention_offsets(qkv, lengths, heads, dropout)
    if dropout == 0.0:
        seed = None
    if backend == "torch":
        if seed is None:
            return dialogue_attention_torch(qkv, lengths, heads, dropout)
        return dialogue_attention_seeded(qkv, lengths, heads, dropout, seed, stream)
    if dropout and seed is None:
        seed = torch.randint(2 ** 63 - 1, (1,), device=qkv.device)
    lengths, offsets = ([], lengths.offsets) if on_device else (list(lengths), None)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _DialogueAttention.apply(qkv, lengths, offsets, heads, dropout, seed, stream, backend)
    return torch.ops.ada2i_fast.dialogue_attention_forward(qkv, lengths, offsets, heads, dropout, seed, stream, backend)[0]
