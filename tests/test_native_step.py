"""The whole model and whole training steps on the native CPU ops, in float32, against the textbook in float64."""

from __future__ import annotations

import pytest
import torch

from ada2i_fast import Ada2I, BalancedAdam, DialogueBatch, cpu, reference
from model_cases import padded_case, small_config

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
LENGTHS = [7, 3, 13, 1]


def models(preset, **changes):
    """Textbook in float64, textbook in float32, fast in float32 on native ops: the same parameters, exactly."""
    config = small_config(preset, **{**dict(noise="none", input_widths={"a": 20, "t": 36, "v": 33}), **changes})
    torch.manual_seed(4)
    fast = Ada2I(config)
    exact, usual = reference.Ada2I(config).double(), reference.Ada2I(config)
    usual.load_state_dict(fast.state_dict())
    exact.load_state_dict({name: v.double() for name, v in fast.state_dict().items()})
    tensors, lengths, labels = padded_case(LENGTHS, config.input_widths, dtype=torch.float32)
    batch = DialogueBatch.from_padded(tensors, lengths, labels)
    return ((exact, lambda: exact({m: x.double() for m, x in tensors.items()}, lengths, labels)),
            (usual, lambda: usual(tensors, lengths, labels)), (fast, lambda: fast(batch)))


@pytest.mark.parametrize("preset", ["published", "released"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_error_of_outputs_and_gradients(preset, train):
    """At most twice the textbook's own float32 error plus 32 roundings of the largest element, tensor by tensor."""
    results = []
    for model, call in models(preset):
        model.train(train)
        out = call()
        out.loss.backward()
        results.append([out.log_prob.detach(), out.loss.detach(), out.feature_loss.detach(),
                        *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())])
    for i, (e, u, got) in enumerate(zip(*results)):
        assert (got - e).abs().max() <= 2 * (u - e).abs().max() + 32 * 2.0 ** -24 * e.abs().max(), i


@pytest.mark.parametrize("preset", ["published", "released"])
def test_trajectory_of_twenty_steps(preset):
    """Losses of 20 steps without dropout and noise stay as near to the float64 textbook as the float32 textbook's do, twice over."""
    curves = []
    ratio = {"a": torch.tensor(1.0), "t": torch.tensor(2.5), "v": torch.tensor(1.2)}
    for i, (model, call) in enumerate(models(preset, learning_rate=1e-3)):
        adam = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-8)
        balanced = BalancedAdam(model, lr=1e-3, backend="cpu") if i == 2 else None
        curve = []
        for step in range(20):
            model.zero_grad()
            out = call()
            out.loss.backward()
            for p in model.parameters():                        # the textbook's step wants every gradient
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            if balanced:
                balanced.step(ratio)
            else:
                reference.balanced_step(model, adam, ratio)
            curve.append(out.loss.item())
        curves.append(torch.tensor(curve, dtype=torch.float64))
    exact, usual, got = curves
    assert exact[-1] < exact[0] - 0.1
    assert (got - exact).abs().max() <= 2 * (usual - exact).abs().max() + 32 * 2.0 ** -24 * exact.abs().max()


def test_dropout_follows_torch_seed_and_differs_from_step_to_step():
    config = small_config("published", dropout=0.5)
    model = Ada2I(config)
    batch = DialogueBatch.from_padded(*padded_case(LENGTHS, dtype=torch.float32))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        out = model(batch)
        out.loss.backward()
        runs.append([out.log_prob.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1])) and not torch.equal(runs[0][0], runs[2][0])
    torch.manual_seed(1)
    first, second = model(batch).log_prob, model(batch).log_prob
    assert torch.equal(first, runs[0][0]) and not torch.equal(first, second)


def test_gradients_with_dropout_are_those_of_the_function_computed():
    """Central differences of a whole float32 model along its gradient, the masks held by the seed."""
    model = Ada2I(small_config("published", dropout=0.3, afw=False))
    batch = DialogueBatch.from_padded(*padded_case(LENGTHS, dtype=torch.float32))

    def loss():
        torch.manual_seed(3)
        return model(batch).loss

    model.zero_grad()
    loss().backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad / norm, alpha=sign * 2e-3)
            ends.append(loss().double())
            for p in parameters:
                p.sub_(p.grad / norm, alpha=sign * 2e-3)
    assert ((ends[0] - ends[1]) / 4e-3).item() == pytest.approx(norm.item(), rel=2e-2)


def test_autocast_runs():
    model = Ada2I(small_config("published", dropout=0.3))
    batch = DialogueBatch.from_padded(*padded_case(LENGTHS, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
    out.loss.backward()
    assert all(p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in model.parameters())
