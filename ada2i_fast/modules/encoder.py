"""Unimodal encoders (eq. 2) on packed rows, with the parameters and names of the released ones."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import dialogue_attention

__all__ = ["LSTMEncoder", "TransformerEncoder"]


class TransformerEncoder(nn.Module):
    """Post-norm Transformer layers (ReLU, no positional encoding) at the input width, then a linear map to D.

    The parameters are those of `nn.TransformerEncoder`; the arithmetic runs on packed rows.
    """

    def __init__(self, width: int, hidden_dim: int, heads: int, layers: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, feedforward_dim, dropout, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.lin_out = nn.Linear(width, hidden_dim)
        self.heads = heads
        self.dropout = dropout

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """x: [N, d], lengths: rows per dialogue. Returns [N, D]."""
        drop = self.dropout if self.training else 0.0
        for layer in self.transformer_encoder.layers:
            attention = layer.self_attn
            qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
            mixed = attention.out_proj(dialogue_attention(qkv, lengths, self.heads, dropout=drop))
            x = layer.norm1(x + F.dropout(mixed, drop, self.training))
            inner = F.dropout(F.relu(layer.linear1(x)), drop, self.training)
            x = layer.norm2(x + F.dropout(layer.linear2(inner), drop, self.training))
        return self.lin_out(x)


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
