"""The competitors of each group, behind one interface.

| name | what runs |
|---|---|
| textbook | `ada2i_fast.reference`: padded, eager, every core materialised; bf16 by autocast |
| compiled | torch.compile of the textbook, sizes static |
| released | the textbook with the released loop over utterances for the scores; on CUDA, where every pass of it waits for the device |
| algebra | the backend `torch`: packed rows and the algebraic rewrite in plain PyTorch |
| cpu, triton, cuda | the native backends, on packed rows |
| graph | on CUDA the best backends with a CUDA graph: training steps of the model (`training.GraphedStep`), forward and backward of a layer |

`build(case, implementation, device)` gives a `Competitor`. Whoever cannot run here raises `Unavailable` with the reason.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from typing import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ada2i_fast import Ada2I, BalancedAdam, DialogueBatch, backends, ops, reference
from ada2i_fast.modules import FeatureWeighting
from ada2i_fast.ops.afw_layer import stacked
from ada2i_fast.reference.model import FeatureWeightingLayer
from ada2i_fast.training.graph import GraphedStep

from .cases import Case

BACKEND = {"algebra": "torch", "cpu": "cpu", "triton": "triton", "cuda": "cuda", "graph": "auto"}
_textbook = sys.modules["ada2i_fast.reference.model"]


# Ops whose callers name no backend ask these; the algebra is plain PyTorch in everything.
PLAIN = {"ADA2I_FAST_BACKEND": "torch", "ADA2I_FAST_LINEAR": "mkl"}


@contextlib.contextmanager
def environment(values: Mapping[str, str]):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class Unavailable(Exception):
    """This implementation cannot run here."""


class Competitor:
    """run(): what is timed.  result(): every output and gradient by name, dropout off, on packed rows.
    forward(): the forward pass of a training case, and what it may keep for free, for counting saved bytes."""

    run: Callable[[], object]
    result: Callable[[], dict[str, Tensor]]
    forward: Callable[[], object] | None = None
    free: tuple[Tensor, ...] = ()


def build(case: Case, implementation: str, device: str) -> Competitor:
    return _maker(case)(case, implementation, device)


def exact(case: Case, device: str) -> dict[str, Tensor]:
    """The algebra in float64."""
    return {name: t.detach() for name, t in _maker(case)(case, "algebra", device, exact=True).result().items()}


def _maker(case: Case) -> type[Competitor]:
    return {"model": _Model, "cosine_fusion": _Fusion}.get(case.op, _Op)


def keep_signs(model: nn.Module) -> None:
    """Among many differences Phi(x) - target, and inputs of a ReLU, some are 0 but for rounding, and their sign, which decides on their
    gradient, is anybody's. Biases of some standard deviations of the products keep them away; half of them lie above, half below."""
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("bias") and ("wmn.fc." in name or "linear1." in name):
                bias.copy_(3.0 * (-1.0) ** torch.arange(bias.numel()))


# ---------------------------------------------------------------------------------------------------------------- AFW ops


class _Op(Competitor):
    """tensor_ring, attention_mapping or a whole AFW layer."""

    def __init__(self, case: Case, implementation: str, device: str, exact: bool = False) -> None:
        self.case, config = case, case.shape.config(case.preset)
        self.config, self.dropout = config, config.dropout if case.mode == "training" else 0.0
        self.training = case.mode == "training"
        dtype = torch.float64 if exact else getattr(torch, case.dtype)
        lengths = torch.tensor(case.shape.lengths)
        rows, count, width = case.shape.utterances, len(config.modalities), config.hidden_dim
        self.offsets = F.pad(lengths.cumsum(0), (1, 0)).to(device)
        self.real = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
        self.padded = implementation in ("textbook", "compiled")

        # The values that all see: drawn in float32, rounded to the case's dtype, then taken to the dtype of the arithmetic. On the device:
        # a host takes seconds for 1,000 dialogues.
        g = torch.Generator(device).manual_seed(0)
        drawn = [torch.randn(rows, width, generator=g, device=device).to(getattr(torch, case.dtype)) for _ in range(4 * count)]
        rowwise = [self._place(t.to(dtype)) for t in drawn]
        x, target, grad_out, grad_target = (rowwise[i * count:(i + 1) * count] for i in range(4))
        self.x = [t.requires_grad_(self.training) for t in x]
        self.target = [t.requires_grad_(self.training) for t in target]
        self.grads = {"tensor_ring": [*grad_out, *grad_target], "attention_mapping": [], "afw_layer": [*grad_out]}[case.op]

        torch.manual_seed(0)
        layer = FeatureWeightingLayer(config)
        if case.sweep:
            keep_signs(layer)
        if self.padded:
            self.layer = layer.to(device)
        else:
            backend = BACKEND[implementation]
            for op in ("tensor_ring", "attention_mapping"):
                try:
                    backends.choose(op, x, backend, rank=config.tensor_rank)
                except RuntimeError as reason:
                    raise Unavailable(str(reason)) from None
            self.module = FeatureWeighting([width] * count, config.tensor_rank, 1, config.beta, self.dropout, scale=config.theta_scale,
                                           ring=config.ring, feature_target=config.feature_target,
                                           feature_reduction=config.feature_reduction, backend=backend)
            self.layer = self.module.layers[0]
            self.layer.load_state_dict(layer.state_dict())
            self.module.to(device, torch.float64 if exact else torch.float32).train(self.training)
        used = {"tensor_ring": self.layer.attention, "attention_mapping": self.layer.wmn, "afw_layer": self.layer}[case.op]
        self.leaves = {f"x{j}": t for j, t in enumerate(self.x)}
        if case.op == "attention_mapping":
            self.leaves |= {f"target{j}": t for j, t in enumerate(self.target)}
        self.leaves |= dict(used.named_parameters())
        self.free = tuple(self.leaves.values())
        call = self._textbook if self.padded else self._packed
        self.call = torch.compile(call, dynamic=False) if implementation == "compiled" else call
        # Packed ops take the dtype of x; autocast is for the textbook.
        self.autocast = (lambda: torch.autocast(device, torch.bfloat16)) if self.padded and case.dtype == "bfloat16" else \
            contextlib.nullcontext
        self.graph = self.captured() if implementation == "graph" else None

    def _place(self, packed: Tensor) -> Tensor:
        if not self.padded:
            return packed
        return packed.new_zeros(*self.real.shape, packed.shape[1]).masked_scatter(self.real[:, :, None], packed)

    def _textbook(self, dropout: float) -> list[Tensor]:
        config, result = self.config, []
        if self.case.op != "attention_mapping":
            attention, gated = reference.tensor_ring(self.layer.attention, self.x, ring=config.ring, scale=config.theta_scale,
                                                     beta=config.beta, mask=self.real)
            target = gated if config.feature_target == "gated" else attention
            result = [F.dropout(g, dropout) for g in gated]
            if self.case.op == "tensor_ring":
                return result + target
        else:
            target = self.target
        if self.training or self.case.op == "attention_mapping":
            result.append(reference.attention_mapping(self.layer.wmn, self.x, target, reduction=config.feature_reduction,
                                                      mask=self.real))
        return result

    def _packed(self, dropout: float) -> list[Tensor]:
        module, layer = self.module, self.layer
        if self.case.op == "afw_layer":
            module.dropout = dropout
            out, loss = module(self.x, self.offsets)
            return [*out, loss] if self.training else out
        if self.case.op == "tensor_ring":
            weight, bias = stacked(*layer.attention.projections())
            out, target = ops.tensor_ring(
                self.x, self.offsets, weight, bias, [m.lin.weight for m in layer.attention.lin_att],
                [m.lin.bias for m in layer.attention.lin_att], ring=module.ring, scale=module.scale, beta=module.beta,
                dropout=dropout, gated_target=module.feature_target == "gated", backend=module.backend)
            return [*out, *target]
        return [ops.attention_mapping(self.x, self.target, [fc.weight for fc in layer.wmn.fc], [fc.bias for fc in layer.wmn.fc],
                                      reduction=module.feature_reduction, backend=module.backend)]

    def _gradients(self, outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        grads = self.grads if self.grads else []
        return torch.autograd.grad(outputs, tuple(self.leaves.values()),
                                   [*(g.to(o.dtype) for g, o in zip(grads, outputs)), *(None for _ in outputs[len(grads):])])

    def forward(self) -> list[Tensor]:
        with self.autocast():
            return self.call(self.dropout)

    def run(self) -> object:
        if self.graph is not None:
            return self.graph.replay()
        if self.training:
            return self._gradients(self.forward())
        with torch.no_grad():
            return self.forward()

    def captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._gradients(self.forward())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.kept = self._gradients(self.forward())
        return graph

    def result(self) -> dict[str, Tensor]:
        def packed(t: Tensor) -> Tensor:
            return t[self.real] if self.padded and t.dim() == 3 else t

        with self.autocast(), torch.set_grad_enabled(self.training):
            outputs = self.call(0.0)
        found = {f"output{i}": packed(t) for i, t in enumerate(outputs)}
        if self.training:
            gradients = {name: packed(t) for name, t in zip(self.leaves, self._gradients(outputs))}
            # q1, q2, k1 and k2 stacked, as the op has them: a bias of rank 1 alone is a single sum that can cancel to rounding.
            for j in range(len(self.x)):
                for kind in ("weight", "bias"):
                    parts = [gradients.pop(f"{prefix}trans_{q}.{j}.lin.{kind}", None) for q in ("q1", "q2", "k1", "k2")
                             for prefix in ("", "attention.")]
                    if parts := [t for t in parts if t is not None]:
                        gradients[f"projection.{j}.{kind}"] = torch.cat(parts)
            found |= {f"gradient of {name}": t for name, t in gradients.items()}
        return found


# ---------------------------------------------------------------------------------------------------------- cosine_fusion


class _Fusion(Competitor):
    """AMW: joint logits and log-probabilities; in training the disparity ratio too. Rows are packed for all."""

    def __init__(self, case: Case, implementation: str, device: str, exact: bool = False) -> None:
        self.config = config = case.shape.config(case.preset)
        self.training = case.mode == "training"
        stored, rows, g = getattr(torch, case.dtype), case.shape.utterances, torch.Generator().manual_seed(0)
        dtype = torch.float64 if exact else stored

        def draw(*shape: int) -> Tensor:                        # drawn in float32, rounded to the case's dtype
            return torch.randn(*shape, generator=g).to(stored).to(device, dtype)

        self.hidden = {m: draw(rows, config.hidden_dim).requires_grad_(self.training) for m in config.modalities}
        self.grad = draw(rows, config.num_classes)
        self.labels = torch.randint(0, config.num_classes, (rows,), generator=g).to(device) if self.training else None
        self.options = dict(amw=config.amw, cosine_norm=config.cosine_norm, scale=config.cosine_scale, score_from=config.score_from)
        torch.manual_seed(0)
        self.output = nn.Linear(len(config.modalities) * config.hidden_dim, config.num_classes, bias=config.cosine_bias or not config.amw)
        self.output.to(device, torch.float64 if exact else torch.float32)
        textbook = implementation in ("textbook", "compiled")
        if not textbook:
            self.backend = BACKEND[implementation]
            try:
                backends.choose("cosine_fusion", list(self.hidden.values()), self.backend)
            except RuntimeError as reason:
                raise Unavailable(str(reason)) from None
        call = self._textbook if textbook else self._packed
        self.call = torch.compile(call, dynamic=False) if implementation == "compiled" else call
        self.leaves = {f"hidden {m}": h for m, h in self.hidden.items()} | dict(self.output.named_parameters())
        self.free = tuple(self.leaves.values())
        self.autocast = (lambda: torch.autocast(device, torch.bfloat16)) if textbook and case.dtype == "bfloat16" else \
            contextlib.nullcontext

    def _textbook(self) -> list[Tensor]:
        joint, unimodal = reference.cosine_fusion(self.hidden, self.output, **self.options)
        found = [joint, torch.stack([F.log_softmax(logits, dim=1) for logits in unimodal.values()])]
        return found + [torch.stack(list(vectorised_ratio(unimodal, self.labels).values()))] if self.training else found

    def _packed(self) -> list[Tensor]:
        joint, log_prob, _, ratio = ops.cosine_fusion(list(self.hidden.values()), self.output.weight, self.output.bias, self.labels,
                                                      backend=self.backend, **self.options)
        return [joint, log_prob, ratio] if self.training else [joint, log_prob]

    def _gradients(self, joint: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(joint, tuple(self.leaves.values()), self.grad.to(joint.dtype))

    def forward(self) -> list[Tensor]:
        with self.autocast():
            return self.call()

    def run(self) -> object:
        if self.training:
            return self._gradients(self.forward()[0])
        with torch.no_grad():
            return self.forward()

    def result(self) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.training):
            outputs = self.forward()
        found = dict(zip(("joint", "log_prob", "ratio"), outputs))
        if self.training:
            found |= {f"gradient of {name}": t for name, t in zip(self.leaves, self._gradients(outputs[0]))}
        return found


# -------------------------------------------------------------------------------------------------------------- the model


def vectorised_ratio(unimodal_logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """`reference.disparity_ratio` without its loop over utterances: the textbook is to compete at its best."""
    score = {m: logits.softmax(1).gather(1, labels[:, None]).sum() for m, logits in unimodal_logits.items()}
    weakest = torch.stack(list(score.values())).min()
    return {m: s / weakest for m, s in score.items()}


class Textbook(reference.Ada2I):
    """The textbook model with the vectorised score: its own code over a copy of its globals."""

    forward = types.FunctionType(_textbook.Ada2I.forward.__code__, {**vars(_textbook), "disparity_ratio": vectorised_ratio},
                                 "forward", _textbook.Ada2I.forward.__defaults__)


@contextlib.contextmanager
def without_dropout(model: nn.Module):
    """Dropout off and everything else in training mode."""
    changed = []

    def put(holder, name, value):
        changed.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    put(model, "config", model.config.replace(dropout=0.0))
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            put(part, "p", 0.0)
        elif isinstance(getattr(part, "dropout", None), float):
            put(part, "dropout", 0.0)
    try:
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


class _Model(Competitor):
    """The whole model: a training step (forward, backward, clip, modulation, noise, Adam), or an evaluation forward."""

    def __init__(self, case: Case, implementation: str, device: str, exact: bool = False) -> None:
        config = case.shape.config(case.preset)
        self.training, self.padded = case.mode == "training", implementation in ("textbook", "compiled", "released")
        lengths = torch.tensor(case.shape.lengths)
        g = torch.Generator().manual_seed(0)
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        tensors = {m: (torch.randn(*real.shape, w, generator=g) * real[:, :, None]).to(device)
                   for m, w in config.input_widths.items()}
        labels = torch.randint(0, config.num_classes, (int(lengths.sum()),), generator=g).to(device)
        torch.manual_seed(0)
        initial = (reference.Ada2I if implementation == "released" else Textbook)(config)
        keep_signs(initial)
        if self.padded:
            self.model = initial.to(device)
            self.arguments = (tensors, lengths.to(device), labels if self.training else None)
            self.call = torch.compile(self.model, dynamic=False) if implementation == "compiled" else self.model
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        else:
            backend = BACKEND[implementation]
            probe = [torch.empty(1, config.hidden_dim, device=device, dtype=getattr(torch, case.dtype))] * len(config.modalities)
            try:
                backends.choose("tensor_ring", probe, backend, rank=config.tensor_rank)
            except RuntimeError as reason:
                raise Unavailable(str(reason)) from None
            self.model = self.call = Ada2I(config, backend=backend)
            self.model.load_state_dict(initial.state_dict())
            self.model.to(device, torch.float64 if exact else torch.float32)
            batch = DialogueBatch.from_padded(tensors, lengths, labels if self.training else None)
            self.arguments = (batch.to(dtype=torch.float64) if exact else batch,)
            self.optimizer = None if exact else BalancedAdam(self.model)
        self.settings = PLAIN if implementation == "algebra" else {}
        self.model.train(self.training)
        self.free = (*self.model.parameters(), *(tensors.values() if self.padded else self.arguments[0].features.values()))
        self.autocast = (lambda: torch.autocast(device, torch.bfloat16)) if case.dtype == "bfloat16" and not exact else \
            contextlib.nullcontext
        self.step = None
        if implementation == "graph":
            try:
                self.step = GraphedStep(self.model, self.optimizer, mode="graph", context=self.autocast)
            except RuntimeError as reason:
                raise Unavailable(str(reason)) from None

    def forward(self):
        with environment(self.settings), self.autocast():
            return self.call(*self.arguments)

    def run(self) -> object:
        if not self.training:
            with torch.no_grad():
                return self.forward()
        if self.step is not None:
            return self.step(*self.arguments)
        self.model.zero_grad(set_to_none=True)
        out = self.forward()
        with environment(self.settings):
            out.loss.backward()
            if self.padded:
                return reference.balanced_step(self.model, self.optimizer, out.ratio)
            return self.optimizer.step(out.ratio)

    def result(self) -> dict[str, Tensor]:
        """Log-probabilities; in training the loss and one vector of all gradients too (single tensors of a
        network this deep can be all rounding)."""
        if not self.training:
            return {"log_prob": self.run().log_prob}
        with without_dropout(self.model):
            self.model.zero_grad(set_to_none=True)
            out = self.forward()
            with environment(self.settings):
                out.loss.backward()
        gradients = torch.cat([p.grad.flatten() for _, p in sorted(self.model.named_parameters()) if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return {"log_prob": out.log_prob, "loss": out.loss, "gradients": gradients}
