"""Unimodal encoders (eq. 2) on packed rows, with the parameters and names of the released ones."""

from __future__ import annotations

import functools
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends
from ..ops import dialogue_attention, linear
from ..ops.dropout import dropout_residual_norm, relu_dropout

__all__ = ["LSTMEncoder", "TransformerEncoder"]


class TransformerEncoder(nn.Module):
    """Post-norm Transformer layers (ReLU, no positional encoding) at the input width, then a linear map to D.

    The parameters are those of `nn.TransformerEncoder`; the arithmetic runs on packed rows. backend: "torch" is plain PyTorch;
    with any other name each op takes the best implementation there is for the tensors.
    """

    def __init__(self, width: int, hidden_dim: int, heads: int, layers: int, feedforward_dim: int, dropout: float,
                 backend: str = "auto") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, feedforward_dim, dropout, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.lin_out = nn.Linear(width, hidden_dim)
        self.heads = heads
        self.dropout = dropout
        self.backend = backend

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """x: [N, d], lengths: rows per dialogue. Returns [N, D]."""
        p = self.dropout if self.training else 0.0
        attention, dropout = (self._best(op, x) for op in ("dialogue_attention", "dropout"))
        # One seed per call, from torch's generator, and a stream per mask; the attention takes one for each head.
        seed = torch.randint(2 ** 63 - 1, (1,), device=x.device) if p and (attention, dropout) != ("torch", "torch") else None
        product = functools.partial(linear, backend=self.backend)
        for i, layer in enumerate(self.transformer_encoder.layers):
            stream, own = i * (self.heads + 3), layer.self_attn
            qkv = product(x, own.in_proj_weight, own.in_proj_bias)
            mixed = dialogue_attention(qkv, lengths, self.heads, dropout=p, seed=None if attention == "torch" else seed,
                                       stream=stream, backend=attention)
            stream += self.heads
            if dropout == "torch":
                x = layer.norm1(x + F.dropout(product(mixed, own.out_proj.weight, own.out_proj.bias), p, self.training))
                inner = F.dropout(product(x, layer.linear1.weight, layer.linear1.bias, relu=True), p, self.training)
                x = layer.norm2(x + F.dropout(product(inner, layer.linear2.weight, layer.linear2.bias), p, self.training))
                continue
            fused = dict(p=p, seed=seed, backend=dropout)
            x = dropout_residual_norm(product(mixed, own.out_proj.weight), own.out_proj.bias, x, layer.norm1.weight,
                                      layer.norm1.bias, eps=layer.norm1.eps, stream=stream, **fused)
            inner = relu_dropout(product(x, layer.linear1.weight), layer.linear1.bias, stream=stream + 1, **fused)
            x = dropout_residual_norm(product(inner, layer.linear2.weight), layer.linear2.bias, x, layer.norm2.weight,
                                      layer.norm2.bias, eps=layer.norm2.eps, stream=stream + 2, **fused)
        return product(x, self.lin_out.weight, self.lin_out.bias)

    def _best(self, op: str, x: Tensor) -> str:
        if self.backend == "torch":
            return "torch"
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return backends.best(op, device, dtype, self.lin_out.in_features)


class LSTMEncoder(nn.Module):
    """A biLSTM of D / 2 per direction over each dialogue."""

    def __init__(self, width: int, hidden_dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.lstm = nn.LSTM(width, hidden_dim // 2, layers, dropout=dropout if layers > 1 else 0.0, bidirectional=True,
                            batch_first=True)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """x: [N, d], lengths: rows per dialogue. Returns [N, D]."""
        filled = [n for n in lengths if n]
        if not filled:
            return x.new_zeros(0, self.hidden_dim)
        packed = nn.utils.rnn.pack_sequence(x.split(filled), enforce_sorted=False)
        return torch.cat(nn.utils.rnn.unpack_sequence(self.lstm(packed)[0]))
