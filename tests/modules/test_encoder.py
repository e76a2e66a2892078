"""The Transformer encoder on packed rows under autocast; without it, tests/test_native_step.py holds it with the whole model."""

from __future__ import annotations

import copy

import pytest
import torch

from ada2i_fast import backends, cpu
from ada2i_fast import node
from ada2i_fast.modules import TransformerEncoder

LENGTHS = [7, 1, 12, 4]


def run(encoder, x, grad, dtype=None):
    """Output and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        z = encoder(x, LENGTHS)
    return [z.detach(), *torch.autograd.grad(z, [x, *encoder.parameters()], grad.to(z.dtype))]


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Twice the error of plain PyTorch under autocast, in each tensor's norm, and one rounding; types are those of plain PyTorch."""
    torch.manual_seed(0)
    native = TransformerEncoder(30, 20, heads=5, layers=2, feedforward_dim=64, dropout=0.0)
    plain = TransformerEncoder(30, 20, heads=5, layers=2, feedforward_dim=64, dropout=0.0, backend="torch")
    plain.load_state_dict(native.state_dict())
    x, grad = torch.randn(sum(LENGTHS), 30), torch.randn(sum(LENGTHS), 20)
    exact = run(copy.deepcopy(plain).double(), x.double(), grad.double())
    for got, usual, e in zip(run(native, x, grad, dtype), run(plain, x, grad, dtype), exact):
        assert got.dtype == usual.dtype and got.isfinite().all()
        assert (got - e).norm() <= 2 * (usual - e).norm() + torch.finfo(dtype).eps / 2 * e.norm()


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_autocast_keeps_the_native_ops_in_use(monkeypatch):
    """All of them serve bfloat16, so nothing falls back to plain PyTorch; asked where Python serves a layer, which the node does not."""
    seen = []
    monkeypatch.setattr(node, "encoder_layers", lambda *_: None)
    encoder = TransformerEncoder(30, 20, heads=5, layers=1, feedforward_dim=64, dropout=0.1)
    monkeypatch.setattr(backends, "best", lambda op, *facts, best=backends.best: seen.append((op, best(op, *facts))) or seen[-1][1])
    with torch.autocast("cpu", torch.bfloat16):
        encoder(torch.randn(sum(LENGTHS), 30), LENGTHS)
    assert {name for op, name in seen if op != "linear"} == {"cpu"} and {op for op, _ in seen} >= {"dialogue_attention", "dropout"}


def test_second_derivatives_under_autocast():
    """create_graph=True goes through plain expressions, mixed types included. Some twenty products deep, roundings of 2^-9 each: 10 %."""
    torch.manual_seed(0)
    encoder = TransformerEncoder(12, 8, heads=2, layers=1, feedforward_dim=16, dropout=0.0)
    x = torch.randn(sum(LENGTHS), 12)

    def penalty(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            z = encoder(x, LENGTHS)
        first = torch.autograd.grad(z.float().square().mean(), list(encoder.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(encoder.parameters()), allow_unused=True)

    for a, b in zip(penalty(True), penalty(False)):
        if b is not None and b.norm() > 1e-4:
            assert (a - b).norm() <= 0.1 * b.norm()
