"""Options, presets and their errors."""

from __future__ import annotations

import pytest

from ada2i_fast import Ada2IConfig

RELEASED = dict(padding="attended", attention_scale=1.0, ring_order="list", feature_target="gated", cosine_norm="classes",
                cosine_scale=1.0, cosine_bias=True, head="none", score_from="linear", noise="gradient", clip_order="before",
                dev_split="first_tenth", modulation_start=4)
PUBLISHED = dict(padding="masked", attention_scale=None, ring_order="ring", feature_target="attention", cosine_norm="features",
                 cosine_scale=10.0, cosine_bias=False, head="mlp", score_from="cosine", noise="parameter", clip_order="before",
                 dev_split="official", modulation_start=1)


@pytest.mark.parametrize("preset,options", [("released", RELEASED), ("published", PUBLISHED)])
def test_presets(preset, options):
    config = Ada2IConfig.preset(preset, "meld")
    assert {name: getattr(config, name) for name in options} == options
    assert (config.hidden_dim, config.tensor_rank, config.num_classes, config.batch_size, config.epochs) == (200, 6, 7, 10, 50)
    assert (config.weight_decay, config.dropout, config.clip_norm, config.early_stopping) == (1e-8, 0.5, 2.0, 20)
    assert (config.learning_rate, config.alpha) == ((1.3e-4, 0.42) if preset == "released" else (1.2e-4, 0.4))


def test_sizes_of_the_paper():
    iemocap = Ada2IConfig.released("iemocap")
    assert [iemocap.heads(m) for m in "tav"] == [6, 8, 8]
    meld = Ada2IConfig.released("meld")
    assert [meld.heads(m) for m in "tav"] == [6, 5, 6]
    assert meld.replace(input_widths={"a": 17, "t": 384, "v": 14}).heads("a") == 1
    assert Ada2IConfig.published("mosei7").num_classes == 7 and Ada2IConfig.published("mosei2").batch_size == 32


def test_rings():
    published = Ada2IConfig.published(modalities="tav")
    assert published.ring == ((1, 2), (2, 0), (0, 1))               # t <- a, v; a <- v, t; v <- t, a
    assert Ada2IConfig.released(modalities="atv").ring == ((1, 2), (0, 2), (0, 1))
    assert Ada2IConfig.published(modalities="v").ring == ((),)


def test_theta_scale():
    assert Ada2IConfig.published(tensor_rank=16).theta_scale == 0.25
    assert Ada2IConfig.released(tensor_rank=16).theta_scale == 1.0


def test_round_trip():
    config = Ada2IConfig.published("mosei7", modalities="ta", encoder_heads={"t": 4})
    assert Ada2IConfig.from_dict(config.to_dict()) == config
    assert config.replace(beta=1).beta == 1.0


@pytest.mark.parametrize("changes,message", [
    (dict(modalities=""), "modalities: expected one or more names"),
    (dict(modalities="tt"), "modalities: expected each name once"),
    (dict(modalities="tx"), "input_widths: expected a positive integer for modality 'x', got None"),
    (dict(input_widths={"a": 0, "t": 1, "v": 1}), "input_widths: expected a positive integer for modality 'a', got 0"),
    (dict(encoder="gru"), "encoder: expected one of transformer, lstm; got 'gru'"),
    (dict(padding="zeros"), "padding: expected one of attended, masked"),
    (dict(tensor_rank=0), "tensor_rank: expected a value of at least 1, got 0"),
    (dict(tensor_rank=2.5), "tensor_rank: expected an integer, got 2.5"),
    (dict(dropout=1.0), "dropout: expected a probability below 1, got 1.0"),
    (dict(dropout=-0.1), "dropout: expected a value from 0.0 to 1.0"),
    (dict(beta=float("nan")), "beta: expected a finite number"),
    (dict(afw="yes"), "afw: expected true or false, got 'yes'"),
    (dict(hidden_dim=15, encoder="lstm"), "hidden_dim: expected an even number with the lstm encoder"),
    (dict(encoder_heads={"t": 5}), "encoder_heads: expected a divisor of the width 768"),
    (dict(tensor_rnk=3), "unknown option 'tensor_rnk'; did you mean tensor_rank?"),
])
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        Ada2IConfig.published("iemocap", **changes)


def test_unknown_names():
    with pytest.raises(ValueError, match="dataset: expected one of iemocap, .*; got 'imocap'"):
        Ada2IConfig.published("imocap")
    with pytest.raises(ValueError, match="preset: expected released or published, got 'paper'"):
        Ada2IConfig.preset("paper")
