"""The packed model against the textbook, in float64, and its behaviour at the doors."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch.nn import functional as F

from ada2i_fast import Ada2I, Ada2IConfig, Ada2IOutput, DialogueBatch, reference
from model_cases import WIDTHS, GoldenCase, padded_case, small_config, spread_parameters

# Both sides compute in float64 the same polynomial of degree 13 per AFW layer behind the encoders, in another order:
# rounding of 2^-53 is multiplied by the degree, the two layers and the norm that the cosine divides by (1e-1 to 1e-2 here).
TOLERANCE = dict(rtol=1e-9, atol=1e-11)


def both(config, lengths, seed=0, train=True):
    """Textbook and fast model of the same parameters, run forward and backward on the same dialogues."""
    book, fast = reference.Ada2I(config).double(), Ada2I(config, backend="torch").double()
    assert list(book.state_dict()) == list(fast.state_dict())
    spread_parameters(book, seed)
    fast.load_state_dict(book.state_dict())
    tensors, counts, labels = padded_case(lengths, config.input_widths, config.num_classes, seed)
    results = []
    for model, call in ((book, lambda: book(tensors, counts, labels)),
                        (fast, lambda: fast(DialogueBatch.from_padded(tensors, counts, labels)))):
        model.train(train)
        out = call()
        out.loss.backward()
        results.append((model, out))
    return results


def assert_equal(first, second):
    (book, a), (fast, b) = first, second
    torch.testing.assert_close(b.log_prob, a.log_prob, **TOLERANCE)
    torch.testing.assert_close(b.feature_loss, a.feature_loss, **TOLERANCE)
    torch.testing.assert_close(b.loss, a.loss, **TOLERANCE)
    for m in a.ratio:
        torch.testing.assert_close(b.ratio[m], a.ratio[m], **TOLERANCE)
        torch.testing.assert_close(b.unimodal_log_prob[m], a.unimodal_log_prob[m], **TOLERANCE)
    for (name, p), q in zip(book.named_parameters(), fast.parameters()):
        p_grad = torch.zeros_like(p) if p.grad is None else p.grad
        q_grad = torch.zeros_like(q) if q.grad is None else q.grad
        scale = max(p_grad.abs().max().item(), 1e-3)
        assert (p_grad - q_grad).abs().max().item() <= 1e-9 * scale, name


PRESETS = ("released", "published")
LENGTHS = {"unequal": [7, 3, 5, 1], "equal": [4, 4, 4], "one dialogue": [9], "one utterance": [1], "long and short": [12, 1]}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_lengths(preset, lengths, train):
    assert_equal(*both(small_config(preset), lengths, train=train))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("modalities", ["atv", "tav", "vta", "vat", "at", "ta", "av", "tv", "vt", "a", "t", "v"])
def test_modalities_and_orders(preset, modalities):
    assert_equal(*both(small_config(preset, modalities=modalities), [5, 2, 3]))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("encoder", ["transformer", "lstm"])
@pytest.mark.parametrize("afw", [True, False], ids=["afw", "no afw"])
@pytest.mark.parametrize("amw", [True, False], ids=["amw", "no amw"])
def test_parts(preset, encoder, afw, amw):
    assert_equal(*both(small_config(preset, encoder=encoder, afw=afw, amw=amw), [6, 2, 4]))


OPTIONS = dict(padding=("attended", "masked"), attention_scale=(1.0, None, 0.5), ring_order=("list", "ring"),
               feature_target=("gated", "attention"), feature_reduction=("mean", "sum"), cosine_norm=("classes", "features"),
               cosine_scale=(1.0, 15.0), cosine_bias=(True, False), head=("none", "mlp"), score_from=("linear", "cosine"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option,value", [(name, value) for name, values in OPTIONS.items() for value in values])
def test_every_difference_is_an_option(preset, option, value):
    assert_equal(*both(small_config(preset, **{option: value}), [5, 2]))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_matters(option):
    """An option that changed nothing would pass any comparison of two implementations."""
    figures = []
    for value in OPTIONS[option][:2]:
        _, (_, out) = both(small_config("released", alpha=0.5, **{option: value}), [5, 2])
        figures.append(torch.stack([out.loss, out.ratio["a"], out.ratio["v"]]))
    assert (figures[0] - figures[1]).abs().max() > 1e-8


def test_more_than_three_modalities():
    config = small_config("published", modalities=("a", "t", "v", "p"), input_widths={**WIDTHS, "p": 7})
    assert config.ring[0] == (2, 3, 1)              # around t, a, v, p: names beyond t, a, v come behind them
    assert_equal(*both(config, [4, 2]))


def test_published_dialogues_do_not_depend_on_their_batch():
    """To the last bits of float64: a row's products are sums of the same terms, in whatever blocks the library takes them."""
    config = small_config("published")
    model = Ada2I(config, backend="torch").double().eval()
    spread_parameters(model)
    tensors, lengths, labels = padded_case([7, 3, 5, 1, 7])
    whole = model(DialogueBatch.from_padded(tensors, lengths, labels)).log_prob
    start = 0
    for b, n in enumerate(lengths.tolist()):
        for others in ([b], [b, (b + 1) % 5], [(b + 2) % 5, b]):
            batch = DialogueBatch.from_padded({m: x[others] for m, x in tensors.items()}, lengths[others])
            place = sum(lengths[o].item() for o in others[: others.index(b)])
            alone = model(batch).log_prob[place: place + n]
            torch.testing.assert_close(alone, whole[start: start + n], rtol=0, atol=64 * 2.0 ** -53 * whole.abs().max().item())
        start += n


def test_released_dialogues_do_depend_on_their_batch():
    model = Ada2I(small_config("released"), backend="torch").double().eval()
    spread_parameters(model)
    tensors, lengths, _ = padded_case([7, 3])
    whole = model(DialogueBatch.from_padded(tensors, lengths)).log_prob[7:]
    alone = model(DialogueBatch.from_padded({m: x[1:, :3] for m, x in tensors.items()}, lengths[1:])).log_prob
    assert (whole - alone).abs().max() > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_same_seed_same_initial_weights(preset):
    config = small_config(preset)
    torch.manual_seed(3)
    book = reference.Ada2I(config).state_dict()
    torch.manual_seed(3)
    fast = Ada2I(config).state_dict()
    assert all(torch.equal(book[name], fast[name]) for name in fast)


def test_dropout_is_used_in_training_and_follows_the_seed():
    config = small_config("published", dropout=0.5)
    model = Ada2I(config, backend="torch")
    tensors, lengths, labels = padded_case([5, 3], dtype=torch.float32)
    batch = DialogueBatch.from_padded(tensors, lengths, labels)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(batch).log_prob)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    model.eval()
    assert torch.equal(model(batch).log_prob, model(batch).log_prob)


def test_dropout_rate(monkeypatch):
    """Every dropout gets the configured probability in training: the zeros are counted where they are drawn."""
    rates = []
    real = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, **kw: (rates.append((p, training)), real(x, p, training))[1])
    real_attention = F.scaled_dot_product_attention
    attention = []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *a, **kw: (attention.append(kw.get("dropout_p")), real_attention(*a, **kw))[1])
    model = Ada2I(small_config("published", dropout=0.25), backend="torch")
    tensors, lengths, labels = padded_case([5, 5], dtype=torch.float32)
    model(DialogueBatch.from_padded(tensors, lengths, labels))
    # per modality and encoder layer: after attention, inside and after the feed-forward; per AFW layer and modality one
    assert len(rates) == 3 * 2 * 3 + 2 * 3 and set(p for p, _ in rates) == {0.25}
    assert attention == [0.25] * 6


# -- the doors -----------------------------------------------------------------------------------------------------------


def namespace(**changes):
    return Namespace(**{**dict(
        modalities="atv", embedding_dim={"iemocap": WIDTHS}, dataset="iemocap", emotion=None,
        dataset_label_dict={"iemocap": dict.fromkeys("abcdef"), "mosei7": dict.fromkeys("abcdefg"), "mosei2": dict.fromkeys("ab")},
        hidden_dim=14, drop_rate=0.0, encoder_modules="transformer", encoder_nlayers=2, mmt_nlayers=2, tensor_rank=5, beta=0.12,
        no_mmt=False, mmcosine=True, modulation=True, normalize=True, alpha=0.37, device="cpu"), **changes})


def test_namespace_gives_released_semantics():
    config = Ada2I(namespace()).config
    expected = Ada2IConfig.released("iemocap", input_widths=WIDTHS, hidden_dim=14, tensor_rank=5, dropout=0.0, beta=0.12, alpha=0.37)
    assert config == expected
    assert Ada2I(namespace(normalize=False)).config.noise == "none"
    assert Ada2I(namespace(no_mmt=True)).net.mmt is None
    assert Ada2I(namespace(emotion="7class")).config.num_classes == 7
    assert Ada2I(namespace(emotion="2class")).config.num_classes == 2
    assert not Ada2I(namespace(mmcosine=False)).config.amw
    with pytest.raises(ValueError, match="lacks 'tensor_rank'"):
        args = namespace()
        del args.tensor_rank
        Ada2I(args)


def test_released_dictionary():
    model = Ada2I(namespace()).double()
    spread_parameters(model)
    tensors, lengths, labels = padded_case([4, 2])
    log_prob, feature_loss, unimodal, ratio = model(
        {"tensor": tensors, "length": lengths, "label_tensor": labels, "speaker_tensor": None, "utterance_texts": []})
    out = model(DialogueBatch.from_padded(tensors, lengths, labels))
    assert isinstance(out, Ada2IOutput)
    assert torch.equal(log_prob, out.log_prob) and feature_loss.shape == (1,) and feature_loss.item() == out.feature_loss.item()
    assert set(unimodal) == set(ratio) == set("atv") and all(r.dim() == 0 for r in ratio.values())
    assert [torch.is_tensor(x) or isinstance(x, dict) for x in out] == [True] * 4       # unpacks into the same four


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])      # float32: the native pass, where it is built
def test_released_noise_has_the_spread_of_the_modulated_gradient(dtype):
    golden = GoldenCase("strong_modulation")
    torch.manual_seed(3)
    model = Ada2I(golden.config.replace(noise="gradient")).to(dtype)
    model.load_state_dict(golden.parameters)
    model(golden.batch.to(dtype=dtype)).loss.backward()
    ratio = {"a": torch.tensor(2.0), "t": torch.tensor(1.0), "v": torch.tensor(1.5)}
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.apply_modulation(ratio)
    for name, p in model.named_parameters():
        if name.endswith("linear1.weight"):                     # 2048 x d elements: the spread is known within 1 %
            m = name.split(".")[2]
            k = 1 - torch.tanh(golden.config.alpha * ratio[m]).item() if ratio[m] > 1 else 1.0
            noise = p.grad - k * before[name]
            assert noise.std().item() == pytest.approx(k * before[name].std().item(), rel=0.03)
            assert abs(noise.mean().item()) < 4 * noise.std().item() / noise.numel() ** 0.5
        if not name.startswith("net.encoder"):
            assert torch.equal(p.grad, before[name])


def test_a_single_element_tensor_gets_no_nan():
    model = Ada2I(namespace(embedding_dim={"iemocap": {"a": 1, "t": 12, "v": 15}}, hidden_dim=1))
    tensors, lengths, labels = padded_case([3, 2], {"a": 1, "t": 12, "v": 15}, dtype=torch.float32)
    out = model(DialogueBatch.from_padded(tensors, lengths, labels))
    out.loss.backward()
    model.apply_modulation(out.ratio)
    assert all(p.grad.isfinite().all() for p in model.net.encoder.parameters())


@pytest.mark.parametrize("data,message", [
    (5, "data: expected a DialogueBatch or the released dictionary, got int"),
    ({"tensor": {}}, "'length' is missing"),
    ({"tensor": {"a": 1, "t": 2}, "length": 1}, "expected modality 'v', got a, t"),
])
def test_bad_data(data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Ada2I(small_config("published"))(data)


def test_wrong_width_and_missing_modality():
    model = Ada2I(small_config("published"))
    tensors, lengths, labels = padded_case([3], {"a": 10, "t": 13, "v": 15}, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"batch.features\['t'\]: expected width 12, got 13"):
        model(DialogueBatch.from_padded(tensors, lengths, labels))
    tensors, lengths, labels = padded_case([3], dtype=torch.float32)
    del tensors["v"]
    with pytest.raises(ValueError, match="expected modality 'v', got a, t"):
        model(DialogueBatch.from_padded(tensors, lengths, labels))
    with pytest.raises(TypeError, match="expected an Ada2IConfig"):
        Ada2I({"hidden_dim": 3})
    with pytest.raises(ValueError, match="at least one utterance"):
        model(DialogueBatch({m: torch.zeros(0, d) for m, d in WIDTHS.items()}, torch.zeros(1, dtype=torch.int64)))


def test_without_labels_there_is_no_loss():
    out = Ada2I(small_config("published"))(DialogueBatch.from_padded(*padded_case([3, 1], dtype=torch.float32)[:2]))
    assert out.loss is None and out.ratio is None and out.log_prob.shape == (4, 6)


def test_empty_dialogues_among_others():
    """An empty dialogue has no rows, so it changes nothing under published semantics."""
    model = Ada2I(small_config("published"), backend="torch").double()
    spread_parameters(model)
    tensors, lengths, labels = padded_case([3, 2])
    batch = DialogueBatch.from_padded(tensors, lengths, labels)
    with_empty = DialogueBatch(batch.features, torch.tensor([0, 0, 3, 3, 5]), labels)
    torch.testing.assert_close(model(with_empty).log_prob, model(batch).log_prob, **TOLERANCE)
    lstm = Ada2I(small_config("published", encoder="lstm"), backend="torch").double()
    torch.testing.assert_close(lstm(with_empty).log_prob, lstm(batch).log_prob, **TOLERANCE)
