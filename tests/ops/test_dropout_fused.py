"""The fused dropout forms on the CPU: against float64 with the same masks, their gradients and their statistics."""

from __future__ import annotations

import pytest
import torch

from afw_cases import assert_same_bits_with_threads
from ada2i_fast import cpu
from ada2i_fast.ops import keep_mask
from ada2i_fast.ops.dropout import dropout_norm_torch, dropout_residual_norm, relu_dropout, relu_dropout_torch

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
SEED = torch.tensor([-77])
SIZES = [(7, 16), (1, 1), (33, 13), (65, 300), (40, 77), (5, 2048)]


# Of x, and of all the rest: one type, or what autocast mixes.
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
ROUNDING = {torch.float32: 2.0 ** -24, torch.float16: 2.0 ** -11, torch.bfloat16: 2.0 ** -8}


def case(rows, width, count, dtypes=DTYPES[0]):
    """Tensors, and a gradient of the type of the output: that of x or, where there is one, of the residual."""
    g = torch.Generator().manual_seed(rows * width)
    shapes = [(rows, width), (width,), (rows, width), (width,), (width,)][:count]
    tensors = [torch.randn(s, generator=g) for s in shapes]
    return ([t.to(dtypes[i > 0]) for i, t in enumerate(tensors)],
            torch.randn(rows, width, generator=g).to(dtypes[count > 2]))


def run(function, tensors, grad):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def compare(native, plain, tensors, grad):
    """At most twice the error of plain torch in the same types, and some roundings of the largest element."""
    exact = run(plain, [t.double() for t in tensors], grad.double())
    usual = run(plain, tensors, grad)
    for i, (got, u, e) in enumerate(zip(run(native, tensors, grad), usual, exact)):
        assert got.shape == e.shape and got.dtype == u.dtype
        # float32 sums in another order, and one rounding to the type of the result
        floor = 8 * 2.0 ** -24 + (0 if u.dtype == torch.float32 else ROUNDING[u.dtype])
        assert (got - e).abs().max() <= 2 * (u - e).abs().max() + floor * e.abs().max(), i


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", SIZES)
def test_relu_dropout(tier, sizes, p, dtypes):
    tensors, grad = case(*sizes, 2, dtypes)
    compare(lambda *t: relu_dropout(*t, p=p, seed=SEED, stream=5, backend="cpu"),
            lambda *t: relu_dropout_torch(*t, p, SEED, 5), tensors, grad)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [s for s in SIZES if s[1] > 1])
def test_dropout_residual_norm(tier, sizes, p, dtypes):
    tensors, grad = case(*sizes, 5, dtypes)
    compare(lambda *t: dropout_residual_norm(*t, p=p, seed=SEED, stream=5, backend="cpu"),
            lambda *t: dropout_norm_torch(*t, p, 1e-5, SEED, 5), tensors, grad)


def test_mask_is_the_documented_one():
    x = torch.rand(37, 53) + 1
    out = relu_dropout(x, torch.zeros(53), p=0.4, seed=SEED, stream=2, backend="cpu")
    assert torch.equal(out != 0, keep_mask(SEED, 2, 37, 53, 0.4))


def test_rows_far_from_zero():
    """A mean of 1e3 times the spread: the deviations are taken from the mean, not from squares of large numbers."""
    (x, b, r, w, c), grad = case(9, 128, 5)
    compare(lambda *t: dropout_residual_norm(*t, p=0.0, backend="cpu"), lambda *t: dropout_norm_torch(*t, 0.0, 1e-5, None, 0),
            [x, b, r + 1000.0, w, c], grad)


def test_nan_stays():
    x = torch.full((2, 20), float("nan"))
    z = torch.zeros(20)
    assert relu_dropout(x, z, p=0.0, backend="cpu").isnan().all()
    assert dropout_residual_norm(x, z, x, z + 1, z, p=0.0, backend="cpu").isnan().all()


def test_strided_and_empty():
    (x, b, r, w, c), grad = case(12, 24, 5)
    call = lambda x, g, r: run(lambda *t: dropout_residual_norm(*t, p=0.3, seed=SEED, backend="cpu"), [x, b, r, w, c], g)
    expected = call(x, grad, r)
    for got, e in zip(call(x.t().contiguous().t(), grad.t().contiguous().t(), torch.cat([r, r], 1)[:, :24]), expected):
        assert torch.equal(got, e)
    for function, tensors in ((dropout_residual_norm, (x[:0], b, r[:0], w, c)), (relu_dropout, (x[:0], b))):
        out, *grads = run(lambda *t: function(*t, p=0.3, seed=SEED, backend="cpu"), tensors, grad[:0])
        assert out.shape == (0, 24) and all(not g.any() for g in grads)


def test_threads_and_repeats_are_bitwise_equal():
    tensors, grad = case(300, 520, 5)
    assert_same_bits_with_threads(lambda: run(lambda *t: dropout_residual_norm(*t, p=0.3, seed=SEED, backend="cpu"), tensors, grad) +
                                  run(lambda *t: relu_dropout(*t, p=0.3, seed=SEED, backend="cpu"), tensors[:2], grad), (1, 2, 3, 1))


def test_seed_comes_from_torch():
    x, b = torch.ones(20, 30), torch.zeros(30)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(relu_dropout(x, b, p=0.5, backend="cpu"))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(relu_dropout(x, b, p=0.5, backend="cpu"), draws[2])


def test_second_derivatives_where_x_comes_from_the_residual():
    """As in an encoder: what the residual contributes through x is the graph's, and counts once."""
    (x, b, r, w, c), grad = case(5, 6, 5)
    results = []
    for backend in ("cpu", "torch"):
        r_, w_ = r.clone().requires_grad_(), w.clone().requires_grad_()
        out = dropout_residual_norm(r_.tanh() * w_, b, r_, w_, c, p=0.3, seed=SEED, backend=backend)
        first = torch.autograd.grad(out, [r_, w_], grad, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [r_, w_])])
    for got, e in zip(*results):
        torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    tensors, grad = case(5, 6, 5)

    def second(function, count):
        inputs = [t.clone().requires_grad_() for t in tensors[:count]]
        first = torch.autograd.grad((function(*inputs) * grad).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)

    pairs = (second(lambda *t: dropout_residual_norm(*t, p=0.3, seed=SEED, backend="cpu"), 5),
             second(lambda *t: dropout_norm_torch(*t, 0.3, 1e-5, SEED, 0), 5)), \
            (second(lambda *t: relu_dropout(*t, p=0.3, seed=SEED, backend="cpu"), 2),
             second(lambda *t: relu_dropout_torch(*t, 0.3, SEED, 0), 2))
    for got, expected in pairs:
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck(dtypes):
    (x, b, r, w, c), grad = case(6, 10, 5, dtypes)
    ops = torch.ops.ada2i_fast
    mean, rstd = torch.ops.ada2i_fast.dropout_norm_forward(x, b, r, w, c, 0.3, 1e-5, SEED, 0, "cpu")[1:]
    for op, args in ((ops.relu_dropout_forward, (x, b, 0.3, SEED, 0, "cpu")), (ops.relu_dropout_backward, (grad.to(x.dtype), x, 0.3, "cpu")),
                     (ops.dropout_norm_forward, (x, b, r, w, c, 0.3, 1e-5, SEED, 0, "cpu")),
                     (ops.dropout_norm_backward, (grad, x, b, r, w, mean, rstd, 0.3, SEED, 0, "cpu"))):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_refusals():
    x, b = torch.ones(2, 3), torch.zeros(3)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve this input: it computes in float32, not float64"):
        relu_dropout(x.double(), b.double(), p=0.1, backend="cpu")
    with pytest.raises(ValueError, match="p: expected a probability below 1, got 1.0"):
        relu_dropout(x, b, p=1.0)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_refused_shapes(backend):
    given = {"x": torch.randn(5, 8), "bias": torch.randn(8), "residual": torch.randn(5, 8), "weight": torch.randn(8), "norm_bias": torch.randn(8)}
    for name, wrong in (("bias", torch.randn(7)), ("residual", torch.randn(4, 8)), ("weight", torch.randn(8, 1)), ("norm_bias", torch.randn(9))):
        with pytest.raises(ValueError, match=rf"^{name}: expected \[.*\] on cpu, got \["):
            dropout_residual_norm(**{**given, name: wrong}, p=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"bias: expected \[8\] on cpu, got \[7\] on cpu"):
        relu_dropout(given["x"], torch.randn(7), p=0.1, backend=backend)
