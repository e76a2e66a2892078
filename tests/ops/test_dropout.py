"""The counter-based mask: the published Philox vectors, its statistics, and what it depends on."""

from __future__ import annotations

import pytest
import torch

from ada2i_fast.ops import keep_mask
from ada2i_fast.ops.dropout import threshold


def test_known_answer():
    """Random123's words for a zero counter and key: each is kept at its own threshold and dropped at the next."""
    for d, word in enumerate([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]):
        kept = [keep_mask(torch.tensor([0]), 0, 1, 4, w / 2 ** 32)[0, d].item() for w in (word, word + 1)]
        assert kept == [True, False]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_rate(p):
    mask = keep_mask(torch.tensor([123456789]), 1, 400, 301, p)
    n = mask.numel()
    assert abs(mask.double().mean().item() - (1 - p)) <= 4.5 * (p * (1 - p) / n) ** 0.5


def test_streams_seeds_and_places_are_independent():
    a = keep_mask(torch.tensor([1]), 0, 256, 256, 0.5).double() - 0.5
    for b in (keep_mask(torch.tensor([2]), 0, 256, 256, 0.5), keep_mask(torch.tensor([1]), 1, 256, 256, 0.5),
              keep_mask(torch.tensor([1 + (1 << 32)]), 0, 256, 256, 0.5)):
        assert abs((a * (b.double() - 0.5)).mean().item()) < 4.5 * 0.25 / 256
    assert (a.T @ a / 256).fill_diagonal_(0).abs().max() < 6 * 0.25 / 16       # columns
    assert (a @ a.T / 256).fill_diagonal_(0).abs().max() < 6 * 0.25 / 16       # rows


def test_a_row_does_not_depend_on_the_rows_or_columns_asked_for():
    seed = torch.tensor([-5])
    whole = keep_mask(seed, 3, 50, 40, 0.3)
    assert torch.equal(keep_mask(seed, 3, 20, 40, 0.3), whole[:20])
    assert torch.equal(keep_mask(seed, 3, 50, 13, 0.3), whole[:, :13])


def test_threshold():
    assert threshold(0.0) == 0 and threshold(0.5) == 1 << 31 and threshold(1.0) == (1 << 32) - 1
