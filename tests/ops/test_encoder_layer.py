"""Transformer layers as one node each: the ops they are made of to the last bit, float64, and what an op of torch has to obey."""

from __future__ import annotations

import ctypes
import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from afw_cases import poisoned
from ada2i_fast import cpu
from ada2i_fast import node
from ada2i_fast.ops import DialogueOffsets, dialogue_attention, encoder_layer, encoder_layers, linear
from ada2i_fast.ops.dialogue_attention import dialogue_attention_seeded
from ada2i_fast.ops.dropout import dropout_norm_torch, dropout_residual_norm, relu_dropout, relu_dropout_torch

op = importlib.import_module("ada2i_fast.ops.encoder_layer")       # the package's attribute of this name is the function
pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
NODE = "encoder_layers"
SEED = torch.tensor([-(1 << 41) - 5])
SEEDS = {"cpu": SEED} | ({"cuda": SEED.cuda()} if torch.cuda.is_available() else {})
EPS = [(1e-5, 1e-3), (1e-4, 1e-5)]
AUTOCAST = [None, torch.bfloat16, torch.float16]
# lengths, width, heads, width inside; of head widths 8, 1, 4, 30 and 33 only the first fills a vector
CASES = [([7, 3, 5, 1], 8, 1, 16), ([1], 3, 3, 5), ([0, 5, 0, 2], 12, 3, 20), ([33, 1, 40], 90, 3, 77), ([18], 33, 1, 64)]


@pytest.fixture(autouse=True)
def python(request, monkeypatch):
    """Without `route`, and but for tests of the node itself, layers go by way of Python."""
    if not {"route", "whole"} & {*request.fixturenames}:
        monkeypatch.setattr(node, "encoder_layers", lambda *_: None)


@pytest.fixture
def whole():
    """The node as it is."""
    if reason := node.why_not():
        pytest.skip(reason)


def case(rows, width, inside, layers=2, seed=0):
    """x, the layers' parameters, and the gradient of the result."""
    g = torch.Generator().manual_seed(seed + rows * width)

    def draw(*shape, size=1.0, mean=0.0):
        return mean + size * torch.randn(*shape, generator=g)

    parameters = [[draw(3 * width, width, size=width ** -0.5), draw(3 * width, size=0.3), draw(width, width, size=width ** -0.5),
                   draw(width, size=0.3), draw(width, size=0.3, mean=1.0), draw(width, size=0.3), draw(inside, width, size=width ** -0.5),
                   draw(inside, size=0.3), draw(width, inside, size=inside ** -0.5), draw(width, size=0.3),
                   draw(width, size=0.3, mean=1.0), draw(width, size=0.3)] for _ in range(layers)]
    return draw(rows, width), parameters, draw(rows, width)


def nodes(x, parameters, lengths, heads, p, **options):
    return encoder_layers(x, lengths, parameters, heads=heads, p=p, eps=EPS[:len(parameters)], seed=SEEDS[x.device.type], stream=4, **options)


def separate(x, parameters, lengths, heads, p, one_rounding=False):
    """The registered ops, one after the other. one_rounding: of the inner product with its bias, not of one after the other."""
    fused = dict(p=p, seed=SEED, backend="cpu")
    for i, (wq, bq, wo, bo, n1, c1, w1, b1, w2, b2, n2, c2) in enumerate(parameters):
        s = 4 + i * (heads + 3)
        mixed = dialogue_attention(linear(x, wq, bq), lengths, heads, dropout=p, seed=SEED, stream=s, backend="cpu")
        x = dropout_residual_norm(linear(mixed, wo), bo, x, n1, c1, eps=EPS[i][0], stream=s + heads, **fused)
        if one_rounding:
            inner = op._inner(x, w1, b1, p, SEED, s + heads + 1, "auto", "cpu")
        else:
            inner = relu_dropout(linear(x, w1), b1, stream=s + heads + 1, **fused)
        x = dropout_residual_norm(linear(inner, w2), b2, x, n2, c2, eps=EPS[i][1], stream=s + heads + 2, **fused)
    return x


def formula(x, parameters, lengths, heads, p):
    """In plain PyTorch, in any dtype, with the same masks."""
    seed = SEEDS[x.device.type]
    for i, (wq, bq, wo, bo, n1, c1, w1, b1, w2, b2, n2, c2) in enumerate(parameters):
        s = 4 + i * (heads + 3)
        mixed = dialogue_attention_seeded(F.linear(x, wq, bq), lengths, heads, p, seed, s)
        x = dropout_norm_torch(F.linear(mixed, wo), bo, x, n1, c1, p, EPS[i][0], seed, s + heads)
        inner = relu_dropout_torch(F.linear(x, w1), b1, p, seed, s + heads + 1)
        x = dropout_norm_torch(F.linear(inner, w2), b2, x, n2, c2, p, EPS[i][1], seed, s + heads + 2)
    return x


def run(function, x, parameters, grad, *settings, autocast=None, **options):
    """The result and the gradients of x and all parameters."""
    x, parameters = x.clone().requires_grad_(), [[t.clone().requires_grad_() for t in layer] for layer in parameters]
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        z = function(x, parameters, *settings, **options)
    return [z.detach(), *torch.autograd.grad(z, [x, *sum(parameters, [])], grad.to(z.dtype))]


def count(monkeypatch):
    """Which layers were a node, as they are made: a list that grows."""
    made, forward = [], op._forward
    monkeypatch.setattr(op, "_forward", lambda x, *a: (made.append(x.shape), forward(x, *a))[1])
    return made


@pytest.mark.parametrize("library", ["auto", "native", "onednn"])
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("lengths,width,heads,inside", CASES)
def test_is_the_separate_ops(monkeypatch, lengths, width, heads, inside, p, autocast, library, route):
    """Bit for bit, and every element written; with torch's products between calls of the library, and without. Where the library's product of bf16
    takes bias, ReLU and dropout along, there is a rounding less than in the ops of the same name."""
    monkeypatch.setenv("ADA2I_FAST_LINEAR", library)
    drawn = case(sum(lengths), width, inside)
    expected = run(separate, *drawn, lengths, heads, p, library == "native" and autocast == torch.bfloat16, autocast=autocast)
    made = count(monkeypatch)
    poisoned(monkeypatch)
    for i, (got, e) in enumerate(zip(run(nodes, *drawn, lengths, heads, p, autocast=autocast), expected, strict=True)):
        assert got.dtype == e.dtype and torch.equal(got, e), i
    assert len(made) == (2 if route == "python" else 0)


@pytest.mark.parametrize("library", ["auto", "native"])
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("lengths,width,heads,inside", CASES)
def test_against_float64(tier, lengths, width, heads, inside, p, autocast, library, monkeypatch, route):
    """In each tensor's norm twice the error of the formula in the same types, and some roundings."""
    monkeypatch.setenv("ADA2I_FAST_LINEAR", library)
    x, parameters, grad = case(sum(lengths), width, inside)
    for layer in parameters:                                    # far from 0, where a rounding would decide about a gradient
        layer[7] += 8.0 * (-1.0) ** torch.arange(inside)
    exact = run(formula, x.double(), [[t.double() for t in layer] for layer in parameters], grad.double(), lengths, heads, p)
    usual = run(formula, x, parameters, grad, lengths, heads, p, autocast=autocast)
    # Where all of a tensor's terms cancel (the gradients of the keys' biases), what is left has the size of roundings of the terms.
    terms = max(e.norm() for e in exact[1:])
    floor = 8 * 2.0 ** -24 if autocast is None else torch.finfo(autocast).eps
    for i, (got, u, e) in enumerate(zip(run(nodes, x, parameters, grad, lengths, heads, p, autocast=autocast), usual, exact, strict=True)):
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert (got - e).norm() <= 2 * (u - e).norm() + floor * (e.norm() + 0.1 * terms), i


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("library", ["auto", "native"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_op_by_op_is_the_node(monkeypatch, p, library, autocast):
    """Large layers: the same numbers, without gradients too, whatever needs them."""
    monkeypatch.setenv("ADA2I_FAST_LINEAR", library)
    x, parameters, grad = case(9, 8, 16)
    expected = run(nodes, x, parameters, grad, [4, 5], 2, p, autocast=autocast)
    monkeypatch.setattr(op, "_LARGE", 0)
    made = count(monkeypatch)
    for got, e in zip(run(nodes, x, parameters, grad, [4, 5], 2, p, autocast=autocast), expected, strict=True):
        assert got.dtype == e.dtype and torch.equal(got, e)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert torch.equal(nodes(x, parameters, [4, 5], 2, p), expected[0])
        for which in (6, 7):                                    # W_1 of the second layer, b_1 of it
            leaf = parameters[1][which].clone().requires_grad_()
            z = nodes(x, [parameters[0], [leaf if i == which else t for i, t in enumerate(parameters[1])]], [4, 5], 2, p)
            got, = torch.autograd.grad(z, leaf, grad.to(z.dtype))
            assert torch.equal(got, expected[2 + 12 + which])
    assert not made


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_op_by_op(monkeypatch, p):
    monkeypatch.setattr(op, "_LARGE", 0)
    test_second_derivatives(p, None)


def test_one_layer_is_the_first_of_many():
    x, parameters, _ = case(9, 8, 16, layers=1)
    one = encoder_layer(x, [4, 5], *parameters[0], heads=2, p=0.3, eps=EPS[0], seed=SEED, stream=4)
    assert torch.equal(one, nodes(x, parameters, [4, 5], 2, 0.3))
    assert not torch.equal(one, encoder_layer(x, [4, 5], *parameters[0], heads=2, p=0.3, eps=EPS[0], seed=SEED, stream=5))


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_without_gradients(monkeypatch, autocast, route):
    x, parameters, grad = case(9, 8, 16)
    expected = run(nodes, x, parameters, grad, [4, 5], 2, 0.3, autocast=autocast)[0]
    made = count(monkeypatch)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        z = nodes(x, parameters, [4, 5], 2, 0.3)
        parameters[0][3].requires_grad_()
        with torch.no_grad():
            again = nodes(x, parameters, [4, 5], 2, 0.3)
    assert torch.equal(z, expected) and torch.equal(again, expected) and not z.requires_grad and not again.requires_grad and len(made) == (4 if route == "python" else 0)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives(p, route):
    """Of the node as of the formula; and its first derivatives are the same with a graph of their own as without."""
    lengths, heads = [4, 0, 2], 2
    x, parameters, grad = case(6, 6, 10)

    def second(function, dtype):
        leaves = [x.to(dtype).requires_grad_(), *(t.to(dtype).requires_grad_() for layer in parameters for t in layer)]
        z = function(leaves[0], [leaves[1:13], leaves[13:]], lengths, heads, p)
        plain = torch.autograd.grad(z, leaves, grad.to(dtype), retain_graph=True)
        first = torch.autograd.grad(z, leaves, grad.to(dtype), create_graph=True)
        for a, b in zip(plain, first):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:-1])]

    for got, e in zip(second(nodes, torch.float32), second(formula, torch.float64), strict=True):
        assert (got - e).norm() <= 1e-4 * e.norm() + 1e-4


@pytest.mark.parametrize("autocast", AUTOCAST[1:], ids=str)
def test_second_derivatives_under_autocast(autocast, route):
    """At most twice the error of the separate ops, in each tensor's norm, and some roundings; wherever backward is called from."""
    x, parameters, grad = case(6, 6, 10)
    for layer in parameters:
        layer[7] += 8.0 * (-1.0) ** torch.arange(10)
    results = []
    for function, dtype in ((nodes, torch.float32), (separate, torch.float32), (formula, torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_(), *(t.to(dtype, copy=True).requires_grad_() for layer in parameters for t in layer)]
        with torch.autocast("cpu", autocast, enabled=dtype == torch.float32):
            z = function(leaves[0], [leaves[1:13], leaves[13:]], [4, 2], 2, 0.5)
            inside = torch.autograd.grad(z, leaves, grad.to(dtype), create_graph=True)
        first = torch.autograd.grad(z, leaves, grad.to(dtype), create_graph=True)
        assert all(g.dtype == dtype and torch.equal(g, i) for g, i in zip(first, inside))
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:-1])])
    for i, (got, usual, e) in enumerate(zip(*results, strict=True)):
        assert (got - e).norm() <= 2 * (usual - e).norm() + torch.finfo(autocast).eps * (e.norm() + 1), i


@pytest.mark.parametrize("wanted", [[0], [1], [2], [4], [6], [7], [8], [9], [12], [3, 11], [*range(1, 13)]], ids=str)
def test_frozen_parameters(monkeypatch, wanted, route):
    """Gradients of what is wanted alone, and no product further down than they need."""
    x, parameters, grad = case(9, 8, 16, layers=1)
    backward, products = op.product_backward, []
    monkeypatch.setattr(op, "product_backward", lambda g, kept, *a: (products.append(a[:3]), backward(g, kept, *a))[1])
    results = []
    for function in (nodes, separate):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate([x, *parameters[0]])]
        function(leaves[0], [leaves[1:]], [4, 5], 2, 0.5).backward(grad)
        assert [i for i, t in enumerate(leaves) if t.grad is not None] == wanted
        results.append([leaves[i].grad for i in wanted])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    needed = [(any(i < 9 for i in wanted), 9 in wanted, False), (any(i < 7 for i in wanted), 7 in wanted, False),
              (any(i < 3 for i in wanted), 3 in wanted, False), (0 in wanted, 1 in wanted, 2 in wanted)]
    assert route == "node" or products == needed[:1 + next((i for i, (x, _, _) in enumerate(needed[:3]) if not x), 3)]


@pytest.mark.parametrize("autocast", AUTOCAST[:2], ids=str)
def test_strides_and_repeats(autocast, route):
    """Transposed, sliced and expanded; a second backward gives the same, so nothing that is kept or given was changed."""
    x, parameters, grad = case(12, 8, 16)
    expected = run(nodes, x, parameters, grad, [5, 7], 2, 0.3, autocast=autocast)
    for view in (lambda t: t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 0],
                 lambda t: torch.cat([t, t], -1)[..., :t.shape[-1]]):
        leaves = [view(t).requires_grad_() for t in [x, *sum(parameters, [])]]
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            z = nodes(leaves[0], [leaves[1:13], leaves[13:]], [5, 7], 2, 0.3)
        given, first = view(grad), torch.autograd.grad(z, leaves, view(grad), retain_graph=True)
        for got, e in zip([z, *first], expected, strict=True):
            torch.testing.assert_close(got, e, **({} if autocast is None else dict(rtol=0.05, atol=0.05)))
        again = torch.autograd.grad(z, leaves, given)
        assert all(torch.equal(a, b) for a, b in zip(first, again)) and torch.equal(given, grad)
    ones = run(nodes, x, parameters, torch.ones(1, 1).expand(12, 8), [5, 7], 2, 0.3, autocast=autocast)
    assert all(torch.equal(a, b) for a, b in zip(ones, run(nodes, x, parameters, torch.ones(12, 8), [5, 7], 2, 0.3, autocast=autocast)))


def test_threads(route):
    """With each number of them what the separate ops give; layers that run at the same time do not meet."""
    lengths, width, heads, inside = CASES[3]
    drawn = case(sum(lengths), width, inside)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for autocast in AUTOCAST:
                expected = run(separate, *drawn, lengths, heads, 0.5, autocast=autocast)
                assert all(torch.equal(a, b) for a, b in zip(run(nodes, *drawn, lengths, heads, 0.5, autocast=autocast), expected, strict=True))
        torch.set_num_threads(1)
        each = [(case(sum(lengths), width, inside, seed=i), lengths[i:] + lengths[:i]) for i in range(3)]
        alone = [run(nodes, *own, at, heads, 0.5) for own, at in each]
        with ThreadPoolExecutor(3) as pool:
            together = pool.map(lambda each: run(nodes, *each[0], each[1], heads, 0.5), 4 * each)
            for i, found in enumerate(together):
                assert all(torch.equal(a, b) for a, b in zip(found, alone[i % 3], strict=True))
    finally:
        torch.set_num_threads(before)


def test_keeps_no_more_than_the_separate_ops(route):
    lengths, width, heads, inside = CASES[3]
    for autocast in AUTOCAST:
        sizes = []
        for function in (nodes, separate):
            x, parameters, _ = case(sum(lengths), width, inside)
            leaves, kept = [t.requires_grad_() for t in [x, *sum(parameters, [])]], {}
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t)
            with hooks, torch.autocast("cpu", autocast, enabled=autocast is not None):
                z = function(leaves[0], [leaves[1:13], leaves[13:]], lengths, heads, 0.5)
            assert z.requires_grad
            for t in leaves:                                    # they are there anyway
                kept.pop(t.untyped_storage().data_ptr(), None)
            sizes.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
        assert sizes[0] <= sizes[1]


def test_seed_comes_from_torch(route):
    x, parameters, _ = case(9, 8, 16)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(encoder_layers(x, [4, 5], parameters, heads=2, p=0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(encoder_layers(x, [4, 5], parameters, heads=2, p=0.5), draws[2])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    encoder_layers(x, [4, 5], parameters, heads=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_where_it_is_no_node(monkeypatch):
    """Another dtype, plain PyTorch, an empty batch, transforms, a large layer; each with the result of the formula."""
    x, parameters, _ = case(9, 8, 16)
    made, expected = count(monkeypatch), formula(x, parameters, [4, 5], 2, 0.0)
    double = [[t.double() for t in layer] for layer in parameters]
    torch.testing.assert_close(nodes(x.double(), double, [4, 5], 2, 0.0), formula(x.double(), double, [4, 5], 2, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert nodes(x.double(), double, [4, 5], 2, 0.0).dtype == torch.float64
    torch.testing.assert_close(nodes(x, parameters, [4, 5], 2, 0.0, backend="torch"), expected)
    monkeypatch.setenv("ADA2I_FAST_BACKEND", "torch")
    torch.testing.assert_close(nodes(x, parameters, [4, 5], 2, 0.0), expected)
    monkeypatch.delenv("ADA2I_FAST_BACKEND")
    assert nodes(x[:0], parameters, [0, 0], 2, 0.5).shape == (0, 8)
    small = [[t.bfloat16() for t in layer] for layer in parameters]
    assert nodes(x.bfloat16(), small, [4, 5], 2, 0.5).dtype == torch.bfloat16
    got = torch.func.grad(lambda x: nodes(x, parameters, [4, 5], 2, 0.0, backend="torch").square().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(formula(leaf, parameters, [4, 5], 2, 0.0).square().sum(), leaf)[0], rtol=1e-4, atol=1e-4)
    torch.func.vmap(lambda t: nodes(x, [[t, *parameters[0][1:]]], [4, 5], 2, 0.0, backend="torch"))(parameters[0][0][None])
    with monkeypatch.context() as large:
        large.setattr(op, "_LARGE", 3 * 9 * 8 * 8)
        torch.testing.assert_close(nodes(x, parameters, [4, 5], 2, 0.0), expected)
    assert made == []
    offsets = DialogueOffsets(torch.tensor([0, 4, 9]), 5)
    assert torch.equal(nodes(x, parameters, offsets, 2, 0.5), nodes(x, parameters, [4, 5], 2, 0.5)) and len(made) == 4


def test_compiled_code_takes_the_ops():
    torch._dynamo.reset()
    x, parameters, grad = case(9, 8, 16)
    compiled = torch.compile(nodes, fullgraph=True, backend="aot_eager")
    expected = run(nodes, x, parameters, grad, [4, 5], 2, 0.5)
    for got, e in zip(run(compiled, x, parameters, grad, [4, 5], 2, 0.5), expected, strict=True):
        torch.testing.assert_close(got, e)


# -------------------------------------------------------------------------------------------------- calls that wait for one another


@pytest.fixture
def programs(monkeypatch):
    """How many calls were handed over each time, a list that grows; the products are the library's."""
    monkeypatch.setenv("ADA2I_FAST_LINEAR", "native")
    found, function = [], cpu._function

    def watched(name):
        made = function(name)
        return made if name != "ada2i_cpu_run" else lambda calls, count: (found.append(len(calls)), made(calls, count))[1]

    for name in ("linear_forward", "linear_input", "linear_backward", "dialogue_attention_forward", "dialogue_attention_backward",
                 *(f"{op}_{way}" for op in ("dropout_norm", "relu_dropout") for way in ("forward", "backward"))):
        cpu.address(f"ada2i_{name}")
    monkeypatch.setattr(cpu, "_function", watched)
    return found


def test_calls_are_made_together(programs):
    """Seven a layer forward (ReLU and its dropout are part of a product), and twelve for its gradients: g_x of one product adds to the other
    gradient of its input."""
    drawn = case(9, 8, 16)
    run(nodes, *drawn, [4, 5], 2, 0.5)
    assert programs == [14, 12, 12]
    programs.clear()
    run(nodes, *drawn, [4, 5], 2, 0.5, autocast=torch.bfloat16)     # between the norm and the product behind it torch casts
    assert sum(programs) == 38 and len(programs) > 3


def test_nobody_sees_what_has_not_been_computed(programs, monkeypatch):
    """Hooks of saved tensors, a dispatch mode and torch.profiler may look at results at once: then no call waits."""
    drawn = case(9, 8, 16)
    expected = run(nodes, *drawn, [4, 5], 2, 0.5)
    programs.clear()
    poisoned(monkeypatch)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        assert all(torch.equal(got, e) for got, e in zip(run(nodes, *drawn, [4, 5], 2, 0.5), expected, strict=True))
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.extend(t.isfinite().all() for t in args if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() > 3 * 9 * 8)
            return function(*args, **(kwargs or {}))

    with Look():
        nodes(*drawn[:2], [4, 5], 2, 0.5)
    assert programs == [] and all(seen)


def test_calls_that_fail_or_are_given_up(programs):
    """The exception names the function; what waits behind it, or when the block is left by another exception, is not called."""
    class Wrong(ctypes.Structure):
        _fields_ = [("number", ctypes.c_int64)]

    x, parameters, _ = case(9, 8, 16, layers=1)
    with pytest.raises(RuntimeError, match="ada2i_linear_forward: .* was built from other sources"):
        with cpu.together():
            cpu.call("ada2i_linear_forward", Wrong(0), x)
            cpu.call("ada2i_linear_input", Wrong(0), x)
    with pytest.raises(KeyError):
        with cpu.together():
            cpu.call("ada2i_linear_forward", Wrong(0), x)
            raise KeyError
    assert programs == [2]
    assert nodes(x, parameters, [4, 5], 2, 0.0).isfinite().all() and programs == [2, 7]


def test_a_profiler_sees_the_library():
    x, parameters, grad = case(9, 8, 16, layers=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        run(nodes, x, parameters, grad, [4, 5], 2, 0.5)
    names = [e.name for e in trace.events() if e.name.startswith("ada2i_")]
    there = ["dialogue_attention", "dropout_norm", "relu_dropout", "dropout_norm"]
    back = ["dropout_norm", "relu_dropout", "dropout_norm", "dialogue_attention"]
    assert names == [*(f"ada2i_{n}_forward" for n in there), *(f"ada2i_{n}_backward" for n in back)]


def test_refusals():
    x, parameters, _ = case(6, 6, 10)
    with pytest.raises(ValueError, match=r"lengths: expected them to sum to 6 \(the rows of qkv\), got 5"):
        nodes(x, parameters, [4, 1], 2, 0.0)
    with pytest.raises(ValueError, match="heads: expected a divisor of the width, got 4"):
        nodes(x, parameters, [4, 2], 4, 0.0)
    with pytest.raises(ValueError, match="p: expected a probability below 1, got 1.0"):
        nodes(x, parameters, [4, 2], 2, 1.0)
    with pytest.raises(ValueError, match=r"x: expected \[N, d\], got \[1, 6, 6\]"):
        nodes(x[None], parameters, [4, 2], 2, 0.0)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve this input: it computes in float32, not float64"):
        nodes(x.double(), [[t.double() for t in layer] for layer in parameters], [4, 2], 2, 0.0, backend="cpu")


# ---- in one call, by node


def one_call(x, parameters, lengths=(4, 5), heads=2, p=0.0, eps=None, seed=SEED, stream=0, out=None):
    """What `node` says to the arguments that ops.encoder_layers has."""
    return node.encoder_layers(x, lengths, parameters, heads, p, eps, seed, stream, out)


@pytest.mark.parametrize("library", ["auto", "native", "onednn", "mkl"])
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_node_is_what_python_does(monkeypatch, whole, autocast, library):
    """To the last bit, with a linear map behind the layers, whatever gradients are wanted, also where products have to be measured first, and
    with torch's generator."""
    monkeypatch.setenv("ADA2I_FAST_LINEAR", library)
    rows, width, inside, lengths = 70, 64, 128, [40, 0, 30]     # from 2^19 multiply-adds on it is measured whose products are the fastest
    x, parameters, _ = case(rows, width, inside)
    g = torch.Generator().manual_seed(1)
    out, grad = [torch.randn(33, width, generator=g) / 8, torch.randn(33, generator=g)], torch.randn(rows, 33, generator=g)
    every = [x, *sum(parameters, []), *out]

    def results(wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(every)]
        torch.manual_seed(3)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            z = encoder_layers(leaves[0], lengths, [leaves[1:13], leaves[13:25]], heads=4, p=0.4, eps=EPS, stream=7, out=leaves[25:])
            with torch.no_grad():
                torch.manual_seed(3)
                assert torch.equal(z, encoder_layers(leaves[0], lengths, [leaves[1:13], leaves[13:25]], heads=4, p=0.4, eps=EPS, stream=7, out=leaves[25:]))
        found = torch.autograd.grad(z, [leaves[i] for i in wanted], grad.to(z.dtype), retain_graph=True)
        second = torch.autograd.grad(z, [leaves[i] for i in wanted], grad.to(z.dtype), create_graph=True)
        return [z, *found, *second]

    called, there = node.encoder_layers, []
    for wanted in ([*range(27)], [0], [13, 25], [26], [14, 24, 25]):
        with monkeypatch.context() as patch:
            patch.setattr(node, "encoder_layers", lambda *_: None)
            expected = results(wanted)
        with monkeypatch.context() as patch:
            patch.setattr(node, "encoder_layers", lambda *a: there.append(called(*a)) or there[-1])
            found = results(wanted)
        assert None not in there and found[0].grad_fn.name() == "EncoderOutBackward"
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            same = i <= len(wanted)                             # a whole layer's graph adds gradients up in another order than halves of it
            assert a.dtype == e.dtype and (torch.equal(a, e) if same else (a - e).norm() <= 1e-2 * e.norm() + 1e-3), (wanted, i)


def test_node_leaves_measurements_to_python(monkeypatch, whole):
    """Until it is known whose the products are; without gradients the forward ones are enough."""
    monkeypatch.delenv("ADA2I_FAST_LINEAR", raising=False)
    products = importlib.import_module("ada2i_fast.ops.linear")
    monkeypatch.setattr(products, "_SMALL", 0)
    monkeypatch.setattr(products, "_chosen", {})
    x, parameters, grad = case(9, 8, 16)
    with torch.no_grad():
        assert one_call(x, parameters) is None
        nodes(x, parameters, [4, 5], 2, 0.0)
        assert one_call(x, parameters) is not None
    assert one_call(x, parameters) is None
    run(nodes, x, parameters, grad, [4, 5], 2, 0.0)
    assert one_call(x, parameters) is not None


def test_node_declines_what_is_not_plain(monkeypatch, whole):
    """Then Python serves it, or says what is wrong."""
    x, parameters, _ = case(9, 8, 16)
    first, second = parameters
    out = [torch.zeros(3, 8), torch.zeros(3)]
    assert one_call(x, parameters) is not None and one_call(x, parameters, out=out) is not None and one_call(x, tuple(map(tuple, parameters))) is not None

    class Own(torch.Tensor):
        pass

    class Through(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **kwargs or {})

    odd = [x.t(), x.as_subclass(Own), x.to("meta"), x.double(), x.bfloat16(), x.long(), x.t().contiguous().t(), x[None], x[:0], "x", None]
    assert all(one_call(t, parameters) is None for t in odd)
    for i, t in enumerate(first):
        for wrong in (torch.zeros(5), torch.zeros(5, 5), torch.zeros(()), t.double(), t.bfloat16(), t.to("meta"), None):
            assert one_call(x, [[*first[:i], wrong, *first[i + 1:]], second]) is None, i
            assert one_call(x, [first, [*second[:i], wrong, *second[i + 1:]]]) is None, i
    for wrong in ([], None, [first[:11]], [[*first, first[0]]], [first, case(9, 8, 12)[1][0]]):
        assert one_call(x, wrong) is None
    for wrong in (out[:1], [out[0].double(), out[1]], [torch.zeros(3, 7), out[1]], [out[0], torch.zeros(2)], [torch.zeros(0, 8), torch.zeros(0)], "no"):
        assert one_call(x, parameters, out=wrong) is None
    for wrong in (dict(lengths=[4, 4]), dict(lengths=[4, 6]), dict(lengths=[10, -1]), dict(lengths=[2 ** 70]), dict(lengths=None), dict(lengths=[4.0, 5.0]),
                  dict(lengths=DialogueOffsets(torch.tensor([0, 4, 9]), 5)), dict(heads=3), dict(heads=0), dict(heads=-2), dict(heads=None), dict(p=1.0),
                  dict(p=-0.1), dict(p=float("nan")), dict(p="0"), dict(eps=[(1e-5, 1e-5)]), dict(eps=[(1e-5,), (1e-5,)]), dict(eps=[("a", 1e-5)] * 2),
                  dict(stream=None), dict(p=0.5, seed=torch.zeros(2, dtype=torch.int64)), dict(p=0.5, seed=torch.zeros(1)), dict(p=0.5, seed=3)):
        assert one_call(x, parameters, **wrong) is None, wrong
    with torch.autocast("cpu", torch.bfloat16):
        assert one_call(x, parameters) is not None and one_call(x.bfloat16(), parameters) is None
    with Through():
        assert one_call(x, parameters) is None
    with torch.autograd.forward_ad.dual_level():
        assert one_call(torch.autograd.forward_ad.make_dual(x, x), parameters) is None
    found = []
    torch.func.grad(lambda t: found.append(one_call(t, parameters)) or found.append(one_call(x, parameters)) or t.sum())(x)
    assert found == [None, None]
    for forced, served in (("torch", False), ("triton", False), ("cpu", True), ("", True)):
        monkeypatch.setenv("ADA2I_FAST_BACKEND", forced)
        assert (one_call(x, parameters) is not None) == served, forced


def test_node_keeps_to_the_rules_of_autograd(whole):
    x, parameters, grad = case(9, 8, 16)
    leaves = [[t.clone().requires_grad_() for t in layer] for layer in parameters]
    out = [torch.ones(3, 8).requires_grad_(), torch.zeros(3).requires_grad_()]

    def z():
        return one_call(x, leaves, p=0.5, out=out)

    made = z()
    names = [made.grad_fn.name()]
    step = made.grad_fn
    while (step := step.next_functions[0][0]) is not None:
        names.append(step.name())
    assert names == ["EncoderOutBackward", *["EncoderInnerBackward", "EncoderAttentionBackward"] * 2]
    made.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        made.sum().backward()
    once = [t.grad.clone() for t in sum(leaves, out)]
    z().sum().backward()                                        # accumulates
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(sum(leaves, out), once))
    for changed in (leaves[0][0], leaves[1][6], leaves[0][10], out[0]):
        made = z()
        with torch.no_grad():
            changed.add_(0.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.sum().backward()
    made = one_call(x, parameters)                              # nobody wants a gradient
    assert made.grad_fn is None and not made.requires_grad
    with torch.inference_mode():
        assert torch.equal(one_call(x, leaves), made)

    def gradients(function):
        return torch.autograd.grad(function(*leaves[0]), leaves[0])

    def loss(*layer):
        return (one_call(x, [layer, leaves[1]], p=0.5) * grad).sum()

    again = gradients(lambda *t: torch.utils.checkpoint.checkpoint(loss, *t, use_reentrant=False))
    assert all(map(torch.equal, gradients(loss), again))

    def refuses(t):
        raise KeyError("a hook's own error")

    with pytest.raises(KeyError, match="a hook's own error"), torch.autograd.graph.saved_tensors_hooks(refuses, lambda t: t):
        z()
    with pytest.raises(KeyError, match="a hook's own error"):
        made = z()
        with torch.autograd.graph.saved_tensors_hooks(refuses, lambda t: t):
            torch.autograd.grad(made.sum(), leaves[0], create_graph=True)


def test_node_shows_in_a_profile(whole, monkeypatch):
    monkeypatch.setenv("ADA2I_FAST_LINEAR", "native")
    x, parameters, grad = case(9, 8, 16, layers=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        run(nodes, x, parameters, grad, [4, 5], 2, 0.5)
    names = [e.name for e in trace.events() if e.name.startswith("ada2i_")]
    there = ["linear", "dialogue_attention", "linear", "dropout_norm", "linear", "linear", "dropout_norm"]
    assert names[:7] == [f"ada2i_{n}_forward" for n in there]
    assert sorted(names[7:]) == sorted([*(f"ada2i_{n}_backward" for n in ["dropout_norm", "relu_dropout", "dropout_norm", "dialogue_attention"]),
                                        *["ada2i_linear_input", "ada2i_linear_backward"] * 4])


# ---- on a GPU: nodes over the Triton kernels


def on_gpu(rows, width, inside):
    """`case` there, far from where a rounding would decide about a gradient."""
    x, parameters, grad = case(rows, width, inside)
    for layer in parameters:
        layer[7] += 8.0 * (-1.0) ** torch.arange(inside)
    return x.cuda(), [[t.cuda() for t in layer] for layer in parameters], grad.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("lengths,width,heads,inside", [*CASES, ([300, 0, 41], 256, 2, 512)])
def test_on_a_gpu(monkeypatch, lengths, width, heads, inside, p, autocast):
    """The rule of `test_against_float64`; the same bits twice, with lengths and with offsets."""
    x, parameters, grad = on_gpu(sum(lengths), width, inside)
    exact = run(formula, x.double(), [[t.double() for t in layer] for layer in parameters], grad.double(), lengths, heads, p)
    usual = run(formula, x, parameters, grad, lengths, heads, p, autocast=autocast)
    made = count(monkeypatch)
    found = run(nodes, x, parameters, grad, lengths, heads, p, autocast=autocast)
    offsets = DialogueOffsets(torch.tensor([0, *lengths]).cumsum(0).cuda(), max(lengths))
    again = run(nodes, x, parameters, grad, offsets, heads, p, autocast=autocast)
    assert len(made) == 4
    terms = max(e.norm() for e in exact[1:])
    floor = 8 * 2.0 ** -24 if autocast is None else torch.finfo(autocast).eps
    for i, (got, a, u, e) in enumerate(zip(found, again, usual, exact, strict=True)):
        assert got.dtype == torch.float32 and got.isfinite().all() and torch.equal(got, a), i
        assert (got - e).norm() <= 2 * (u - e).norm() + floor * (e.norm() + 0.1 * terms), i


@pytest.mark.gpu
def test_second_derivatives_on_a_gpu():
    lengths, heads = [7, 3, 5], 3
    x, parameters, grad = on_gpu(15, 12, 20)
    found = []
    for function, dtype in ((nodes, torch.float32), (formula, torch.float64)):
        leaves = [x.to(dtype).requires_grad_(), *(t.to(dtype).requires_grad_() for layer in parameters for t in layer)]
        z = function(leaves[0], [leaves[1:13], leaves[13:]], lengths, heads, 0.3)
        first = torch.autograd.grad(z, leaves, grad.to(dtype), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True))
    largest = max(e.abs().max() for e in found[1])
    for i, (got, e) in enumerate(zip(*found, strict=True)):
        assert (got - e).abs().max() <= 1e-4 * (e.abs().max() + 1e-2 * largest), i


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_a_linear_map_behind(autocast, backend, device):
    """Is `linear` of the result, which on CUDA somebody has rounded already."""
    lengths, heads = [7, 0, 9], 4
    x, parameters, _ = case(16, 32, 24)
    g = torch.Generator().manual_seed(1)
    x, weight, bias, grad = (t.to(device) for t in (x, *(torch.randn(*shape, generator=g) for shape in ((20, 32), (20,), (16, 20)))))
    parameters = [[t.to(device) for t in layer] for layer in parameters] + [[weight, bias]]

    def behind(x, parameters):
        return nodes(x, parameters[:-1], lengths, heads, 0.0, out=tuple(parameters[-1]), backend=backend)

    def apart(x, parameters):
        return linear(nodes(x, parameters[:-1], lengths, heads, 0.0, backend=backend), *parameters[-1], backend=backend)

    for i, (got, e) in enumerate(zip(run(behind, x, parameters, grad, autocast=autocast), run(apart, x, parameters, grad, autocast=autocast),
                                     strict=True)):
        assert got.dtype == e.dtype and torch.equal(got, e), i


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", AUTOCAST[:2], ids=str)
def test_in_a_cuda_graph(autocast, captured):
    """Where gradients of weights are a branch beside the rest."""
    lengths, heads = [40, 0, 24], 4
    x, parameters, grad = on_gpu(64, 64, 96)

    def step():
        return run(nodes, x, parameters, grad, lengths, heads, 0.3, autocast=autocast)

    graph, replayed = captured(step)
    for factor in (0.5, 3.0):
        x.mul_(factor)
        graph.replay()
        for i, (got, e) in enumerate(zip(replayed, step(), strict=True)):
            assert (got - e).norm() <= 1e-5 * e.norm(), i


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_refused_shapes(backend):
    d, f = 8, 16
    shapes = [(3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (f, d), (f,), (d, f), (d,), (d,), (d,)]
    x, parameters = torch.randn(5, d), [torch.randn(shape) for shape in shapes]
    for place, name in ((0, "qkv_weight"), (4, "norm1_weight"), (7, "bias1"), (11, "norm2_bias")):
        wrong = [torch.randn(3) if i == place else t for i, t in enumerate(parameters)]
        with pytest.raises(ValueError, match=rf"layers\[1\] {name}: expected .* on cpu, got \[3\] on cpu"):
            encoder_layers(x, [3, 2], [parameters, wrong], heads=2, backend=backend)
    with pytest.raises(ValueError, match=r"layers\[0\]: expected 12 parameters, got 11"):
        encoder_layers(x, [3, 2], [parameters[:11]], heads=2, backend=backend)
