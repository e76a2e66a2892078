"""Unimodal encoders, eq. 2: Z_m = Transformer(X_m), or a biLSTM."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class TransformerEncoder(nn.Module):
    """Post-norm Transformer layers at the input width, then a linear map to D. No positional encoding."""

    def __init__(self, width: int, hidden_dim: int, heads: int, layers: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, feedforward_dim, dropout, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.lin_out = nn.Linear(width, hidden_dim)

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor | None) -> Tensor:
        """x: [B, T, d]; mask: [B, T], True on real rows, or None to attend to padding too. Returns [B, T, D]."""
        return self.lin_out(self.transformer_encoder(x, src_key_padding_mask=None if mask is None else ~mask))


class LSTMEncoder(nn.Module):
    """A biLSTM of D / 2 per direction over the real rows; padded rows come out as zeros."""

    def __init__(self, width: int, hidden_dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden_dim // 2, layers, dropout=dropout if layers > 1 else 0.0, bidirectional=True,
                            batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor | None) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]
