"""Adaptive feature weighting (AFW, eqs. 4 to 7 and 12) on packed rows."""

from __future__ import annotations

import functools
from typing import Sequence

import torch
from torch import Tensor, nn

from ..ops import afw_layer
from ..ops.linear import branch

__all__ = ["FeatureWeighting", "parameter"]


class _Linear(nn.Module):
    """Holds a linear map one level down, as `.lin`, where the released checkpoints keep it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    @property
    def lin(self) -> nn.Linear:                                 # found faster than through nn.Module.__getattr__
        return self._modules["lin"]


def parameter(module: nn.Module, name: str) -> Tensor:
    """Straight from where nn.Module keeps it, if it is there: with small batches a search for all attributes takes as long as arithmetic."""
    own = module._parameters.get(name)
    return getattr(module, name) if own is None else own


def _parameters(maps: Sequence[nn.Linear]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases."""
    own = [m._parameters for m in maps]
    if all(["weight" in found and "bias" in found for found in own]):
        return [found["weight"] for found in own], [found["bias"] for found in own]
    return [parameter(m, "weight") for m in maps], [parameter(m, "bias") for m in maps]


def _children(module: nn.Module, name: str) -> list[nn.Module]:
    """Those of a ModuleList, found like `parameter`."""
    return list(module._modules[name]._modules.values())


class _TensorRing(nn.Module):
    """Parameters of the tensor-ring attention: per modality four projections D -> R and a map R^2 -> D."""

    def __init__(self, widths: Sequence[int], rank: int) -> None:
        super().__init__()
        self.trans_q1, self.trans_q2, self.trans_k1, self.trans_k2 = (
            nn.ModuleList(_Linear(width, rank) for width in widths) for _ in range(4))
        self.lin_att = nn.ModuleList(_Linear(rank * rank, width) for width in widths)

    def projections(self) -> tuple[list[Tensor], list[Tensor]]:
        """4M weights [R, D_j] and biases [R]: q1, q2, k1, k2 of modality 0, then of 1, and so on."""
        kinds = [_children(self, name) for name in ("trans_q1", "trans_q2", "trans_k1", "trans_k2")]
        return _parameters([m.lin for each in zip(*kinds) for m in each])

    def maps(self) -> tuple[list[Tensor], list[Tensor]]:
        """M weights [D_j, R * R] and biases [D_j]."""
        return _parameters([m.lin for m in _children(self, "lin_att")])


class _AttentionMapping(nn.Module):
    """Parameters of Phi: one linear map D -> D per modality."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(width, width) for width in widths)


class _Layer(nn.Module):
    def __init__(self, widths: Sequence[int], rank: int) -> None:
        super().__init__()
        self.attention = _TensorRing(widths, rank)
        self.wmn = _AttentionMapping(widths)


class FeatureWeighting(nn.Module):
    """AFW: M modalities reweigh each other's features through a tensor ring, layer by layer.

        out_m = dropout(Att_m * x_m + beta x_m),    Att_m = map(Theta_m A_l A_o ..)          eqs. 4 to 7
        feature_loss = sum over layers and modalities of mean | Phi_m(x_m) - target_m |      eq. 12, training only

    widths: D_m per modality.  rank: R.  layers.  beta: gate.  dropout: probability, after the gate.
    scale: factor of Theta, default 1 / sqrt(rank).  ring: for each modality the others in the order of their contraction,
    default onwards around the list (m <- m + 1, m + 2, ..).  feature_target: "attention" | "gated".
    feature_reduction: "sum" | "mean" over modalities.  backend: as in `ada2i_fast.ops`.

    Called with M tensors [N, D_m], dialogue offsets int64 [B + 1], and rows int64 [] where only the first so many of N count for the
    feature loss; returns (M tensors [N, D_m], feature_loss).
    """

    def __init__(self, widths: Sequence[int], rank: int, layers: int = 2, beta: float = 0.01, dropout: float = 0.5, *,
                 scale: float | None = None, ring: Sequence[Sequence[int]] | None = None, feature_target: str = "attention",
                 feature_reduction: str = "sum", backend: str = "auto") -> None:
        super().__init__()
        count = len(widths)
        if not count or min(widths) < 1:
            raise ValueError(f"widths: expected a positive width per modality, got {list(widths)}")
        if rank < 1 or layers < 1:
            raise ValueError(f"{'rank' if rank < 1 else 'layers'}: expected at least 1, got {rank if rank < 1 else layers}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
        if feature_target not in ("attention", "gated"):
            raise ValueError(f"feature_target: expected 'attention' or 'gated', got {feature_target!r}")
        if ring is None:
            ring = [[(j + step) % count for step in range(1, count)] for j in range(count)]
        if [sorted(others) for others in ring] != [[l for l in range(count) if l != j] for j in range(count)]:
            raise ValueError(f"ring: expected, for each of {count} modalities, the positions of all others, got {ring}")
        self.widths = list(widths)
        self.beta = beta
        self.dropout = dropout
        self.scale = rank ** -0.5 if scale is None else scale
        self.ring = [list(others) for others in ring]
        self.feature_target = feature_target
        self.feature_reduction = feature_reduction
        self.backend = backend
        self.layers = nn.ModuleList(_Layer(widths, rank) for _ in range(layers))

    def forward(self, x: Sequence[Tensor], offsets: Tensor, rows: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        x = list(x)
        if len(x) != len(self.widths):
            raise ValueError(f"x: expected {len(self.widths)} modalities, got {len(x)}")
        for j, (x_j, width) in enumerate(zip(x, self.widths)):
            if x_j.dim() != 2 or x_j.shape[1] != width or x_j.shape[0] != x[0].shape[0]:
                raise ValueError(f"x[{j}]: expected [{x[0].shape[0]}, {width}], got {list(x_j.shape)}")
        losses = []
        dropout = self.dropout if self.training else 0.0
        with branch(x[0].device) as beside:
            for layer in _children(self, "layers"):
                attention, phi = layer._modules["attention"], layer._modules["wmn"]
                parameters = (*attention.projections(), *attention.maps(), *_parameters(_children(phi, "fc")))
                x, loss = afw_layer(
                    x, offsets, *parameters, ring=self.ring, scale=self.scale, beta=self.beta, dropout=dropout,
                    gated_target=self.feature_target == "gated", reduction=self.feature_reduction, with_loss=self.training, rows=rows,
                    backend=self.backend, beside=beside)
                losses.append(loss)
        return x, functools.reduce(torch.add, losses) if self.training else x[0].new_zeros(())

    def extra_repr(self) -> str:
        return f"widths={self.widths}, beta={self.beta}, dropout={self.dropout}, scale={self.scale:.4g}, backend={self.backend!r}"
