"""Ada2I as the paper and the released code have it, on padded dialogues [B, T, d_m]."""

from __future__ import annotations

from typing import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batch import Ada2IOutput
from ..config import Ada2IConfig
from .attention_mapping import AttentionMapping, attention_mapping
from .balance import disparity_ratio
from .cosine_fusion import cosine_fusion
from .encoder import LSTMEncoder, TransformerEncoder
from .tensor_ring import TensorRing, tensor_ring


class FeatureWeightingLayer(nn.Module):
    """One AFW layer: tensor-ring attention, gate, dropout, and the attention mapping network."""

    def __init__(self, config: Ada2IConfig) -> None:
        super().__init__()
        widths = [config.hidden_dim] * len(config.modalities)
        self.attention = TensorRing(widths, config.tensor_rank)
        self.wmn = AttentionMapping(widths)


class FeatureWeighting(nn.Module):
    def __init__(self, config: Ada2IConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FeatureWeightingLayer(config) for _ in range(config.afw_layers))


class Net(nn.Module):
    """The parameters, created in the released order, so that a seed gives the released initial weights."""

    def __init__(self, config: Ada2IConfig) -> None:
        super().__init__()
        count = len(config.modalities)
        self.encoder = nn.ModuleDict()
        self.mmt = FeatureWeighting(config) if config.afw else None
        self.fc_out = nn.Linear(config.hidden_dim * count, config.num_classes, bias=config.cosine_bias or not config.amw)
        for m in config.modalities:
            width = config.input_widths[m]
            if config.encoder == "lstm":
                self.encoder[m] = LSTMEncoder(width, config.hidden_dim, config.encoder_layers, config.dropout)
            else:
                self.encoder[m] = TransformerEncoder(width, config.hidden_dim, config.heads(m), config.encoder_layers,
                                                     config.feedforward_dim, config.dropout)
        if config.head == "mlp":                                                # eq. 9
            inner = config.head_expansion * config.num_classes
            self.head = nn.Sequential(nn.Linear(config.num_classes, inner), nn.ReLU(), nn.Linear(inner, config.num_classes))


class Ada2I(nn.Module):
    """The textbook model. `net` holds the parameters under the released names."""

    def __init__(self, config: Ada2IConfig) -> None:
        super().__init__()
        self.config = config
        self.net = Net(config)

    def forward(self, tensors: Mapping[str, Tensor], lengths: Tensor, labels: Tensor | None = None) -> Ada2IOutput:
        """tensors: {modality: [B, T, d_m]}, lengths: int64 [B], labels: flat int64 [sum(lengths)] or None."""
        config, net = self.config, self.net
        names = config.modalities
        steps = tensors[names[0]].shape[1]
        real = torch.arange(steps, device=lengths.device) < lengths[:, None]    # [B, T]
        mask = real if config.padding == "masked" else None

        z = [net.encoder[m](tensors[m], lengths, mask) for m in names]          # eq. 2

        feature_loss = z[0].new_zeros(())
        for layer in net.mmt.layers if config.afw else ():
            attention, gated = tensor_ring(layer.attention, z, ring=config.ring, scale=config.theta_scale, beta=config.beta,
                                           mask=mask)
            if self.training:                                                   # eq. 12
                target = gated if config.feature_target == "gated" else attention
                feature_loss = feature_loss + attention_mapping(layer.wmn, z, target, reduction=config.feature_reduction,
                                                                mask=mask)
            z = [F.dropout(g, config.dropout, self.training) for g in gated]

        hidden = {m: z_m[real] for m, z_m in zip(names, z)}                     # padding leaves here, [N, D]
        joint, unimodal = cosine_fusion(hidden, net.fc_out, amw=config.amw, cosine_norm=config.cosine_norm,
                                        scale=config.cosine_scale, score_from=config.score_from)
        logits = joint if config.head == "none" else net.head(joint)
        log_prob = F.log_softmax(logits, dim=1)

        ratio = loss = None
        if labels is not None:
            ratio = disparity_ratio(unimodal, labels)
            loss = F.nll_loss(log_prob, labels) + feature_loss                  # eqs. 10, 12
            if config.head != "none":
                loss = loss + F.cross_entropy(joint, labels)                    # eqs. 13, 14
        return Ada2IOutput(log_prob, feature_loss, {m: F.log_softmax(u, dim=1) for m, u in unimodal.items()}, ratio, loss)
