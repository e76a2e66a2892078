"""attention_mapping: the native backend against float64, the textbook, and what an op of torch has to obey."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings

from ada2i_fast import cpu
from ada2i_fast.ops import attention_mapping
from afw_cases import (Case, assert_close, assert_same, assert_same_bits_with_threads, cases, guarded, inputs, leaves, poisoned, run_mapping,
                       textbook)

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
profile = settings.get_profile("ops")
TIERS = cpu.tiers() if cpu.why_not() is None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("x", "grad_target", "phi", "phi_bias")

SMALL = Case(lengths=(19,), widths=(18, 33, 7), rank=1, seed=1)
IEMOCAP = Case(lengths=(245,), widths=(300, 300, 300), rank=1, seed=2)
LONG = Case(lengths=(1121,), widths=(20, 35), rank=1, reduction="mean", seed=3)


def call(case, given, backend="cpu"):
    return attention_mapping(*(given[n] for n in NAMES), reduction=case.reduction, backend=backend)


def check(case: Case, dtype: torch.dtype) -> None:
    """The gradients are sums of signs, and a sign near zero is a matter of rounding: so where the difference is within the rounding
    error of plain torch, the elements it enters are left out by moving the target away from it."""
    drawn = inputs(case, dtype)
    margin = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    for j, (x, w, b) in enumerate(zip(drawn["x"], drawn["phi"], drawn["phi_bias"])):
        difference = torch.nn.functional.linear(x.double(), w.double(), b.double()) - drawn["grad_target"][j].double()
        push = torch.where(difference.abs() < margin, -2 * margin * torch.where(difference < 0, -1.0, 1.0), 0.0)
        drawn["grad_target"][j] = (drawn["grad_target"][j].double() + push).to(dtype)
    assert_close(run_mapping(case, drawn, "cpu"), run_mapping(case, drawn, "torch"), run_mapping(case, drawn, "torch", torch.float64), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(profile)
@given(case=cases())
@example(case=Case(lengths=(), widths=(3, 4), rank=2))
@example(case=Case(lengths=(1,), widths=(1,), rank=1))
def test_error_against_float64(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("case", [SMALL, IEMOCAP, LONG], ids=["small", "iemocap", "long"])
@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tier(case, tier, dtype):
    check(case, dtype)


@settings(profile, max_examples=15)
@given(case=cases())
def test_against_textbook(case):
    if not sum(case.lengths):    # the mean over nothing
        case = Case(**{**case.__dict__, "lengths": (3,)})
    drawn = inputs(case)
    _, exact = textbook(case, drawn)
    for backend in ("cpu", "torch"):
        assert_same(run_mapping(case, drawn, backend), exact)


def test_no_difference_has_no_gradient():
    """sign(0) = 0, as torch has it."""
    drawn = inputs(SMALL)
    drawn["grad_target"] = [b.expand(19, -1).clone() for b in drawn["phi_bias"]]
    drawn["x"] = [torch.zeros_like(t) for t in drawn["x"]]
    results = run_mapping(SMALL, drawn, "cpu")
    assert all((value == 0).all() for value in results.values())


def test_same_bits_whatever_the_threads():
    for dtype in DTYPES:
        drawn = inputs(IEMOCAP, dtype)
        assert_same_bits_with_threads(lambda: run_mapping(IEMOCAP, drawn, "cpu"))


@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stays_within_its_arrays(monkeypatch, tier, dtype):
    """Misaligned inputs inside buffers of NaN, outputs poisoned: the same bits."""
    for case in (SMALL, LONG):
        drawn = inputs(case, dtype)
        expected = run_mapping(case, drawn, "cpu")
        inside = {name: [guarded(t)[0].requires_grad_() for t in drawn[name]] for name in NAMES}
        with monkeypatch.context() as patch:
            poisoned(patch)
            loss = call(case, inside)
            grads = torch.autograd.grad(1000 * loss, [t for n in NAMES for t in inside[n]])
        for (name, e), a in zip(expected.items(), [loss, *grads]):
            assert torch.equal(a, e), name


def test_strided_inputs():
    case = Case(lengths=(11,), widths=(12, 12), rank=1, seed=6)
    drawn = inputs(case)
    drawn["x"][0] = drawn["x"][0][:1].expand(11, 12)
    drawn["x"][1] = drawn["x"][1].t().contiguous().t()
    drawn["grad_target"][0] = torch.stack([drawn["grad_target"][0]] * 2, dim=2)[:, :, 0]
    drawn["phi"][1] = drawn["phi"][1].t()
    plain = {name: [t.contiguous() for t in tensors] for name, tensors in drawn.items()}
    a, b = (run_mapping(case, d, "cpu") for d in (drawn, plain))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_saves_the_sign_alone():
    """Beside inputs and weights: a byte per element."""
    at = leaves(inputs(IEMOCAP, torch.float32), NAMES)
    own = {t.data_ptr() for n in NAMES for t in at[n]}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        loss = call(IEMOCAP, at)
    assert loss.requires_grad
    assert sum(t.nbytes for p, t in saved.items() if p not in own) == 3 * 245 * 300


def test_first_and_second_derivatives():
    case = Case(lengths=(3,), widths=(3, 2), rank=1, seed=8)
    for reduction in ("sum", "mean"):
        at = leaves(inputs(case), NAMES)
        flat = [t for name in NAMES for t in at[name]]

        def function(*tensors):
            return attention_mapping(*(tensors[2 * i:2 * i + 2] for i in range(4)), reduction=reduction, backend="cpu")

        assert torch.autograd.gradcheck(function, flat)
        assert torch.autograd.gradgradcheck(function, flat)

        # gradgradcheck takes the first derivative as it comes: with create_graph it is another expression, which has to agree.
        plain = torch.autograd.grad(function(*flat), flat)
        graphed = torch.autograd.grad(function(*flat), flat, create_graph=True)
        torch.testing.assert_close(graphed, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    drawn = inputs(SMALL, dtype)
    four = [drawn[n] for n in NAMES]
    torch.library.opcheck(torch.ops.ada2i_fast.attention_mapping_forward.default, (*four, "sum", "cpu"))
    loss, *sign = torch.ops.ada2i_fast.attention_mapping_forward(*four, "sum", "cpu")
    torch.library.opcheck(torch.ops.ada2i_fast.attention_mapping_backward.default,
                          (torch.ones_like(loss), drawn["x"], sign, drawn["phi"], "mean", "cpu"))


def test_compiles_whole_and_once():
    torch._dynamo.reset()

    def loss_of(x, target, phi, bias):
        return attention_mapping(x, target, phi, bias, backend="cpu")

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (8, 15, 21):
            case = Case(**{**SMALL.__dict__, "lengths": (rows,)})
            results = []
            for f in (loss_of, compiled):
                at = leaves(inputs(case, torch.float32), NAMES)
                loss = f(*(at[n] for n in NAMES))
                results.append([loss, *torch.autograd.grad(loss, [t for n in NAMES for t in at[n]])])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


def test_autocast_leaves_the_dtype_of_x():
    drawn = inputs(SMALL, torch.float32)
    expected = call(SMALL, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("cpu", "torch"):
            torch.testing.assert_close(call(SMALL, drawn, backend), expected)
    mixed = leaves({n: [t.bfloat16() for t in drawn[n]] if n == "x" else drawn[n] for n in NAMES}, NAMES)
    loss = call(SMALL, mixed)
    assert loss.dtype == torch.float32
    for g, t in zip(torch.autograd.grad(loss, [t for n in NAMES for t in mixed[n]]), [t for n in NAMES for t in mixed[n]]):
        assert g.dtype == t.dtype


def test_refusals():
    drawn = inputs(SMALL)
    with pytest.raises(ValueError, match="reduction"):
        attention_mapping(*(drawn[n] for n in NAMES), reduction="none")
