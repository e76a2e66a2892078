"""Adaptive modality weighting (AMW, eq. 8) and the disparity scores."""

from __future__ import annotations

from typing import Sequence

from torch import Tensor, nn

from .. import backends
from ..ops import cosine_fusion

__all__ = ["ModalityWeighting"]


class ModalityWeighting(nn.Linear):
    """Joint logits of M modalities as a sum of per-class cosines, or (amw=False) a linear map of their concatenation.

    weight [C, M D]: block m is W_m^T; bias [C] or none.  amw, cosine_norm, scale, score_from: see `ada2i_fast.ops.cosine_fusion`.
    backend: "torch" is plain PyTorch; with any other name the op takes the best implementation there is for the tensors.
    Called with M tensors [N, D] and labels int64 [N] or None; returns joint logits [N, C], unimodal log-probabilities
    [M, N, C], scores [M] and disparity ratios [M] (None and None without labels).
    """

    def __init__(self, hidden_dim: int, modalities: int, num_classes: int, *, bias: bool = False, amw: bool = True,
                 cosine_norm: str = "features", scale: float = 10.0, score_from: str = "cosine", backend: str = "auto") -> None:
        super().__init__(hidden_dim * modalities, num_classes, bias=bias)
        self.hidden_dim = hidden_dim
        self.backend = backend
        self.options = dict(amw=amw, cosine_norm=cosine_norm, scale=scale, score_from=score_from)

    def forward(self, hidden: Sequence[Tensor],
                labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        backend = self.backend
        if backend != "torch":
            backend = backends.best("cosine_fusion", hidden[0].device.type, hidden[0].dtype, self.hidden_dim)
        return cosine_fusion(hidden, self.weight, self.bias, labels, backend=backend, **self.options)

    def extra_repr(self) -> str:
        return super().extra_repr() + "".join(f", {name}={value!r}" for name, value in self.options.items())
