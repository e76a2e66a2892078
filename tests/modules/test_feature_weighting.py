"""`FeatureWeighting` alone, against the textbook's layers."""

from __future__ import annotations

import pytest
import torch

from ada2i_fast import cpu
from ada2i_fast.modules import FeatureWeighting
from ada2i_fast.reference import attention_mapping, tensor_ring
from ada2i_fast.reference.attention_mapping import AttentionMapping
from ada2i_fast.reference.tensor_ring import TensorRing
from model_cases import spread_parameters

LENGTHS = [4, 1, 6]
OFFSETS = torch.tensor([0, 4, 5, 11])


def textbook(afw, x, rank):
    """The same layers on padded rows, masked: outputs per modality and the feature loss."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    z = []
    for x_j in x:
        z.append(x_j.new_zeros(*mask.shape, x_j.shape[1]).masked_scatter(mask[:, :, None], x_j))
    loss = 0.0
    for layer in afw.layers:
        ring, mapping = TensorRing(afw.widths, rank).double(), AttentionMapping(afw.widths).double()
        ring.load_state_dict(layer.attention.state_dict())
        mapping.load_state_dict(layer.wmn.state_dict())
        attention, gated = tensor_ring(ring, z, ring=afw.ring, scale=afw.scale, beta=afw.beta, mask=mask)
        target = attention if afw.feature_target == "attention" else gated
        loss = loss + attention_mapping(mapping, z, target, reduction=afw.feature_reduction, mask=mask)
        z = gated
    return [z_j[mask] for z_j in z], loss


@pytest.mark.parametrize("widths", [[9], [9, 9], [7, 9, 8], [5, 6, 7, 4]], ids=lambda w: f"{len(w)} modalities")
@pytest.mark.parametrize("options", [{}, dict(scale=1.0, feature_target="gated", feature_reduction="mean")],
                         ids=["published", "released"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.skipif(cpu.why_not() is not None, reason="not built"))])
def test_equals_the_textbook(widths, options, backend):
    afw = FeatureWeighting(widths, rank=4, layers=2, beta=0.3, dropout=0.0, backend=backend, **options).double()
    spread_parameters(afw)
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(sum(LENGTHS), width, generator=g, dtype=torch.float64) for width in widths]
    out, loss = afw(x, OFFSETS)
    expected, expected_loss = textbook(afw, x, 4)
    for a, b in zip(out, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=0)


def test_default_ring_goes_onwards_and_scale_is_the_rank():
    afw = FeatureWeighting([4, 4, 4], rank=4)
    assert afw.ring == [[1, 2], [2, 0], [0, 1]] and afw.scale == 0.5


def test_evaluation_has_no_loss_and_no_dropout():
    afw = FeatureWeighting(widths=[8, 8, 8], rank=3, layers=1, beta=0.012, dropout=0.5).eval()
    x = [torch.randn(11, 8) for _ in range(3)]
    first, second = afw(x, OFFSETS), afw(x, OFFSETS)
    assert first[1] == 0 and all(torch.equal(a, b) for a, b in zip(first[0], second[0]))


def test_dropout_zeroes_its_share_and_scales_the_rest():
    afw = FeatureWeighting([400, 400], rank=2, layers=1, beta=1.0, dropout=0.25)
    x = [torch.randn(11, 400) for _ in range(2)]
    torch.manual_seed(0)
    dropped = afw(x, OFFSETS)[0]
    afw.eval()
    kept = afw(x, OFFSETS)[0]
    for a, b in zip(dropped, kept):
        zero = (a == 0).float().mean().item()
        assert abs(zero - 0.25) < 0.03                      # 4400 draws: 4.6 standard deviations
        torch.testing.assert_close(a[a != 0], b[a != 0] / 0.75)
    torch.manual_seed(0)
    afw.train()
    assert all(torch.equal(a, b) for a, b in zip(afw(x, OFFSETS)[0], dropped))


@pytest.mark.parametrize("arguments,message", [
    (dict(widths=[], rank=2), "widths: expected a positive width per modality"),
    (dict(widths=[4, 0], rank=2), "widths: expected a positive width"),
    (dict(widths=[4], rank=0), "rank: expected at least 1, got 0"),
    (dict(widths=[4], rank=1, layers=0), "layers: expected at least 1, got 0"),
    (dict(widths=[4], rank=1, dropout=1.0), "dropout: expected a probability below 1"),
    (dict(widths=[4], rank=1, feature_target="phi"), "feature_target: expected 'attention' or 'gated'"),
    (dict(widths=[4, 4], rank=1, ring=[[0], [1]]), "ring: expected, for each of 2 modalities"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureWeighting(**arguments)


def test_bad_inputs():
    afw = FeatureWeighting([4, 5], rank=2)
    with pytest.raises(ValueError, match="x: expected 2 modalities, got 1"):
        afw([torch.zeros(11, 4)], OFFSETS)
    with pytest.raises(ValueError, match=r"x\[1\]: expected \[11, 5\], got \[11, 4\]"):
        afw([torch.zeros(11, 4), torch.zeros(11, 4)], OFFSETS)
