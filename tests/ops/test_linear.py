"""`linear`: the product and its gradients, through either library, and when it is plain torch."""

from __future__ import annotations

import importlib
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from afw_cases import assert_same_bits_with_threads, guarded
from ada2i_fast import backends, cpu
from ada2i_fast.ops import linear

op = importlib.import_module("ada2i_fast.ops.linear")      # the package's attribute of this name is the function

needs_onednn = pytest.mark.skipif(op.why_no_onednn() is not None, reason=str(op.why_no_onednn()))


def case(rows=50, inputs=30, outputs=20, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))]


def run(function, x, w, b, grad, **options):
    x, w, b = (t.clone().requires_grad_() if t is not None else None for t in (x, w, b))
    y = function(x, w, b, **options)
    y.backward(grad)
    return [y.detach(), *(t.grad for t in (x, w, b) if t is not None)]


def plain(x, w, b, relu=False):
    y = F.linear(x, w, b)
    return F.relu(y) if relu else y


needs_native = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


@pytest.fixture(params=["mkl", pytest.param("onednn", marks=needs_onednn), pytest.param("native", marks=needs_native), "auto"])
def library(request, monkeypatch):
    monkeypatch.setenv("ADA2I_FAST_LINEAR", request.param)
    monkeypatch.setattr(op, "_SMALL", 0)
    monkeypatch.setattr(op, "_chosen", {})
    return request.param


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(50, 30, 20), (1, 7, 5), (3, 1, 1), (130, 257, 65)])
def test_against_float64(library, sizes, bias, relu):
    """At most twice the error of plain torch in float32, or a few roundings of the largest element."""
    x, w, b, grad = case(*sizes)
    b = b if bias else None
    exact = run(plain, *(t.double() if t is not None else None for t in (x, w, b, grad)), relu=relu)
    usual = run(plain, x, w, b, grad, relu=relu)
    for got, y, e in zip(run(linear, x, w, b, grad, relu=relu), usual, exact):
        assert got.dtype == torch.float32 and got.shape == e.shape
        floor = 8 * 2.0 ** -24 * e.abs().max()
        assert (got - e).abs().max() <= 2 * (y - e).abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sizes", [(50, 30, 20), (1, 7, 5), (130, 257, 65)])
def test_autocast(sizes, relu, dtype):
    """Products in 16 bits, gradients in the parameters' type; the error at most twice that of `F.linear` under autocast, or two
    roundings: one of the product, one of the bias that comes to it."""
    x, w, b, grad = case(*sizes)

    def cast(function):
        def under(*tensors, **options):
            with torch.autocast("cpu", dtype):
                return function(*tensors, **options)
        return under

    exact = run(plain, *(t.double() for t in (x, w, b, grad)), relu=relu)
    usual = run(cast(plain), x, w, b, grad.to(dtype), relu=relu)
    for got, y, e in zip(run(cast(linear), x, w, b, grad.to(dtype), relu=relu), usual, exact):
        assert got.dtype == y.dtype and got.shape == e.shape
        assert (got - e).abs().max() <= 2 * (y - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()


def test_strides(library):
    """Transposed, sliced, expanded inputs and gradients."""
    x, w, b, grad = case(40, 24, 16)
    expected = run(plain, x, w, b, grad)
    variants = [lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, :t.shape[1]],
                lambda t: torch.stack([t, t], 2)[:, :, 1]]
    for view in variants:
        x_v, w_v = view(x).requires_grad_(), view(w).requires_grad_()
        y = linear(x_v, w_v, b)
        grads = torch.autograd.grad(y, [x_v, w_v], view(grad))
        for got, e in zip([y, *grads], expected):
            torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)
    x_v = x[:1].expand(40, 24).requires_grad_()
    got = torch.autograd.grad(linear(x_v, w).sum(), x_v)[0]
    torch.testing.assert_close(got, w.sum(0).expand(40, 24), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=needs_native)])
def test_chooses_once_per_shape_class(own, monkeypatch):
    monkeypatch.delenv("ADA2I_FAST_LINEAR", raising=False)
    monkeypatch.setattr(op, "_SMALL", 0)
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "_own_is_fast", lambda x: own)
    asked = []
    monkeypatch.setattr(op, "_measure", lambda runs, *a: (asked.append((tuple(a[0].shape), *runs)), [*runs][0])[1])
    x, w, b, grad = case(40, 24, 16)
    run(linear, x, w, b, grad)
    onednn = ("onednn",) * (op.why_no_onednn() is None)
    libraries = ("mkl", *onednn, *["native"] * own)
    expected = [((40, 24), *libraries), ((40, 16), *libraries)] * (len(libraries) > 1)      # the parameters' gradients: against torch's fastest
    expected += [((40, 16), "torch", "native")] * own + [((16, 40), "mkl", *onednn)] * len(onednn)
    assert asked == expected
    run(linear, x[:33], w, b, grad[:33])                        # the same power of two
    assert asked == expected
    run(linear, x[:20], w, b, grad[:20])
    assert len(asked) == 2 * len(expected)


def test_missing_onednn(monkeypatch):
    monkeypatch.setattr(op, "why_no_onednn", lambda: "gone")
    monkeypatch.setattr(op, "_SMALL", 0)
    x, w, b, grad = case()
    monkeypatch.delenv("ADA2I_FAST_LINEAR", raising=False)
    torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b))
    monkeypatch.setenv("ADA2I_FAST_LINEAR", "onednn")
    with pytest.raises(RuntimeError, match="ADA2I_FAST_LINEAR=onednn: gone"):
        linear(x, w, b)
    monkeypatch.setenv("ADA2I_FAST_LINEAR", "cublas")
    with pytest.raises(ValueError, match="expected one of mkl, onednn, native, auto, got 'cublas'"):
        linear(x, w, b)


@pytest.mark.parametrize("relu", [False, True])
def test_second_derivatives(library, relu):
    x, w, b, grad = case(6, 5, 4)

    def second(function):
        x_, w_, b_ = (t.clone().requires_grad_() for t in (x, w, b))
        first = torch.autograd.grad(function(x_, w_, b_, relu=relu).square().sum(), [x_, w_, b_], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x_, w_, b_])

    for got, e in zip(second(linear), second(plain)):
        torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-3)


def test_plain_where_it_does_not_serve():
    x, w, b, grad = case(8, 6, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: linear(*t, relu=True), [t.requires_grad_() for t in (x, w, b)])
    x, w, b, grad = case(8, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16
    assert linear(x[:0], w, b).shape == (0, 4)
    torch.testing.assert_close(torch.func.grad(lambda w_: linear(x, w_, b).sum())(w), x.sum(0).expand(4, 6))


def test_gradients_that_are_not_needed():
    x, w, b, grad = case()
    w.requires_grad_()
    linear(x, w, b).backward(grad)
    assert x.grad is None and b.grad is None and w.grad is not None
    assert not linear(x, w.detach(), b).requires_grad


# ------------------------------------------------------------------------------------- the parameters' gradients in float32

SIXTEEN = [torch.bfloat16, torch.float16]


def gradients(rows, inputs, outputs, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, outputs, generator=g).to(dtype), torch.randn(rows, inputs, generator=g).to(dtype)


def native(grad, x, bias=True):
    return importlib.import_module("ada2i_fast.cpu.linear").backward(grad, x, bias)


@needs_native
@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (50, 30, 20), (1, 7, 5), (3, 1, 12), (131, 257, 65), (500, 33, 300), (96, 31, 130), (641, 16, 13), (1500, 100, 25)])
def test_parameters_against_float64(tier, sizes, dtype, monkeypatch):
    """The inputs are exact in float32, so the error is that of a float32 sum: at most twice torch's own on the widened inputs, or some roundings
    of the largest element, as many as a sum in order of the rows may have more than one in blocks. Every element is written, and nothing beside."""
    grad, x = gradients(*sizes, dtype)
    exact = [grad.double().t() @ x.double(), grad.double().sum(0)]
    usual = [grad.float().t() @ x.float(), grad.float().sum(0)]
    (grad, _), (x, _) = guarded(grad), guarded(x)
    buffers = []

    def fenced(t, shape, dtype):                                # NaN inside, too: whoever leaves an element unwritten is found out
        inside, buffer = guarded(torch.full(shape if isinstance(shape, tuple) else (shape,), float("nan"), dtype=dtype))
        buffers.append((buffer, inside.numel()))
        return inside

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    found = native(grad, x)
    for buffer, size in buffers:
        assert int(buffer.isnan().sum()) == buffer.numel() - size and buffer[:67].isnan().all()
    for got, u, e in zip(found, usual, exact, strict=True):
        assert got.dtype == torch.float32 and got.shape == e.shape
        floor = (4 + sizes[0] ** 0.5) * 2.0 ** -24 * e.abs().max()
        assert (got - e).abs().max() <= 2 * (u - e).abs().max() + floor
    alone, = native(grad, x, False)
    assert torch.equal(alone, found[0])


@needs_native
@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
@pytest.mark.parametrize("sizes", [(70, 528, 500), (1300, 512, 513), (30, 530, 500)])
def test_large_gradients_past_the_caches(tier, sizes, dtype, monkeypatch):
    """Aligned, and large enough, they go there by other instructions, unless their rows are not: the same numbers as elsewhere, all of them, and nothing
    beside."""
    grad, x = gradients(*sizes, dtype)
    found = {}
    for offset in (16, 15):
        kept = []

        def fenced(t, shape, dtype):
            size = math.prod(shape if isinstance(shape, tuple) else (shape,))
            whole = torch.full((size + 64,), float("nan"), dtype=dtype)
            start = offset + -whole.data_ptr() % 64 // 4
            kept.append((whole, start, size))
            return whole[start:start + size].view(shape)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", fenced)
            found[offset] = native(grad, x)
        for whole, start, size in kept:
            assert int(whole.isnan().sum()) == 64 and whole[:start].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(found[16], found[15], strict=True))


@needs_native
def test_parameters_are_more_exact_than_those_torch_rounds():
    grad, x = gradients(500, 300, 200, torch.bfloat16)
    exact = grad.double().t() @ x.double()
    torch_error, own = ((t - exact).norm() / exact.norm() for t in ((grad.t() @ x).double(), native(grad, x)[0].double()))
    assert own < 1e-5 < 1e-3 < torch_error


@needs_native
@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
def test_parameters_have_the_same_bits_with_all_threads(tier, dtype):
    grad, x = gradients(700, 150, 330, dtype)
    assert_same_bits_with_threads(lambda: native(grad, x), (1, 2, 3, 1))


@needs_native
@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
def test_parameters_of_strided_and_empty_tensors(tier, dtype):
    grad, x = gradients(40, 24, 16, dtype)
    expected = native(grad, x)
    for view in (lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, :t.shape[1]], lambda t: torch.stack([t, t], 2)[:, :, 1]):
        assert all(torch.equal(a, b) for a, b in zip(native(view(grad), view(x)), expected))
    for rows, outputs, inputs in ((0, 16, 24), (40, 0, 24), (40, 16, 0), (0, 0, 0)):
        weight, bias = native(grad[:rows, :outputs], x[:rows, :inputs])
        assert weight.shape == (outputs, inputs) and bias.shape == (outputs,) and not weight.any()
        assert torch.equal(bias, expected[1][:outputs] if rows else torch.zeros(outputs))


@needs_native
def test_parameters_that_are_not_numbers():
    grad, x = gradients(30, 20, 10, torch.bfloat16)
    grad[4, 3] = float("nan")
    grad[5, 7] = float("inf")
    weight, bias = native(grad, x)
    assert weight[3].isnan().all() and bias[3].isnan() and bias[7] == float("inf") and torch.equal(weight[7], x[5].float() * float("inf"))
    others = [i for i in range(10) if i not in (3, 7)]
    assert weight[others].isfinite().all() and bias[others].isfinite().all()


@needs_native
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", op.LIBRARIES)
def test_who_computes_the_parameters_gradients(name, dtype, monkeypatch):
    """By name, or the winner of one measurement per shape class; the same results but for the roundings of torch's."""
    monkeypatch.setenv("ADA2I_FAST_LINEAR", name)
    monkeypatch.setattr(op, "_SMALL", 0)
    monkeypatch.setattr(op, "_chosen", {})
    used, measured = [], []
    runs = {key: (lambda key, run: lambda *a: (used.append(key), run(*a))[1])(key, run) for key, run in op._PARAMETERS.items()}
    monkeypatch.setattr(op, "_PARAMETERS", runs)
    monkeypatch.setattr(op, "_measure", lambda runs, *a, **_: (measured.append(runs), [*runs][-1])[1])
    x, w, b, grad = case(40, 24, 16)

    def under(*tensors, **options):
        with torch.autocast("cpu", dtype):
            return linear(*tensors, **options)

    for rows in (40, 33):
        run(under, x[:rows], w, b, grad[:rows].to(dtype))
    assert used == (["torch"] * 2 if name in ("mkl", "onednn") else ["native"] * 2)
    assert [asked for asked in measured if asked is runs] == ([runs] if name == "auto" else [])
    used.clear()
    monkeypatch.setenv("ADA2I_FAST_BACKEND", "torch")
    run(under, x, w, b, grad.to(dtype))
    assert used == ["torch"]
    monkeypatch.delenv("ADA2I_FAST_BACKEND")
    used.clear()
    run(linear, x, w, b, grad)
    assert used == ["native" if name == "native" or name == "auto" and cpu.tier() in cpu.FLOAT32_TIERS else "torch"]


@needs_native
@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_parameters_keep_their_types(kinds, monkeypatch):
    monkeypatch.setenv("ADA2I_FAST_LINEAR", "native")
    x, w, b, grad = case()
    w, b = w.to(kinds[0]).requires_grad_(), b.to(kinds[1]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, w, b)
    y.backward(grad.bfloat16())
    assert (w.grad.dtype, b.grad.dtype) == kinds
    b.grad = None
    w.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        linear(x, w, b).backward(grad.bfloat16())
    assert b.grad.dtype == kinds[1]


# ------------------------------------------------- rows by a float32 weight, which is rounded on the way where they have 16 bits

UP_TO_FLOAT = [torch.bfloat16, torch.float16, torch.float32]


def weighed(rows, inputs, outputs, dtype, seed=0):
    """x and grad in `dtype`; weight and bias in float32."""
    x, w, b, grad = case(rows, inputs, outputs, seed=seed)
    return x.to(dtype), w, b, grad.to(dtype)


def own_products(x, w, b, grad):
    module = importlib.import_module("ada2i_fast.cpu.linear")
    return [module.forward(x, w, b), module.forward(x, w, None), module.input_gradient(grad, w)]


@needs_native
@pytest.mark.parametrize("dtype", UP_TO_FLOAT)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (50, 30, 20), (1, 7, 5), (3, 1, 12), (33, 257, 65), (500, 33, 300), (96, 130, 31), (70, 2050, 40), (40, 48, 1300), (1100, 40, 70), (150, 600, 330)])
def test_products_with_the_weight(tier, sizes, dtype, monkeypatch):
    """At most twice the error of torch, which rounds the weight before, or a rounding of the largest element; in float32 some roundings of it, as
    a sum in order may have more than one in blocks. Every element is written, and nothing beside."""
    x, w, b, grad = weighed(*sizes, dtype)
    exact = [F.linear(x.double(), w.double(), b.double()), F.linear(x.double(), w.double()), grad.double() @ w.double()]
    rounded = w.to(dtype)
    usual = [F.linear(x, rounded, b.to(dtype)), F.linear(x, rounded), grad @ rounded]
    (x, _), (w, _), (b, _), (grad, _) = (guarded(t) for t in (x, w, b, grad))
    buffers = []

    def fenced(t, *shape):
        inside, buffer = guarded(torch.full(shape, float("nan"), dtype=t.dtype))
        buffers.append((buffer, inside.numel()))
        return inside

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    found = own_products(x, w, b, grad)
    for buffer, size in buffers:
        assert int(buffer.isnan().sum()) == buffer.numel() - size and buffer[:67].isnan().all()
    terms = (sizes[1], sizes[1], sizes[2])
    for got, u, e, count in zip(found, usual, exact, terms, strict=True):
        assert got.dtype == dtype and got.shape == e.shape
        floor = (4 + count ** 0.5) * 2.0 ** -24 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert (got - e).abs().max() <= 2 * (u - e).abs().max() + floor * e.abs().max()


@needs_native
@pytest.mark.parametrize("dtype", UP_TO_FLOAT)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (50, 30, 20), (33, 257, 65), (600, 40, 301)])
def test_relu_and_dropout_in_the_product(tier, sizes, p, dtype):
    """In float32 the numbers of `relu_dropout` to the bit; in 16 bits its mask, and a rounding less: at most one from where float32 ends up."""
    x, w, b, _ = weighed(*sizes, dtype)
    module, dropout = (importlib.import_module(f"ada2i_fast.cpu.{name}") for name in ("linear", "dropout"))
    seed = torch.tensor([2 ** 40 + 3])
    for stream in (0, 5):
        got = module.forward(x, w, b, True, p, seed, stream)
        alone = dropout.relu_forward(module.forward(x, w, None), b, p, seed, stream)
        if dtype == torch.float32:
            assert torch.equal(got, alone)
            continue
        rounded = w.to(dtype).float() if dtype == torch.bfloat16 and cpu.tier() in cpu.BF16_TIERS else w
        e = dropout.relu_forward(module.forward(x.float(), rounded, None), b, p, seed, stream)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), e, rtol=torch.finfo(dtype).eps, atol=1e-5)
    x[0, 0] = float("nan")
    assert module.forward(x, w, b, True)[0].isnan().all()


@needs_native
def test_floats_keep_all_their_bits(tier):
    """A permutation leaves every number as it is, of any size, on either side; powers of two that cancel out change nothing."""
    g = torch.Generator().manual_seed(0)
    numbers = torch.randn(70, 48, generator=g) * 10.0 ** torch.randint(-25, 30, (70, 48), generator=g)
    order = torch.eye(48)[torch.randperm(48, generator=g)]
    module = importlib.import_module("ada2i_fast.cpu.linear")
    assert torch.equal(module.forward(numbers, order, None), numbers @ order.t())
    assert torch.equal(module.input_gradient(numbers, order), numbers @ order)
    assert torch.equal(module.forward(order, numbers, None), order @ numbers.t())
    assert torch.equal(module.input_gradient(torch.eye(70), numbers), numbers)
    assert torch.equal(native(numbers, torch.eye(70))[0], numbers.t()) and torch.equal(native(torch.eye(70), numbers)[0], numbers)
    x, w, b, grad = case(50, 300, 40)
    assert torch.equal(module.forward(x * 2.0 ** 40, w * 2.0 ** -40, b), module.forward(x, w, b))


@needs_native
def test_floats_that_are_no_numbers_stay_in_their_rows(tier):
    """NaN is NaN; infinities are that or NaN."""
    x, w, b, grad = case(40, 300, 50)
    x[3, 5], x[7, 200] = float("nan"), float("inf")
    module = importlib.import_module("ada2i_fast.cpu.linear")
    y = module.forward(x, w, b)
    assert y[3].isnan().all() and not y[7].isfinite().any()
    others = [i for i in range(40) if i not in (3, 7)]
    torch.testing.assert_close(y[others], F.linear(x[others], w, b), rtol=1e-5, atol=1e-4)
    weight, bias = native(grad, x)
    assert weight[:, 5].isnan().all() and not weight[:, 200].isfinite().any() and bias.isfinite().all()
    assert weight[:, [i for i in range(300) if i not in (5, 200)]].isfinite().all()


@needs_native
@pytest.mark.parametrize("dtype", UP_TO_FLOAT)
def test_products_have_the_same_bits_with_all_threads(tier, dtype):
    given = weighed(150, 330, 700, dtype)
    assert_same_bits_with_threads(lambda: own_products(*given), (1, 2, 3, 1))


@needs_native
@pytest.mark.parametrize("dtype", UP_TO_FLOAT)
def test_products_of_strided_and_empty_tensors(tier, dtype):
    x, w, b, grad = weighed(40, 24, 16, dtype)
    expected = own_products(x, w, b, grad)
    for view in (lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, :t.shape[1]], lambda t: torch.stack([t, t], 2)[:, :, 1]):
        assert all(torch.equal(a, e) for a, e in zip(own_products(view(x), view(w), b, view(grad)), expected))
    for rows, inputs, outputs in ((0, 24, 16), (40, 0, 16), (40, 24, 0)):
        y, bare, grad_x = own_products(x[:rows, :inputs], w[:outputs, :inputs], b[:outputs], grad[:rows, :outputs])
        assert y.shape == bare.shape == (rows, outputs) and grad_x.shape == (rows, inputs)
        assert not bare.numel() or torch.equal(bare, torch.zeros_like(bare) if not inputs else expected[1])
        assert not grad_x.numel() or torch.equal(grad_x, torch.zeros_like(grad_x) if not outputs else expected[2])


@needs_native
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
@pytest.mark.parametrize("name", op.LIBRARIES)
def test_plans_what_is_done(tier, name, dtype, small, monkeypatch):
    """Whichever of the candidates is the fastest, `planned` says whose the products are, as soon as all are measured."""
    if name == "onednn" and op.why_no_onednn():
        pytest.skip(op.why_no_onednn())
    monkeypatch.setenv("ADA2I_FAST_LINEAR", name)
    monkeypatch.setattr(op, "_SMALL", 1 << 60 if small else 0)
    x, w, b, grad = case(40, 24, 16)
    if dtype != torch.float32:
        grad = grad.to(dtype)
    used = set()

    def seen(what, run):
        return lambda *a: (used.add(what), run(*a))[1]

    own = backends.module("linear", "cpu")
    for kind, function in (("forward", "forward"), ("input", "input_gradient"), ("weight", "backward")):
        monkeypatch.setattr(own, function, seen((kind, "native"), getattr(own, function)))
        if "onednn" in op._RUN[kind]:
            monkeypatch.setitem(op._RUN, kind, {**op._RUN[kind], "onednn": seen((kind, "onednn"), op._RUN[kind]["onednn"])})
    monkeypatch.setattr(op, "_PARAMETERS", {**op._PARAMETERS, "native": seen(("weight", "native"), op._backward)})
    found = set()
    for seed in range(20):
        pick = random.Random(seed)
        monkeypatch.setattr(op, "_chosen", {})
        monkeypatch.setattr(op, "_measure", lambda runs, *a, **_: pick.choice([*runs]))
        for bias in (True, False):
            plan = [op.planned(dtype, rows, ((24, 16, bias),), gradients) for rows in (40, 33) for gradients in (False, True)]
            used.clear()
            y, kept = op.product_forward(x, w, b, False, dtype)
            with torch.no_grad():
                op.product_backward(grad, kept, True, True, bias, torch.float32)
            done = tuple(3 if kept[3] is None and kind != "weight" else 2 if (kind, "native") in used else 1 if (kind, "onednn") in used else 0
                         for kind in ("forward", "input", "weight"))
            after = [op.planned(dtype, rows, ((24, 16, bias),), gradients) for rows in (40, 33) for gradients in (False, True)]
            assert after == [(done[0], 0, 0), done] * 2 and all(before in (None, now) for before, now in zip(plan, after)), seed
            found.add(done)
    if not small and name == "auto":
        able = cpu.tier() in (cpu.FLOAT32_TIERS if dtype == torch.float32 else cpu.BF16_TIERS)
        assert len(found) > 1 or dtype != torch.float32 and not able


@needs_native
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", op.LIBRARIES)
def test_who_rounds_the_weight(tier, name, relu, monkeypatch):
    """By name, or the winner of one measurement per shape class where the tier multiplies bf16. No rounded weight is kept then."""
    monkeypatch.setenv("ADA2I_FAST_LINEAR", name)
    monkeypatch.setattr(op, "_SMALL", 0)
    monkeypatch.setattr(op, "_chosen", {})
    measured = []
    monkeypatch.setattr(op, "_measure", lambda runs, *a, **_: (measured.append(runs), [*runs][-1])[1])
    x, w, b, grad = case(40, 24, 16)
    able = cpu.tier() in cpu.BF16_TIERS
    own = name == "native" or name == "auto" and able
    for rows in (40, 33):
        y, kept = op.product_forward(x[:rows], w, b, relu, torch.bfloat16)
        assert (kept[3] is None) == own
    assert measured.count(op._ROUNDING) == (name == "auto" and able)
    exact = run(plain, x.double(), w.double(), b.double(), grad.double(), relu=relu)

    def under(*tensors, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(*tensors, **options)

    for got, e, dtype in zip(run(under, x, w, b, grad.bfloat16(), relu=relu), exact, (torch.bfloat16, *[torch.float32] * 3), strict=True):
        assert got.dtype == dtype and (got - e).norm() <= 4 * 2.0 ** -8 * e.norm()      # x, w, g and the product are rounded
    monkeypatch.setenv("ADA2I_FAST_BACKEND", "torch")
    assert op.product_forward(x, w, b, relu, torch.bfloat16)[1][3] is not None
    monkeypatch.delenv("ADA2I_FAST_BACKEND")
    for dtype, weight in ((torch.float16, w), (torch.bfloat16, w.bfloat16())):
        assert op.product_forward(x, weight, b.to(weight.dtype), relu, dtype)[1][3] is not None


def test_missing_native(monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: "not built")
    monkeypatch.setenv("ADA2I_FAST_LINEAR", "native")
    with pytest.raises(RuntimeError, match="ADA2I_FAST_LINEAR=native: not built"):
        linear(*case()[:3])


@pytest.mark.parametrize("given,expected", [(None, "16384"), ("77", "77")])
def test_room_for_primitives_of_many_shapes(given, expected):
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    if given:
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = given
    code = "import os, ada2i_fast; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout.split() == [expected]


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sizes", [(50, 30, 20), (1, 7, 5), (130, 257, 65)])
def test_on_a_gpu(sizes, relu, autocast):
    """At most twice the error of `F.linear`, or some roundings; gradients in the parameters' dtype."""
    drawn = case(*sizes)
    exact = run(plain, *(t.double() for t in drawn), relu=relu)

    def here(function):
        def called(*tensors, **options):
            with torch.autocast("cuda", autocast, enabled=autocast is not None):
                return function(*tensors, **options).float()
        return run(called, *(t.cuda() for t in drawn), relu=relu)

    usual, found, again = here(plain), here(linear), here(linear)
    floor = 8 * 2.0 ** -24 if autocast is None else 2 * torch.finfo(autocast).eps
    for i, (got, a, u, e) in enumerate(zip(found, again, usual, exact, strict=True)):
        assert got.dtype == torch.float32 and torch.equal(got, a), i
        assert (got.cpu() - e).norm() <= 2 * (u.cpu() - e).norm() + floor * e.norm(), i
