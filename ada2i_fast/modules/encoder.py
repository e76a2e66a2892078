"""Unimodal encoders (eq. 2) on packed rows, with the parameters and names of the released ones."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from ..ops import encoder_layers
from .feature_weighting import parameter

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
        layers = list(self.transformer_encoder.layers)
        return encoder_layers(x, lengths, [_parameters(layer) for layer in layers], heads=self.heads, p=self.dropout if self.training else 0.0,
                              eps=[(layer.norm1.eps, layer.norm2.eps) for layer in layers], out=(self.lin_out.weight, self.lin_out.bias),
                              backend="torch" if self.backend == "torch" else "auto")


def _parameters(layer: nn.TransformerEncoderLayer) -> list[Tensor]:
    """In the order of `ops.encoder_layer`."""
    parts = layer._modules
    attention, out = parts["self_attn"], parts["self_attn"]._modules["out_proj"]
    return [parameter(attention, "in_proj_weight"), parameter(attention, "in_proj_bias"),
            *[parameter(part, name) for part in (out, parts["norm1"], parts["linear1"], parts["linear2"], parts["norm2"])
              for name in ("weight", "bias")]]


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
