"""Training steps as CUDA graphs: from the forward pass to the optimizer in one launch, for batches of any sizes.

A graph's shapes are fixed, a batch's are not. So a batch is brought into a `FixedBatch` of the next bucket: rows up to a multiple of
an eighth of the power of two below, the longest dialogue up to a power of two; what is left over is filler that changes nothing. With
padding "attended" padded rows do count, so there the sizes of a bucket are the batch's own. Each bucket is captured once, and what it
needs for its intermediate results is shared by all.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Callable, ContextManager, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from .. import backends
from ..balance import modulation_coefficients
from ..batch import DialogueBatch, FixedBatch
from ..model import Ada2I
from ..ops.linear import Branches, branch
from ..optim import BalancedAdam

__all__ = ["GraphedStep", "StepResult"]

WARM_UP = 3         # iterations on a side stream before a capture, as PyTorch asks for
HELD_GRAPH = "is an output or a loss of an earlier pass still held? Its graph binds the parameters to the stream of that pass: detach it"


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, on the device and without gradient: loss, feature_loss and norm (of the gradient, before clipping),
    0-dimensional; ratio and coefficient {modality: 0-dimensional}, the latter 1 without modulation."""

    loss: Tensor
    feature_loss: Tensor
    norm: Tensor
    ratio: Mapping[str, Tensor]
    coefficient: Mapping[str, Tensor]


class _Bucket(NamedTuple):
    rows: int
    dialogues: int
    longest: int
    modulate: bool
    layout: tuple           # of the features: modality, width, dtype


@dataclass
class _Captured:
    batch: FixedBatch
    graph: torch.cuda.CUDAGraph | None
    result: Tensor | None
    table: object           # the optimizer's, at whose addresses the graph writes


class GraphedStep:
    """`step(batch, modulate)`: zero_grad, forward, backward and `BalancedAdam.step`, replayed from CUDA graphs where that can be.

    model: an `Ada2I` in training mode; optimizer: its `BalancedAdam`.  buckets: ascending numbers of rows to round up to, instead of
    the above; a batch with more takes an ordinary step.  mode: "auto", ordinary steps where there can be no graphs, see `why_not`;
    "graph", RuntimeError with the reason there; "padded", the graphs' arithmetic without graphs, on any device; "eager", ordinary
    steps.  max_graphs: buckets beyond take ordinary steps.  context: entered around the forward pass, such as
    `lambda: torch.autocast("cuda", torch.bfloat16)`.

    Called with a `DialogueBatch` with labels; modulate: whether the ratio reaches the optimizer. Returns a `StepResult`; nothing waits
    for the device. Learning rates and weight decay may change between steps; betas, eps and the configuration may not. Dropout and
    noise follow torch's generator and differ at every replay. A capture leaves parameters, the optimizer's state and the generator as
    they were. After a replay `.grad` is None.
    """

    def __init__(self, model: Ada2I, optimizer: BalancedAdam, *, buckets: Sequence[int] | None = None, mode: str = "auto",
                 max_graphs: int = 64, context: Callable[[], ContextManager] = contextlib.nullcontext) -> None:
        if mode not in ("auto", "graph", "padded", "eager"):
            raise ValueError(f"mode: expected 'auto', 'graph', 'padded' or 'eager', got {mode!r}")
        if buckets is not None and (not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1):
            raise ValueError(f"buckets: expected ascending positive numbers of rows, got {list(buckets)}")
        self.model, self.optimizer, self.mode = model, optimizer, mode
        self.buckets = None if buckets is None else tuple(buckets)
        self.max_graphs = max_graphs
        self.context = context
        self._captured: dict[_Bucket, _Captured] = {}
        self._pool = None
        self._failed: str | None = None
        self._branches = len(model.config.modalities) > 1
        self._late = True           # gradients of parameters may be branches that end behind backward
        if mode == "graph" and (reason := self.why_not()):
            raise RuntimeError(f"no CUDA graphs: {reason}")

    def why_not(self) -> str | None:
        """Why steps are not CUDA graphs, or None."""
        if self.mode in ("padded", "eager"):
            return f"mode is {self.mode!r}"
        if self.device.type != "cuda":
            return f"the model is on {self.device}"
        return self._failed or self._why_not_fixed()

    def _why_not_fixed(self) -> str | None:
        if self.model.config.encoder == "lstm":
            return "a biLSTM packs its dialogues on the host"
        if not isinstance(self.optimizer, BalancedAdam):
            return f"the optimizer is a {type(self.optimizer).__name__}, not a BalancedAdam"
        if self.mode != "padded" and (reason := self.optimizer.why_not_fused({})):
            return f"BalancedAdam steps in plain PyTorch: {reason}"
        return None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __call__(self, batch: DialogueBatch, modulate: bool = True) -> StepResult:
        if batch.labels is None:
            raise ValueError("batch: expected labels, got none")
        if batch.device != self.device:
            batch = batch.to(self.device, non_blocking=True)
        captured = None if self.mode == "eager" else self._captured_for(batch, modulate)
        if captured is None:
            return self._result(self._step(batch, modulate))
        captured.batch.fill_(batch)
        if self.mode == "padded":
            return self._result(self._step(captured.batch, modulate))
        if captured.graph is None or captured.table is not self.optimizer.table:
            try:
                self._capture(captured, modulate)
            except RuntimeError as error:
                if self.mode == "graph":
                    error.add_note(HELD_GRAPH)
                    raise
                self._failed = f"a capture failed: {str(error).strip().splitlines()[0]} ({HELD_GRAPH})"
                self._captured.clear()
                return self._result(self._step(batch, modulate))
        self.optimizer.refresh()
        captured.graph.replay()
        return self._result(captured.result.clone())

    def _captured_for(self, batch: DialogueBatch, modulate: bool) -> _Captured | None:
        """The bucket's, perhaps not captured yet; None for an ordinary step."""
        bucket = self._bucket(batch, modulate)
        if bucket is None or bucket in self._captured:
            return self._captured.get(bucket)
        reason = self._why_not_fixed() if self.mode == "padded" else self.why_not()
        if reason or len(self._captured) >= self.max_graphs:
            return None
        fixed = FixedBatch.empty(batch, bucket.rows, bucket.dialogues, bucket.longest, self.model.config.padding == "attended")
        captured = self._captured[bucket] = _Captured(fixed, None, None, None)
        return captured

    # -- buckets -----------------------------------------------------------------------------------------------------

    def _bucket(self, batch: DialogueBatch, modulate: bool) -> _Bucket | None:
        """The bucket of a batch; None for one with more rows than any."""
        rows, dialogues, longest = batch.num_utterances, batch.num_dialogues, batch.max_length
        layout = tuple((m, x.shape[1], x.dtype) for m, x in batch.features.items())
        if self.model.config.padding == "attended":
            return _Bucket(dialogues * longest, dialogues, longest, modulate, layout)
        if self.buckets is None:
            grain = max(16, (1 << (rows.bit_length() - 1)) // 8)
            size = -(-rows // grain) * grain
        else:
            size = next((size for size in self.buckets if size >= rows), None)
            if size is None:
                return None
            grain = size - next((smaller for smaller in reversed(self.buckets) if smaller < size), 0)
        longest = max(16, 1 << (longest - 1).bit_length())
        return _Bucket(size, dialogues + -(-(grain - 1) // longest), longest, modulate, layout)

    # -- the step ----------------------------------------------------------------------------------------------------

    def _step(self, batch: DialogueBatch | FixedBatch, modulate: bool) -> Tensor:
        """An ordinary step. Returns loss, feature loss, ratios, coefficients and the norm in one vector."""
        self.optimizer.zero_grad()
        with self.context(), backends.for_a_graph() if isinstance(batch, FixedBatch) else contextlib.nullcontext():
            out = self.model(batch)
        with branch(self.device) as beside:                     # backward does not wait for what is only looked at
            head = beside(functools.partial(self._observed, modulate), out.loss.detach(), out.feature_loss.detach(), *[rho.detach() for rho in out.ratio.values()])
            self._backward(out.loss)
            self.optimizer.step(out.ratio if modulate else None)
        return torch.cat((head, self.optimizer.last_norm.to(head).reshape(1)))

    def _backward(self, loss: Tensor) -> None:
        parameters = [*self.model.parameters()]
        if not self._late or not loss.is_cuda or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
            loss.backward()
            return
        with Branches.joined(self.device) as branches:
            loss.backward()
        if not branches.all_in([p.grad for p in parameters]):
            raise RuntimeError("gradients of parameters are needed before backward ends")

    def _observed(self, modulate: bool, loss: Tensor, feature_loss: Tensor, *ratios: Tensor) -> Tensor:
        ratio = torch.stack(ratios)
        coefficient = modulation_coefficients({"all": ratio}, self.model.config.alpha)["all"] if modulate else torch.ones_like(ratio)
        return torch.cat((torch.stack((loss, feature_loss.to(loss))), ratio.to(loss), coefficient.to(loss)))

    def _result(self, vector: Tensor) -> StepResult:
        names = self.model.config.modalities
        loss, feature_loss, *rest, norm = vector.unbind()
        self.optimizer.last_norm = norm
        return StepResult(loss, feature_loss, norm, dict(zip(names, rest)), dict(zip(names, rest[len(names):])))

    # -- capture -----------------------------------------------------------------------------------------------------

    def _capture(self, captured: _Captured, modulate: bool) -> None:
        """Captures a step, with the encoders as parallel branches if they can be."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        before = self.model.side_by_side
        try:
            while True:
                self.model.side_by_side = self._branches
                try:
                    return self._capture_once(captured, modulate)
                except RuntimeError:
                    if not self._late and not self._branches:
                        raise
                    self._late, self._branches = False, self._branches and self._late
                    self._pool = torch.cuda.graph_pool_handle()     # that of a failed capture may be gone
        finally:
            self.model.side_by_side = before
            self.optimizer.zero_grad()

    def _capture_once(self, captured: _Captured, modulate: bool) -> None:
        device = self.device
        with torch.cuda.device(device):
            with self._undone(device):
                side = torch.cuda.Stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        self._step(captured.batch, modulate)
                torch.cuda.current_stream(device).wait_stream(side)
                if reason := self.optimizer.why_not_fused({}):
                    raise RuntimeError(f"BalancedAdam steps in plain PyTorch: {reason}")
            self.optimizer.refresh()
            self.optimizer.zero_grad()                      # so that the graph's gradients live in its own memory
            captured.graph = torch.cuda.CUDAGraph()
            # Before what `branch` puts beside it.
            with torch.cuda.graph(captured.graph, pool=self._pool, stream=torch.cuda.Stream(device, priority=-1)):
                captured.result = self._step(captured.batch, modulate)
                self.optimizer.zero_grad()                  # their memory is free for the next bucket
            captured.table = self.optimizer.table

    @contextlib.contextmanager
    def _undone(self, device: torch.device):
        """Whatever happens inside leaves parameters, the optimizer's state and the generator as they were; states that did not exist
        are those of a new optimizer."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        states = [{name: t.clone() for name, t in self.optimizer.state.get(p, {}).items()} for p in parameters]
        numbers = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value, state in zip(parameters, before, states):
                    p.copy_(value)
                    for name, t in self.optimizer.state.get(p, {}).items():
                        t.copy_(state[name]) if name in state else t.zero_()
            if device.type == "cuda":
                torch.cuda.set_rng_state(numbers, device)
            else:
                torch.set_rng_state(numbers)
