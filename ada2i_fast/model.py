"""Ada2I on packed rows."""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any, Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends
from .balance import modulation_coefficients, spread
from .batch import Ada2IOutput, DialogueBatch, FixedBatch
from .config import Ada2IConfig
from .modules import FeatureWeighting, LSTMEncoder, ModalityWeighting, TransformerEncoder
from .ops import balanced_adam, head_losses

__all__ = ["Ada2I"]


class _Net(nn.Module):
    """The parameters under the released names, created in the released order: a seed gives the released initial weights."""

    def __init__(self, config: Ada2IConfig, backend: str) -> None:
        super().__init__()
        count = len(config.modalities)
        self.encoder = nn.ModuleDict()
        self.mmt = FeatureWeighting(
            [config.hidden_dim] * count, config.tensor_rank, config.afw_layers, config.beta, config.dropout,
            scale=config.theta_scale, ring=config.ring, feature_target=config.feature_target,
            feature_reduction=config.feature_reduction, backend=backend) if config.afw else None
        self.fc_out = ModalityWeighting(
            config.hidden_dim, count, config.num_classes, bias=config.cosine_bias or not config.amw, amw=config.amw,
            cosine_norm=config.cosine_norm, scale=config.cosine_scale, score_from=config.score_from, backend=backend)
        for m in config.modalities:
            width = config.input_widths[m]
            if config.encoder == "lstm":
                self.encoder[m] = LSTMEncoder(width, config.hidden_dim, config.encoder_layers, config.dropout)
            else:
                self.encoder[m] = TransformerEncoder(width, config.hidden_dim, config.heads(m), config.encoder_layers,
                                                     config.feedforward_dim, config.dropout, backend)
        if config.head == "mlp":
            inner = config.head_expansion * config.num_classes
            self.head = nn.Sequential(nn.Linear(config.num_classes, inner), nn.ReLU(), nn.Linear(inner, config.num_classes))

    def get_encoder_params(self) -> dict[str, list[nn.Parameter]]:
        """{modality: parameters of its encoder}: those that modulation touches."""
        return {m: list(encoder.parameters()) for m, encoder in self.encoder.items()}


@functools.cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device, priority=-1) for _ in range(count)]    # before the gradients of weights, see ops.linear.branch


def _on_streams(call: Callable[[str], Tensor], names: Sequence[str], device: torch.device) -> list[Tensor]:
    """[call(name), ..], each on a stream of its own that starts from and ends in the current one; so does backward."""
    current = torch.cuda.current_stream(device)
    start, results, ends = current.record_event(), [], []
    for name, stream in zip(names, _streams(device, len(names))):
        stream.wait_event(start)
        with torch.cuda.stream(stream):
            results.append(call(name))
            ends.append(stream.record_event())
    for result, end in zip(results, ends):
        current.wait_event(end)
        result.record_stream(current)
    return results


class Ada2I(nn.Module):
    """Ada2I: multimodal emotion recognition in conversations with balanced modalities (ACM MM 2024, arXiv 2408.12895).

    Two doors:

        model = Ada2I(Ada2IConfig.published("iemocap"))
        out = model(batch)                                      # DialogueBatch -> Ada2IOutput
        out.loss.backward()

        model = Ada2I(args)                                     # the released script's argparse Namespace
        log_prob, feature_loss, unimodal, ratio = model(data)   # the released batch dictionary
        model.apply_modulation(ratio)

    config: an `Ada2IConfig`, or the released Namespace (released semantics).  backend: which implementation serves AFW,
    "auto" | "torch" | "cpu" | "triton" | "cuda"; the encoders, AMW and the head take the best there is, with "torch" plain PyTorch.
    `side_by_side`: on CUDA the encoders run on streams of their own, parallel branches where a CUDA graph is captured; off by default.
    The state_dict has the released names; the published head adds `net.head`.
    """

    def __init__(self, config: Ada2IConfig | Namespace, *, backend: str = "auto") -> None:
        super().__init__()
        if isinstance(config, Namespace):
            self.args = config
            config = Ada2IConfig.from_namespace(config)
        if not isinstance(config, Ada2IConfig):
            raise TypeError(f"config: expected an Ada2IConfig or the released argparse.Namespace, got {type(config).__name__}")
        self.config = config
        self.backend = backend
        self.net = _Net(config, backend)
        self.side_by_side = False

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, data: DialogueBatch | FixedBatch | Mapping[str, Any]) -> Ada2IOutput | tuple:
        """A `DialogueBatch`, a `FixedBatch` (for CUDA graphs; its filler rows are among the results), or the released dictionary {"tensor": {m: [B, T, d_m]}, "length": [B], "label_tensor": [N]}.

        Returns an `Ada2IOutput`; for a dictionary the released four values, feature_loss of shape [1].
        Raises ValueError where the batch does not fit the configuration.
        """
        if isinstance(data, Mapping):
            out = self._run(self._from_released(data))
            return out.log_prob, out.feature_loss.reshape(1), out.unimodal_log_prob, out.ratio
        return self._run(data)

    def _from_released(self, data: Mapping[str, Any]) -> DialogueBatch:
        for key in ("tensor", "length"):
            if key not in data:
                raise ValueError(f"data: expected the keys 'tensor', 'length' and 'label_tensor', {key!r} is missing")
        missing = [m for m in self.config.modalities if m not in data["tensor"]]
        if missing:
            raise ValueError(f"data['tensor']: expected modality {missing[0]!r}, got {', '.join(data['tensor'])}")
        tensors = {m: data["tensor"][m] for m in self.config.modalities}
        return DialogueBatch.from_padded(tensors, data["length"], data.get("label_tensor"))

    def _run(self, batch: DialogueBatch | FixedBatch) -> Ada2IOutput:
        config, net = self.config, self.net
        features = self._checked(batch)
        labels = batch.labels
        fixed = isinstance(batch, FixedBatch)
        real = None
        if not fixed and config.padding == "attended" and any(n != batch.max_length for n in batch.lengths):
            padded, real = DialogueBatch(features, batch.offsets, None, batch.lengths).padded()
            if config.encoder == "transformer":
                features = padded.features
            offsets, lengths = padded.offsets, padded.lengths
        else:
            offsets, lengths = batch.offsets, batch.lengths

        def encode(m: str) -> Tensor:
            if config.encoder == "lstm":                    # the released biLSTM sees real rows only, and pads with zeros
                z_m = net.encoder[m](features[m], batch.lengths)
                return z_m if real is None else z_m.new_zeros(sum(lengths), z_m.shape[1]).index_copy(0, real, z_m)
            return net.encoder[m](features[m], lengths)

        if self.side_by_side and labels is not None and labels.is_cuda:
            z = _on_streams(encode, config.modalities, labels.device)
        else:
            z = [encode(m) for m in config.modalities]
        feature_loss = z[0].new_zeros(())
        if net.mmt is not None:
            z, feature_loss = net.mmt(z, offsets, batch.rows if fixed else None)
        if real is not None:
            # The compiler does not know how many rows a mask has left.
            torch._check(real.shape[0] == batch.features[config.modalities[0]].shape[0])
            z = [z_m.index_select(0, real) for z_m in z]
        joint, unimodal, _, ratios = net.fc_out(z, labels)
        log_prob, loss = self._classified(joint, labels, feature_loss)
        ratio = None if labels is None else dict(zip(config.modalities, ratios.unbind()))
        return Ada2IOutput(log_prob, feature_loss, dict(zip(config.modalities, unimodal.unbind())), ratio, loss)

    def _classified(self, joint: Tensor, labels: Tensor | None, feature_loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities behind the head, and L_main."""
        head, widths = None, [self.config.num_classes]
        if self.config.head != "none":
            first, _, second = self.net.head
            head = (first.weight, first.bias, second.weight, second.bias)
            widths.append(first.out_features)
        backend = "torch" if self.backend == "torch" else backends.best("head_losses", joint.device.type, joint.dtype, *widths)
        return head_losses(joint, head, labels, feature_loss, backend=backend)

    def _checked(self, batch: DialogueBatch) -> dict[str, Tensor]:
        """The features that the model uses, in its order; shapes are checked, values are the corpus' affair."""
        if isinstance(batch, FixedBatch) and self.config.encoder == "lstm":
            raise ValueError("batch: expected a DialogueBatch, whose lengths a biLSTM needs, got a FixedBatch")
        if not isinstance(batch, (DialogueBatch, FixedBatch)):
            raise TypeError(f"data: expected a DialogueBatch or the released dictionary, got {type(batch).__name__}")
        features = {}
        for m in self.config.modalities:
            if m not in batch.features:
                raise ValueError(f"batch: expected modality {m!r}, got {', '.join(batch.features)}")
            features[m] = batch.features[m]
            if features[m].shape[1] != self.config.input_widths[m]:
                raise ValueError(f"batch.features[{m!r}]: expected width {self.config.input_widths[m]}, got {features[m].shape[1]}")
        if batch.num_utterances == 0:
            raise ValueError("batch: expected at least one utterance, got none")
        return features

    # -- the released door -------------------------------------------------------------------------------------------

    @property
    def modalities(self) -> str | tuple[str, ...]:
        return self.config.modalities

    @torch.no_grad()
    def apply_modulation(self, ratio: Mapping[str, Tensor]) -> None:
        """Edits the encoders' `.grad` as the released code does: g <- k_m g, then with noise g <- g + N(0, std(g) + 1e-8).

        ratio: {modality: rho_m} as returned by forward. `BalancedAdam` does this, and more, in its step. The gradients change in
        place; contiguous float32 ones on a CPU in two passes of `ops.balanced_adam`.
        """
        noisy = self.config.noise == "gradient"
        grads, coefficients = [], []
        for m, k in modulation_coefficients(ratio, self.config.alpha).items():
            own = [p.grad for p in self.net.encoder[m].parameters() if p.grad is not None]
            grads += own
            coefficients += [k] * len(own)
        if not grads:
            return
        if self.backend != "torch" and all(g.is_cpu and g.dtype == torch.float32 and g.is_contiguous() for g in grads) and \
                backends.best("balanced_adam", "cpu", torch.float32, 1) == "cpu":
            settings = torch.zeros(len(grads), 6, dtype=torch.float64)
            settings[:, 0] = k = torch.stack(coefficients).to(settings)
            seed = None
            if noisy:
                sizes = torch.tensor([g.numel() for g in grads], dtype=torch.float64)
                settings[:, 4] = k * balanced_adam.spreads(balanced_adam.measure(grads), sizes) + 1e-8
                seed = F.pad(torch.randint(2 ** 63 - 1, (1,)), (0, 1))
            balanced_adam.modulate(grads, settings, numbers=range(len(grads)), seed=seed)
            return
        for g, k in zip(grads, coefficients):
            g.mul_(k.to(g))
            if noisy:
                g.add_(torch.randn_like(g) * (spread(g) + 1e-8))
