"""The textbook and the fast model reproduce every figure of the released implementation (float64)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ada2i_fast import Ada2I, BalancedAdam, reference
from model_cases import assert_summary

OUTPUT, GRADIENT, FEATURE_LOSS = 1e-9, 1e-7, 1e-6       # relative; the released code accumulates the feature loss in float32


@pytest.fixture(params=["textbook", "packed"])
def runner(request, golden):
    """A model filled with the case's parameters and a call that runs it on the case's batch."""
    if request.param == "textbook":
        model = reference.Ada2I(golden.config)
        call = lambda: model(golden.tensors, golden.lengths, golden.labels)  # noqa: E731
    else:
        model = Ada2I(golden.config)
        call = lambda: model(golden.batch)  # noqa: E731
    model.double().load_state_dict(golden.parameters, strict=True)
    return model, call


def test_parameters_keep_the_released_order(golden, runner):
    assert list(runner[0].state_dict()) == list(golden.parameters)


def test_evaluation(golden, runner):
    model, call = runner
    expected = golden.expected["eval"]
    model.eval()
    with torch.no_grad():
        out = call()
    assert out.feature_loss == 0
    assert_summary(out.log_prob, expected["log_prob"], OUTPUT, "log_prob")
    for m, e in expected["unimodal_log_prob"].items():
        assert_summary(out.unimodal_log_prob[m], e, OUTPUT, f"unimodal {m}")
    assert set(out.ratio) == set(expected["ratio"])
    for m, rho in expected["ratio"].items():
        assert out.ratio[m].item() == pytest.approx(rho, rel=OUTPUT)


def _backward(golden, runner):
    model, call = runner
    out = call()
    # The released loss adds a float32 feature loss; gradients are those of the float64 sum.
    out.loss.backward()
    return model, out


def test_training_forward_and_gradients(golden, runner):
    model, out = _backward(golden, runner)
    expected = golden.expected["train"]
    assert_summary(out.log_prob, expected["log_prob"], OUTPUT, "log_prob")
    assert out.feature_loss.item() == pytest.approx(_scalar(expected["feature_loss"]), rel=FEATURE_LOSS, abs=1e-30)
    assert out.loss.item() == pytest.approx(_scalar(expected["loss"]), rel=FEATURE_LOSS)
    assert F.nll_loss(out.log_prob, golden.labels).item() == pytest.approx(
        _scalar(expected["loss"]) - _scalar(expected["feature_loss"]), rel=FEATURE_LOSS)
    for m, rho in expected["ratio"].items():
        assert out.ratio[m].item() == pytest.approx(rho, rel=OUTPUT)
    for name, p in model.named_parameters():
        e = golden.expected["grad"][name]
        if e is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            assert_summary(p.grad, e, GRADIENT, name)


def test_clipping_modulation_and_adam(golden, runner):
    model, out = _backward(golden, runner)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-8)
    norm = reference.balanced_step(model, adam, out.ratio)
    _check_step(golden, model, norm)


def test_balanced_adam_takes_the_same_step(golden, runner):
    model, out = _backward(golden, runner)
    optimizer = BalancedAdam(model, lr=1e-3, weight_decay=1e-8)
    optimizer.step(out.ratio)
    _check_step(golden, model, optimizer.last_norm)


def test_released_door(golden):
    """The released dictionary in, four values out, `apply_modulation` after the script's own clipping."""
    model = Ada2I(golden.config).double()
    model.load_state_dict(golden.parameters)
    log_prob, feature_loss, unimodal, ratio = model(
        {"tensor": golden.tensors, "length": golden.lengths, "label_tensor": golden.labels})
    assert feature_loss.shape == (1,)
    loss = F.nll_loss(log_prob, golden.labels) + feature_loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=2.0, norm_type=2.0)
    model.apply_modulation(ratio)
    torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-8).step()
    _check_step(golden, model, None)


def _check_step(golden, model, norm):
    if norm is not None:
        assert norm.item() == pytest.approx(golden.expected["grad_norm"], rel=GRADIENT)
    for name, p in model.named_parameters():
        e = golden.expected["grad_after_clip_and_modulation"][name]
        if e is not None:
            assert_summary(p.grad, e, GRADIENT, f"gradient {name}")
        assert_summary(p, golden.expected["param_after_adam"][name], GRADIENT, f"parameter {name}")


def _scalar(value) -> float:
    if isinstance(value, dict):
        return value["head"][0]
    return value[0] if isinstance(value, list) else float(value)
