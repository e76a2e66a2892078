"""What goes into the model and what comes out: packed batches of dialogues, and the model's output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .ops.cosine_fusion import NO_LABEL
from .ops.dialogue_attention import DialogueOffsets

__all__ = ["Ada2IOutput", "DialogueBatch", "FixedBatch"]


@dataclass(frozen=True)
class DialogueBatch:
    """Utterances of B dialogues, packed: dialogue b owns rows `offsets[b] : offsets[b + 1]` of every modality.

    features: {modality: [N, d_m]} floating point, one dtype and device for all.
    offsets:  int64 [B + 1], `offsets[0] == 0`, non-decreasing, `offsets[B] == N`; on the features' device.
    labels:   int64 [N] class indices, or None (prediction).
    lengths:  utterances per dialogue as Python integers, so that no step asks the device for them.

    Raises ValueError (or TypeError for a wrong kind of argument) that names the argument, what was expected and what came.
    """

    features: Mapping[str, Tensor]
    offsets: Tensor
    labels: Tensor | None = None
    lengths: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.features, Mapping) or not self.features:
            raise ValueError("features: expected a non-empty mapping from modality to a tensor [N, d], "
                             f"got {type(self.features).__name__} with {len(self.features or ())} entries")
        offsets = self.offsets
        if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype != torch.int64:
            raise ValueError(f"offsets: expected an int64 tensor [B + 1], got {_kind(offsets)}")
        if not self.lengths and offsets.numel() > 1:
            object.__setattr__(self, "lengths", tuple(offsets.diff().tolist()))
            if offsets[0] != 0:
                raise ValueError(f"offsets: expected the first to be 0, got {int(offsets[0])}")
        if len(self.lengths) != offsets.numel() - 1:
            raise ValueError(f"lengths: expected {offsets.numel() - 1} of them (B), got {len(self.lengths)}")
        if self.lengths and min(self.lengths) < 0:
            b = min(range(len(self.lengths)), key=self.lengths.__getitem__)
            raise ValueError(f"offsets: expected a non-decreasing sequence, dialogue {b} has length {self.lengths[b]}")
        rows = sum(self.lengths)
        for name, x in self.features.items():
            if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
                raise ValueError(f"features[{name!r}]: expected a floating point tensor [N, d], got {_kind(x)}")
            if x.shape[0] != rows:
                raise ValueError(f"features[{name!r}]: expected {rows} rows (the sum of the dialogue lengths), got {x.shape[0]}")
        if self.labels is not None:
            y = self.labels
            if not isinstance(y, Tensor) or y.dim() != 1 or y.dtype != torch.int64:
                raise ValueError(f"labels: expected an int64 tensor [N], got {_kind(y)}")
            if y.shape[0] != rows:
                raise ValueError(f"labels: expected {rows} of them (one per utterance), got {y.shape[0]}")

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def num_dialogues(self) -> int:
        return len(self.lengths)

    @property
    def num_utterances(self) -> int:
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths) if self.lengths else 0

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @classmethod
    def from_padded(cls, tensors: Mapping[str, Tensor], lengths: Tensor | Sequence[int],
                    labels: Tensor | None = None) -> "DialogueBatch":
        """Packs padded rows {modality: [B, T, d_m]} with `lengths` [B] (1 <= length <= T).

        labels: flat [sum(lengths)], or padded [B, T]. Rows beyond a dialogue's length are dropped whatever they hold.
        """
        if not isinstance(tensors, Mapping) or not tensors:
            raise ValueError("tensors: expected a non-empty mapping from modality to a tensor [B, T, d]")
        host = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        for name, x in tensors.items():
            if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
                raise ValueError(f"tensors[{name!r}]: expected a floating point tensor [B, T, d], got {_kind(x)}")
        shapes = {name: tuple(x.shape[:2]) for name, x in tensors.items()}
        first = next(iter(shapes.values()))
        for name, shape in shapes.items():
            if shape != first:
                raise ValueError(f"tensors[{name!r}]: expected [B, T] = {list(first)} like the other modalities, got {list(shape)}")
        if len(host) != first[0]:
            raise ValueError(f"lengths: expected {first[0]} of them (B), got {len(host)}")
        for b, n in enumerate(host):
            if not 1 <= n <= first[1]:
                raise ValueError(f"lengths: expected 1 to {first[1]} (T) utterances, dialogue {b} has {n}")
        device = next(iter(tensors.values())).device
        rows = _rows(host, first[1], device)
        if isinstance(labels, Tensor) and labels.dim() == 2:
            if tuple(labels.shape) != first:
                raise ValueError(f"labels: expected [B, T] = {list(first)} or flat [N], got {list(labels.shape)}")
            labels = labels.reshape(-1)[rows.to(labels.device)]
        return cls({m: x.reshape(-1, x.shape[2]).index_select(0, rows) for m, x in tensors.items()},
                   _offsets(host, device), labels, tuple(host))

    def padded(self) -> tuple["DialogueBatch", Tensor]:
        """The same dialogues as equally long ones, zero rows appended, and the real rows' places [N] among the new.

        This is the `released` padding: padded rows are ordinary rows. Labels are kept for the real rows only, so they
        are not carried along.
        """
        length = self.max_length
        rows = _rows(self.lengths, length, self.device)
        equal = (length,) * self.num_dialogues
        if self.lengths == equal:
            return replace(self, labels=None), rows
        features = {m: x.new_zeros(len(equal) * length, x.shape[1]).index_copy(0, rows, x) for m, x in self.features.items()}
        return DialogueBatch(features, _offsets(equal, self.device), None, equal), rows

    def to(self, device=None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> "DialogueBatch":
        """Moves the batch; `dtype` applies to the features only."""
        def move(x):
            return None if x is None else x.to(device=device, non_blocking=non_blocking)
        return replace(self, features={m: x.to(device=device, dtype=dtype, non_blocking=non_blocking)
                                       for m, x in self.features.items()},
                       offsets=move(self.offsets), labels=move(self.labels))

    def pin_memory(self) -> "DialogueBatch":
        return replace(self, features={m: x.pin_memory() for m, x in self.features.items()},
                       offsets=self.offsets.pin_memory(),
                       labels=None if self.labels is None else self.labels.pin_memory())


@dataclass(frozen=True)
class FixedBatch:
    """A training batch whose shapes are fixed and whose content changes in place, as a CUDA graph needs it.

    features {modality: [N', d_m]}, offsets int64 [B' + 1] and labels int64 [N'] as in `DialogueBatch`, but how many rows and dialogues
    are real stands on the device only: rows beyond the first `rows` (int64 []) belong to dialogues of their own, have zero features
    and the label -100, and change no loss, no ratio and no gradient. rows None: the rows with the label -100 are padding inside the
    dialogues, ordinary rows but for the losses of the labels ("attended").  longest: no dialogue has more rows.
    """

    features: Mapping[str, Tensor]
    offsets: Tensor
    labels: Tensor
    rows: Tensor | None
    longest: int
    _filled: list[int | None] = field(default_factory=lambda: [None, None], repr=False, compare=False)    # rows and dialogues, by the last `fill_`

    @classmethod
    def empty(cls, like: DialogueBatch, rows: int, dialogues: int, longest: int, attended: bool = False) -> "FixedBatch":
        """Room for batches with the modalities, dtypes and device of `like`, without content."""
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.int64, device=like.device)

        return cls({m: x.new_zeros(rows, x.shape[1]) for m, x in like.features.items()}, zeros(dialogues + 1), zeros(rows),
                   None if attended else zeros(), longest)

    def fill_(self, batch: DialogueBatch) -> "FixedBatch":
        """Takes the content of a batch with labels, without asking the device for anything. ValueError where it does not fit."""
        n, count = batch.num_utterances, batch.num_dialogues
        size, slots = self.num_utterances, self.offsets.numel() - 1
        if batch.labels is None:
            raise ValueError("labels: expected int64 [N], got None")
        if batch.max_length > self.longest:
            raise ValueError(f"batch: expected dialogues of at most {self.longest} utterances, got {batch.max_length}")
        if self.rows is None:
            if count != slots or size != count * self.longest:
                raise ValueError(f"batch: expected {slots} dialogues, got {count}")
            places = DialogueOffsets(batch.offsets, self.longest).places(n)
            for m, x in self.features.items():
                x.zero_().index_copy_(0, places, batch.features[m])
            self.labels.fill_(NO_LABEL).index_copy_(0, places, batch.labels)
            torch.arange(0, size + 1, self.longest, out=self.offsets)
            return self
        if n > size or count + -(-(size - n) // self.longest) > slots:
            raise ValueError(f"batch: expected at most {size} utterances in at most {slots} dialogues, what is left over in dialogues of "
                             f"{self.longest} included, got {n} in {count}")
        before = self._filled.copy()
        end = size if None in before else before[0]             # rows from there on are filler already
        self._filled[:] = None, None                            # should anything fail in between
        for m, x in self.features.items():
            x[:n].copy_(batch.features[m])
            if n < end:
                x[n:end].zero_()
        self.labels[:n].copy_(batch.labels)
        if n < end:
            self.labels[n:end].fill_(NO_LABEL)
        self.offsets[:count + 1].copy_(batch.offsets)
        if before != [n, count]:
            for i in range(count + 1, slots + 1):
                self.offsets[i].fill_(min(n + (i - count) * self.longest, size))
            self.rows.fill_(n)
        self._filled[:] = n, count
        return self

    @property
    def lengths(self) -> DialogueOffsets:
        return DialogueOffsets(self.offsets, self.longest)

    @property
    def num_utterances(self) -> int:
        """N', filler included."""
        return self.labels.shape[0]


@dataclass(frozen=True)
class Ada2IOutput:
    """What the model returns. Unpacks into the four values of the released model, in its order.

    log_prob: [N, C] log-probabilities of the joint prediction.
    feature_loss: L_feature (eq. 12), summed over AFW layers; 0 in evaluation and without AFW.
    unimodal_log_prob: {modality: [N, C]}, without gradient.
    ratio: {modality: rho_m}, 0-dimensional, without gradient; None without labels.
    loss: L_main (eq. 14), 0-dimensional; None without labels.
    """

    log_prob: Tensor
    feature_loss: Tensor
    unimodal_log_prob: Mapping[str, Tensor]
    ratio: Mapping[str, Tensor] | None
    loss: Tensor | None = None

    def __iter__(self) -> Iterator:
        return iter((self.log_prob, self.feature_loss, self.unimodal_log_prob, self.ratio))


def _kind(x) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _offsets(lengths: Sequence[int], device) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device)


def _rows(lengths: Sequence[int], stride: int, device) -> Tensor:
    """Places of the real rows when every dialogue is given `stride` rows."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    first = counts.cumsum(0) - counts
    return (ids * stride + torch.arange(ids.numel()) - first[ids]).to(device)
