"""Packed batches."""

from __future__ import annotations

import pytest
import torch

from ada2i_fast import DialogueBatch
from model_cases import padded_case


def test_from_padded_keeps_real_rows_in_order():
    tensors, lengths, labels = padded_case([3, 1, 2])
    for x in tensors.values():
        x[1, 1:] = float("nan")                     # padding may hold anything
    batch = DialogueBatch.from_padded(tensors, lengths, labels)
    assert batch.offsets.tolist() == [0, 3, 4, 6] and batch.lengths == (3, 1, 2)
    assert (batch.num_dialogues, batch.num_utterances, batch.max_length, batch.modalities) == (3, 6, 3, ("a", "t", "v"))
    for m, x in tensors.items():
        assert torch.equal(batch.features[m], torch.cat([x[0, :3], x[1, :1], x[2, :2]]))
    padded_labels = torch.full((3, 3), -7)
    padded_labels[torch.arange(3) < lengths[:, None]] = labels
    assert torch.equal(DialogueBatch.from_padded(tensors, lengths, padded_labels).labels, labels)


def test_padded_appends_zero_rows():
    tensors, lengths, labels = padded_case([3, 1, 2])
    batch = DialogueBatch.from_padded(tensors, lengths, labels)
    padded, real = batch.padded()
    assert padded.lengths == (3, 3, 3) and real.tolist() == [0, 1, 2, 3, 6, 7] and padded.labels is None
    for m, x in tensors.items():
        assert torch.equal(padded.features[m].view(3, 3, -1), x)
    equal = DialogueBatch.from_padded(*padded_case([2, 2])).padded()
    assert equal[1].tolist() == [0, 1, 2, 3]


def test_to_moves_dtype_of_features_only():
    batch = DialogueBatch.from_padded(*padded_case([2, 1])).to(dtype=torch.float32)
    assert {x.dtype for x in batch.features.values()} == {torch.float32}
    assert batch.offsets.dtype == batch.labels.dtype == torch.int64


TENSORS, COUNTS, LABELS = padded_case([3, 2])
ROWS = {"t": torch.zeros(5, 4)}
OFFSETS = torch.tensor([0, 3, 5])


@pytest.mark.parametrize("make,message", [
    (lambda: DialogueBatch({}, OFFSETS), "features: expected a non-empty mapping"),
    (lambda: DialogueBatch({"t": torch.zeros(5, 4, dtype=torch.int32)}, OFFSETS), r"features\['t'\]: expected a floating point tensor \[N, d\]"),
    (lambda: DialogueBatch({"t": torch.zeros(4, 4)}, OFFSETS), r"features\['t'\]: expected 5 rows .* got 4"),
    (lambda: DialogueBatch(ROWS, OFFSETS.int()), r"offsets: expected an int64 tensor \[B \+ 1\], got torch.int32"),
    (lambda: DialogueBatch(ROWS, torch.tensor([1, 5])), "offsets: expected the first to be 0, got 1"),
    (lambda: DialogueBatch(ROWS, torch.tensor([0, 6, 5])), "offsets: expected a non-decreasing sequence, dialogue 1 has length -1"),
    (lambda: DialogueBatch(ROWS, OFFSETS, torch.zeros(5)), "labels: expected an int64"),
    (lambda: DialogueBatch(ROWS, OFFSETS, torch.zeros(4, dtype=torch.int64)), "labels: expected 5 of them"),
    (lambda: DialogueBatch.from_padded({}, COUNTS), "tensors: expected a non-empty mapping"),
    (lambda: DialogueBatch.from_padded({"t": torch.zeros(2, 3)}, COUNTS), r"tensors\['t'\]: expected a floating point tensor \[B, T, d\]"),
    (lambda: DialogueBatch.from_padded({"t": TENSORS["t"], "a": TENSORS["a"][:, :2]}, COUNTS), r"tensors\['a'\]: expected \[B, T\] = \[2, 3\]"),
    (lambda: DialogueBatch.from_padded(TENSORS, [3]), "lengths: expected 2 of them"),
    (lambda: DialogueBatch.from_padded(TENSORS, [3, 0]), r"lengths: expected 1 to 3 \(T\) utterances, dialogue 1 has 0"),
    (lambda: DialogueBatch.from_padded(TENSORS, [4, 1]), r"lengths: expected 1 to 3 \(T\) utterances, dialogue 0 has 4"),
    (lambda: DialogueBatch.from_padded(TENSORS, COUNTS, LABELS[:4]), "labels: expected 5 of them"),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
