"""BalancedAdam against the textbook sequence, and the statistics of its noise."""

from __future__ import annotations

import copy

import pytest
import torch

from ada2i_fast import Ada2I, BalancedAdam, DialogueBatch, cpu, reference
from ada2i_fast.balance import disparity_ratio, modulation_coefficients
from ada2i_fast import node
from model_cases import padded_case, small_config, spread_parameters

RATIO = {"a": torch.tensor(1.0), "t": torch.tensor(2.5), "v": torch.tensor(1.2)}


def pair(**changes):
    config = small_config("released", **{**dict(noise="none", clip_norm=0.5), **changes})
    models = []
    for _ in range(2):
        model = Ada2I(config, backend="torch").double()
        spread_parameters(model)
        models.append(model)
    tensors, lengths, labels = padded_case([5, 2, 3])
    return models, DialogueBatch.from_padded(tensors, lengths, labels)


@pytest.mark.parametrize("changes", [{}, dict(clip_order="after"), dict(clip_norm=0.0), dict(clip_norm_type=1.0)],
                         ids=["released", "clip after", "no clipping", "L1 norm"])
def test_equals_the_textbook_over_several_steps(changes):
    (first, second), batch = pair(**changes)
    adam = torch.optim.Adam(first.parameters(), lr=1e-3, weight_decay=1e-8)
    balanced = BalancedAdam(second, lr=1e-3)
    for step in range(4):
        ratio = None if step == 0 else RATIO            # the first epochs run without modulation
        for model in (first, second):
            model.zero_grad()
            model(batch).loss.backward()
        norm = reference.balanced_step(first, adam, ratio)
        balanced.step(ratio)
        torch.testing.assert_close(balanced.last_norm, norm, rtol=1e-10, atol=0)
    for (name, p), q in zip(first.named_parameters(), second.parameters()):
        torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-9, msg=name)


NATIVE = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


def float32_pair(**changes):
    (first, second), _ = pair(**changes)
    g = torch.Generator().manual_seed(5)
    grads = [[torch.randn(p.shape, generator=g, dtype=torch.float64).float() for p in first.parameters()] for _ in range(4)]
    return first, second.float(), grads


@NATIVE
@pytest.mark.parametrize("changes", [{}, dict(clip_order="after"), dict(clip_norm=0.0), dict(weight_decay=0.1)],
                         ids=["released", "clip after", "no clipping", "weight decay"])
def test_native_float32_equals_the_textbook(changes):
    """Four steps on given float32 gradients, the textbook in float64. An update is lr m / (sqrt(v) + eps) with |m| / sqrt(v) <= 1 to 3
    and some ten roundings of 2^-24 in it, plus one of theta per step; so lr 40 2^-24 + |theta| 4 2^-24 at most, doubled.
    """
    first, second, grads = float32_pair(**changes)
    first.load_state_dict({name: v.double() for name, v in second.state_dict().items()})
    lr, decay = 1e-3, first.config.weight_decay
    adam = torch.optim.Adam(first.parameters(), lr=lr, weight_decay=decay)
    balanced = BalancedAdam(second, lr=lr, backend="cpu")
    for step in range(4):
        ratio = None if step == 0 else RATIO
        for model in (first, second):
            for p, g in zip(model.parameters(), grads[step]):
                p.grad = g.to(p.dtype).clone()
        norm = reference.balanced_step(first, adam, ratio)
        balanced.step(ratio)
        torch.testing.assert_close(balanced.last_norm.double(), norm, rtol=1e-6, atol=0)
        assert all(torch.equal(p.grad, g) for p, g in zip(second.parameters(), grads[step]))
    for (name, p), q in zip(first.named_parameters(), second.parameters()):
        assert ((q - p).abs() <= 2 * 2.0 ** -24 * (40 * lr * 4 + 4 * p.abs())).all(), name


@NATIVE
@pytest.mark.parametrize("kind", ["gradient", "parameter"])
def test_native_noise_has_the_documented_spread(kind):
    first, second, grads = float32_pair(noise=kind, clip_norm=3.0)
    lr = 1e-2
    name = "net.encoder.t.transformer_encoder.layers.0.self_attn.in_proj_weight"
    p = dict(second.named_parameters())[name]
    draws = []
    start = p.detach().clone()
    k = (1 - torch.tanh(second.config.alpha * RATIO["t"])).item()
    for step in range(40):
        with torch.no_grad():
            p.copy_(start)
        for q, g in zip(second.parameters(), grads[0]):
            q.grad = g.clone()
        optimizer = BalancedAdam(second, lr=lr, weight_decay=0.0, backend="cpu")
        optimizer.step(RATIO)
        g = p.grad * (3.0 / optimizer.last_norm) * k
        if kind == "gradient":                                  # the first moment of the first step is (1 - beta1) of the gradient
            draws.append(optimizer.state[p]["exp_avg"] / 0.1 - g)
        else:
            draws.append(p.detach() - (start - lr * g / (g.abs() + 1e-8)))
    noise = torch.stack(draws).flatten(1)
    expected = (g.std() if kind == "gradient" else lr * g.std() / k).item()
    assert noise.std().item() == pytest.approx(expected, rel=4.5 / (2 * noise.numel()) ** 0.5)
    assert abs(noise.mean().item()) < 4.5 * expected / noise.numel() ** 0.5
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 5 / noise.shape[1] ** 0.5


@NATIVE
def test_native_noise_follows_the_seed_and_only_where_it_is_needed():
    ends = []
    for seed in (1, 1, 2):
        _, model, grads = float32_pair(noise="parameter")
        for p, g in zip(model.parameters(), grads[0]):
            p.grad = g.clone()
        torch.manual_seed(seed)
        BalancedAdam(model, backend="cpu").step(RATIO)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1])) and not all(torch.equal(a, b) for a, b in zip(ends[0], ends[2]))
    state = torch.get_rng_state()
    BalancedAdam(model, backend="cpu").step()
    model.config = model.config.replace(noise="none")
    BalancedAdam(model, backend="cpu").step(RATIO)
    assert torch.equal(torch.get_rng_state(), state)


@NATIVE
def test_native_state_is_that_of_torch_adam():
    _, model, grads = float32_pair(clip_norm=0.0)
    for p, g in zip(model.parameters(), grads[0]):
        p.grad = g.clone()
    fast = BalancedAdam(model, backend="cpu")
    fast.step()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    state = copy.deepcopy(fast.state_dict())
    assert {k: v.dtype for k, v in state["state"][0].items()} == dict(step=torch.float32, exp_avg=torch.float32, exp_avg_sq=torch.float32)
    adam.load_state_dict(state)
    adam.step()
    fast.load_state_dict(adam.state_dict())
    fast.step()
    assert all(s["step"] == 3 for s in fast.state_dict()["state"].values())


@NATIVE
def test_named_backend_says_why_not():
    (model, _), batch = pair()
    model(batch).loss.backward()
    with pytest.raises(RuntimeError, match="balanced_adam: backend 'cpu' cannot serve this step: it serves dense float32"):
        BalancedAdam(model, backend="cpu").step()


@pytest.mark.parametrize("preset_noise", ["gradient", "parameter"])
def test_noise_statistics(preset_noise):
    """Mean 0, the documented spread, independent between tensors and steps."""
    (model, plain), batch = pair(noise=preset_noise, clip_norm=0.0, weight_decay=0.0)
    model(batch).loss.backward()
    lr = 1e-2
    name = "net.encoder.t.transformer_encoder.layers.0.linear1.weight"
    p = dict(model.named_parameters())[name]
    g = p.grad.clone()
    k = 1 - torch.tanh(model.config.alpha * RATIO["t"]).item()
    start = p.detach().clone()
    draws = []
    for step in range(40):
        with torch.no_grad():
            p.copy_(start)
        p.grad.copy_(g)
        optimizer = BalancedAdam(model, lr=lr, weight_decay=0.0)
        optimizer.step(RATIO)
        if preset_noise == "gradient":
            draws.append(p.grad - k * g)
        else:
            step_of_adam = lr * (k * g) / ((k * g).abs() + 1e-8)          # the first step of Adam
            draws.append(p.detach() - (start - step_of_adam))
        for q in model.parameters():
            if q.grad is not None and q is not p:
                q.grad.zero_()
    noise = torch.stack(draws).flatten(1)                                 # 40 x 384: spread known within 2 % (4 sigma)
    expected = k * g.std() + 1e-8 if preset_noise == "gradient" else lr * g.std()
    assert noise.std().item() == pytest.approx(expected.item(), rel=0.03)
    assert abs(noise.mean()) < 4 * expected / noise.numel() ** 0.5
    correlation = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / noise.shape[1] ** 0.5


def test_weakest_modality_keeps_its_gradient_and_gets_noise():
    (model, _), batch = pair(noise="gradient", clip_norm=0.0)
    model(batch).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    BalancedAdam(model).step(RATIO)
    changed = {name for name, p in model.named_parameters() if p.grad is not None and not torch.equal(p.grad, before[name])}
    assert changed == {name for name in before if name.startswith("net.encoder")}


# ---- what it asks of its tensors in one call, by node

NODE = pytest.mark.skipif(node.why_not() is not None, reason=str(node.why_not()))


@NODE
@pytest.mark.parametrize("noise", ["none", "gradient", "parameter"])
def test_node_is_what_python_does(noise, monkeypatch):
    """To the last bit, while gradients, states, rates and parameters come and go between steps; what does not fit the table is for Python."""
    def ends(one_call):
        _, model, grads = float32_pair(noise=noise, weight_decay=0.1)
        params, served = list(model.parameters()), []

        def watched(*arguments):
            found = one_call(*arguments)
            served.append(found is not None)
            return found

        monkeypatch.setattr(node, "balanced_adam", watched)
        optimizer = BalancedAdam(model, params=[dict(params=params[:9]), dict(params=params[9:-2], lr=3e-3)])
        torch.manual_seed(7)

        def step(ratio=RATIO):
            for i, p in enumerate(params):
                if p.grad is not None:
                    p.grad.copy_(grads[len(served) % 4][i])
            optimizer.step(ratio)

        for p in params:
            p.grad = torch.zeros_like(p)
        step()                                                  # no table yet: the node is not asked
        step()
        step(None)
        params[3].grad = None
        step()
        step()
        params[3].grad = torch.zeros_like(params[3])
        step()
        optimizer.param_groups[0]["lr"] = 5e-3
        step()
        square = next(p for p in params if p.dim() == 2 and 1 not in p.shape)
        square.grad = square.grad.t().contiguous().t()
        step()
        square.grad = square.grad.contiguous()
        step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step()
        step()
        optimizer.state[params[5]]["exp_avg"] = optimizer.state[params[5]]["exp_avg"] + 1.0
        step()
        optimizer.add_param_group(dict(params=params[-2:]))
        step()
        step()
        optimizer.param_groups[1]["params"].pop()
        step()
        return [t.clone() for p in params for t in (p.detach(), *optimizer.state.get(p, {}).values())] + [optimizer.last_norm], served

    expected, _ = ends(lambda *_: None)
    found, served = ends(NODE_CALL)
    assert len(expected) > 4 * 100 and all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
    assert served == [True, True, False, True, False, True, False, True, True, True, False, True, False], served


NODE_CALL = node.balanced_adam


@NODE
def test_node_declines_what_is_not_plain(monkeypatch):
    _, model, grads = float32_pair()
    params = list(model.parameters())
    for p, g in zip(params, grads[0]):
        p.grad = g.clone()
    optimizer = BalancedAdam(model)
    optimizer.step()

    def gathered(groups=None, state=None):
        return node.balanced_adam([group["params"] for group in optimizer.param_groups] if groups is None else groups,
                                  optimizer.state if state is None else state, optimizer.table.params, optimizer.table.steps)

    assert gathered() is not None and gathered([params[:4], tuple(params[4:])]) is not None
    for groups in ([params[1:]], [params[:-1]], [params[::-1]], [[*params, torch.nn.Parameter(params[0].detach())]][:0], [[None]], [["p"]], []):
        assert gathered(groups) is None, groups
    p, own = params[0], optimizer.state[params[0]]
    for wrong in (None, p.grad.to_sparse(), torch.zeros(p.shape).expand_as(p).t().contiguous().t() if p.dim() == 2 else None):
        kept, p.grad = p.grad, wrong
        assert gathered() is None
        p.grad = kept
    for change in (dict(exp_avg=own["exp_avg"].double()), dict(exp_avg_sq=torch.zeros(3)), dict(exp_avg=None), dict(step=own["step"].clone())):
        assert gathered(state={**optimizer.state, p: {**own, **change}}) is None, change
    for wrong in ({}, {**optimizer.state, p: None}, {**optimizer.state, p: {}}):
        assert gathered(state=wrong) is None
    found = gathered()
    settings, numbers = torch.zeros(len(params), 6, dtype=torch.float64), torch.arange(len(params))
    for wrong in ((settings.to("meta"), numbers), (settings, numbers.to("meta")), (settings.float(), numbers), (settings[1:], numbers), (settings, numbers[1:]), (settings, numbers.int())):
        with pytest.raises(ValueError, match="settings, numbers: expected float64"):
            found.update(*wrong, None, 0.9, 0.999, 1e-8)
    with pytest.raises(ValueError, match="seed: expected int64"):
        found.update(settings, numbers, torch.zeros(2), 0.9, 0.999, 1e-8)
    monkeypatch.setenv("ADA2I_FAST_BACKEND", "torch")
    assert gathered() is None


@NATIVE
@pytest.mark.parametrize("one_call", [False, pytest.param(True, marks=NODE)])
def test_a_graph_notices_a_step(one_call, monkeypatch):
    """That has saved parameters: its gradients would be those of others."""
    if not one_call:
        monkeypatch.setattr(node, "balanced_adam", lambda *_: None)
    _, model, grads = float32_pair()
    for p, g in zip(model.parameters(), grads[0]):
        p.grad = g.clone()
    optimizer = BalancedAdam(model)
    optimizer.step()
    p = next(p for p in model.parameters() if p.dim() == 2)
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_is_an_ordinary_optimizer():
    (model, twin), batch = pair()
    optimizer = BalancedAdam(model)
    assert optimizer.param_groups[0]["lr"] == model.config.learning_rate
    assert optimizer.param_groups[0]["weight_decay"] == model.config.weight_decay
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", factor=0.1, patience=0)

    def closure():
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(3):
        last = optimizer.step(closure=closure)
    assert last < first
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * model.config.learning_rate)

    twin.load_state_dict(model.state_dict())
    other = BalancedAdam(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))     # a state_dict refers to the live state
    for m, o in ((model, optimizer), (twin, other)):
        m.zero_grad()
        m(batch).loss.backward()
        o.step(RATIO)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_ratio_and_coefficients():
    ratio = disparity_ratio(torch.tensor([2.0, 1.0, 3.0]), "atv")
    assert {m: r.item() for m, r in ratio.items()} == {"a": 2.0, "t": 1.0, "v": 3.0}
    k = modulation_coefficients(ratio, 0.42)
    assert k["t"] == 1 and k["a"].item() == pytest.approx(1 - torch.tanh(torch.tensor(0.84)).item())
    # any ratio above 1 damps at once (spec section 4): rho = 1.000x gives .603 for alpha .42, .963 for .037
    assert modulation_coefficients({"a": torch.tensor(1.0001)}, 0.42)["a"].item() == pytest.approx(0.603, abs=1e-3)
    assert modulation_coefficients({"a": 1.0001}, 0.037)["a"].item() == pytest.approx(0.963, abs=1e-3)
