"""tensor_ring: the native backend against float64, the textbook, and what an op of torch has to obey."""

from __future__ import annotations

import concurrent.futures
import time

import pytest
import torch
from hypothesis import example, given, settings

from ada2i_fast import cpu
from ada2i_fast.ops import keep_mask, tensor_ring
from afw_cases import (PARAMETERS, Case, assert_close, assert_same, assert_same_bits_with_threads, cases, guarded, inputs, leaves, offsets, poisoned,
                       run_ring, textbook)

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
profile = settings.get_profile("ops")
TIERS = cpu.tiers() if cpu.why_not() is None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

SMALL = Case(lengths=(5, 0, 1, 13), widths=(18, 33, 7), rank=5, dropout=0.3, seed=1)
IEMOCAP = Case(lengths=(51, 46, 59, 50, 39), widths=(300, 300, 300), rank=11, dropout=0.5, scale=11 ** -0.5, beta=0.012, seed=2)
LONG = Case(lengths=(700, 0, 421), widths=(20, 35), rank=6, dropout=0.1, gated_target=True, seed=3)   # several chunks of rows
WIDE = Case(lengths=(9, 4), widths=(40, 17, 24, 16), rank=32, gated_target=True, seed=4)


def call(case, given, backend="cpu", **changes):
    return tensor_ring(given["x"], offsets(case), *(given[n] for n in PARAMETERS[1:]), backend=backend, **{**case.options, **changes})


def check(case: Case, dtype: torch.dtype) -> None:
    drawn = inputs(case, dtype)
    assert_close(run_ring(case, drawn, "cpu"), run_ring(case, drawn, "torch"), run_ring(case, drawn, "torch", torch.float64), dtype)


# ------------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(profile, max_examples=20)
@given(case=cases())
@example(case=Case(lengths=(), widths=(3, 4), rank=2))
@example(case=Case(lengths=(0,), widths=(3,), rank=2, dropout=0.5))
@example(case=Case(lengths=(1,), widths=(1,), rank=1))
def test_error_against_float64(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("case", [SMALL, IEMOCAP, LONG, WIDE], ids=["small", "iemocap", "long", "wide"])
@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tier(case, tier, dtype):
    check(case, dtype)


@settings(profile, max_examples=15)
@given(case=cases())
def test_against_textbook(case):
    if not case.lengths or 0 in case.lengths:    # the textbook knows no empty dialogue
        case = Case(**{**case.__dict__, "lengths": tuple(n or 1 for n in case.lengths) or (1,)})
    drawn = inputs(case)
    exact, _ = textbook(case, drawn)
    for backend in ("cpu", "torch"):
        assert_same(run_ring(case, drawn, backend), exact)


def test_mask_is_that_of_keep_mask():
    """All gated values are far from 0, so the zeros of the result are the mask. Rows beyond 2^32 are out of reach; columns are not."""
    case = Case(lengths=(37, 30), widths=(130, 64, 7), rank=2, dropout=0.4, seed=5)
    drawn = inputs(case)
    drawn["x"] = [torch.ones_like(t) for t in drawn["x"]]
    for name in PARAMETERS[1:]:
        drawn[name] = [torch.zeros_like(t) for t in drawn[name]]
    for dtype in DTYPES:
        out, _ = call(case, {n: [t.to(dtype) for t in ts] for n, ts in drawn.items()}, beta=1.0)
        for j, t in enumerate(out):
            assert torch.equal(t != 0, keep_mask(case.options["seed"], j, *t.shape, case.dropout))
            # 1 / (1 - p) rounded once to the storage type
            torch.testing.assert_close(t[t != 0].double(), torch.full_like(t[t != 0], 1 / 0.6, dtype=torch.float64), rtol=torch.finfo(dtype).eps, atol=0)


def test_dropout_without_seed_draws_from_torch():
    drawn = inputs(SMALL, torch.float32)
    first, again, other = [], [], []
    for result, seed in ((first, 3), (again, 3), (other, 4)):
        torch.manual_seed(seed)
        result += call(SMALL, drawn, seed=None)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


# -------------------------------------------------------------------------------------------------------------- determinism


def test_same_bits_whatever_the_threads():
    for dtype in DTYPES:
        drawn = inputs(IEMOCAP, dtype)
        assert_same_bits_with_threads(lambda: run_ring(IEMOCAP, drawn, "cpu"))


def test_python_threads_do_not_disturb_each_other():
    all_cases = [SMALL, WIDE, LONG, Case(**{**SMALL.__dict__, "seed": 9})] * 3
    drawn = [inputs(case, torch.float32) for case in all_cases]
    alone = [run_ring(case, d, "cpu") for case, d in zip(all_cases, drawn)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: run_ring(all_cases[i], drawn[i], "cpu"), range(len(all_cases))))
    for a, b in zip(alone, together):
        assert all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written(monkeypatch, tier, dtype):
    poisoned(monkeypatch)
    for case in (SMALL, WIDE, LONG, Case(lengths=(0, 0), widths=(5, 3), rank=3)):
        for name, value in run_ring(case, inputs(case, dtype), "cpu").items():
            assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_nothing_beside_its_inputs(tier, dtype):
    """Misaligned inputs inside buffers of NaN give the same bits."""
    for case in (SMALL, WIDE):
        drawn = inputs(case, dtype)
        inside = {name: [guarded(t)[0] for t in tensors] for name, tensors in drawn.items()}
        with_leaves = {n: [t.requires_grad_() for t in inside[n]] for n in PARAMETERS}
        out, target = call(case, with_leaves)
        grads = torch.autograd.grad(out + target, [t for n in PARAMETERS for t in with_leaves[n]],
                                    inside["grad_out"] + inside["grad_target"])
        expected = run_ring(case, drawn, "cpu")
        for (name, e), a in zip(expected.items(), [*out, *target, *grads]):
            assert torch.equal(a, e), name


def test_writes_nothing_beside_its_outputs(monkeypatch):
    """Each output lies in a larger buffer whose margins keep their pattern."""
    buffers, margin = [], 64

    def with_margins(t, shape, dtype):
        count = 1
        for n in shape:
            count *= n
        buffer = torch.full((count + 2 * margin,), 123, dtype=dtype)
        buffers.append(buffer)
        return buffer[margin:margin + count].view(shape)

    for case in (SMALL, WIDE, LONG):
        drawn = inputs(case, torch.float32)
        expected = run_ring(case, drawn, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda t, dtype=None, **_: with_margins(t, t.shape, dtype or t.dtype))
            patch.setattr(torch.Tensor, "new_empty", lambda t, shape, dtype=None: with_margins(t, shape, dtype or t.dtype))
            actual = run_ring(case, drawn, "cpu")
        assert buffers and all(torch.equal(actual[name], expected[name]) for name in expected)
        for buffer in buffers:
            assert (buffer[:margin] == 123).all() and (buffer[-margin:] == 123).all()


def test_strided_inputs():
    """Transposed, sliced and expanded inputs, parameters and output gradients."""
    case = Case(lengths=(6, 5), widths=(12, 12), rank=4, seed=6)
    drawn = inputs(case)
    drawn["x"][0] = drawn["x"][0][:1].expand(11, 12)
    drawn["x"][1] = drawn["x"][1].t().contiguous().t()
    drawn["proj_weight"][0] = drawn["proj_weight"][0].t().contiguous().t()
    drawn["map_weight"][1] = torch.stack([drawn["map_weight"][1]] * 2, dim=2)[:, :, 0]
    drawn["map_bias"][0] = drawn["map_bias"][0][:1].expand(12)
    drawn["grad_out"][0] = torch.ones((), dtype=torch.float64).expand(11, 12)
    drawn["grad_target"][1] = drawn["grad_target"][1].t().contiguous().t()

    def run(source):
        at = leaves(source)
        out, target = call(case, at)
        return torch.autograd.grad(out + target, [t for n in PARAMETERS for t in at[n]], source["grad_out"] + source["grad_target"])

    plain = {name: [t.contiguous() for t in tensors] for name, tensors in drawn.items()}
    assert all(torch.equal(a, b) for a, b in zip(run(drawn), run(plain)))


def test_time_grows_linearly():
    def seconds(rows):
        case = Case(lengths=(50,) * (rows // 50), widths=(32, 32, 32), rank=6)
        drawn = inputs(case, torch.float32)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            run_ring(case, drawn, "cpu")
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(100_000) <= 10 * seconds(20_000)   # 5 times the rows, both far beyond the second-level cache


# ------------------------------------------------------------------------------------------------------- a citizen of torch


def test_first_and_second_derivatives():
    case = Case(lengths=(2, 0, 1), widths=(2, 1, 2), rank=2, dropout=0.3, gated_target=True, seed=7)
    for case in (case, Case(**{**case.__dict__, "gated_target": False, "dropout": 0.0})):
        at = leaves(inputs(case))
        flat = [t for name in PARAMETERS for t in at[name]]

        def function(*tensors):
            m = len(case.widths)
            out, target = tensor_ring(tensors[:m], offsets(case), *(tensors[i * m:(i + 1) * m] for i in range(1, 5)),
                                      backend="cpu", **case.options)
            return (*out, *target)

        assert torch.autograd.gradcheck(function, flat)
        assert torch.autograd.gradgradcheck(function, flat)

        def gradients(**options):
            return torch.autograd.grad(sum(t.sin().sum() for t in function(*flat)), flat, **options)

        torch.testing.assert_close(gradients(create_graph=True), gradients(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_target(monkeypatch, tier, dtype):
    """The same outputs, and nothing beside them is allocated where no gradient is wanted; the same gradients where one is."""
    for case in (SMALL, LONG, WIDE):
        drawn = inputs(case, dtype)
        expected = call(case, drawn)[0]
        made = []
        with monkeypatch.context() as patch:
            empty_like = torch.empty_like
            patch.setattr(torch, "empty_like", lambda *args, **kwargs: made.append(1) or empty_like(*args, **kwargs))
            patch.setattr(torch.Tensor, "new_empty", None)
            for backend in ("cpu", "torch"):
                out, target = call(case, drawn, backend, with_target=False)
                assert target == [] and len(out) == len(case.widths)
                if backend == "cpu":
                    assert all(torch.equal(a, b) for a, b in zip(out, expected)) and len(made) == len(out)
    at = [leaves(drawn) for _ in range(2)]
    grads = [torch.autograd.grad(call(case, at[i], with_target=not i)[0], [t for n in PARAMETERS for t in at[i][n]], drawn["grad_out"])
             for i in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_only_some_gradients_wanted():
    """An unused target, an unused output, frozen parameters."""
    drawn = inputs(SMALL)
    expected = run_ring(SMALL, drawn, "torch")
    at = {name: [t.detach() for t in drawn[name]] for name in PARAMETERS}
    at["map_weight"][1].requires_grad_()
    out, target = call(SMALL, at)
    grad, = torch.autograd.grad(out + target, at["map_weight"][1], drawn["grad_out"] + drawn["grad_target"])
    torch.testing.assert_close(grad, expected["grad map_weight[1]"])
    for pick in (lambda out, target: out[1:], lambda out, target: target[:1]):
        results = []
        for backend in ("cpu", "torch"):
            at = leaves(drawn)
            picked = pick(*call(SMALL, at, backend))
            results.append(torch.autograd.grad([t.sum() for t in picked], [t for n in PARAMETERS for t in at[n]], allow_unused=True))
        for a, e in zip(*results):
            torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e)


@pytest.mark.parametrize("gated, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=str)
def test_opcheck(gated, dtype):
    case = Case(**{**SMALL.__dict__, "gated_target": gated})
    drawn = inputs(case, dtype)
    flat = [l for others in case.rings for l in others]
    common = (drawn["x"], offsets(case), *(drawn[n] for n in PARAMETERS[1:]))
    settings_ = (flat, case.scale, case.beta, case.dropout, case.options["seed"], gated)
    for with_target in (True, False):
        torch.library.opcheck(torch.ops.ada2i_fast.tensor_ring_forward.default, (*common, *settings_, with_target, "cpu"))
    saved = torch.ops.ada2i_fast.tensor_ring_forward(*common, *settings_, True, "cpu")[-3 * len(case.widths):]
    for target in (drawn["grad_target"], []):
        torch.library.opcheck(torch.ops.ada2i_fast.tensor_ring_backward.default, (drawn["grad_out"], target, *common, saved, *settings_, "cpu"))


def test_compiles_whole_and_once():
    torch._dynamo.reset()

    def layer(x, offsets, seed, *parameters):
        m = len(x)
        out, target = tensor_ring(x, offsets, *(parameters[i * m:(i + 1) * m] for i in range(4)), ring=SMALL.rings, dropout=0.3,
                                  scale=0.4, beta=0.3, seed=seed, backend="cpu")
        return sum(t.square().sum() for t in out) + sum(t.sum() for t in target)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((5, 3), (9, 2, 4), (3,) * 7):
            case = Case(**{**SMALL.__dict__, "lengths": lengths})
            results = []
            for f in (layer, compiled):
                at = leaves(inputs(case, torch.float32))
                loss = f(at["x"], offsets(case), case.options["seed"], *(t for n in PARAMETERS[1:] for t in at[n]))
                results.append([loss, *torch.autograd.grad(loss, [t for n in PARAMETERS for t in at[n]])])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


def test_autocast_leaves_the_dtype_of_x():
    drawn = inputs(SMALL, torch.float32)
    expected = call(SMALL, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("cpu", "torch"):
            for a, e in zip(sum(call(SMALL, drawn, backend), []), sum(expected, [])):
                assert a.dtype == torch.float32
                torch.testing.assert_close(a, e)
    mixed = {n: [t.bfloat16() for t in drawn[n]] if n == "x" else drawn[n] for n in drawn}
    at = leaves(mixed)
    out, _ = call(SMALL, at)
    assert out[0].dtype == torch.bfloat16
    grads = torch.autograd.grad([t.float().sum() for t in out], [t for n in PARAMETERS for t in at[n]])
    assert all(g.dtype == t.dtype for g, t in zip(grads, [t for n in PARAMETERS for t in at[n]]))


def test_refusals():
    drawn = inputs(SMALL, torch.float32)
    with pytest.raises(ValueError, match="dropout"):
        call(SMALL, drawn, dropout=1.0)
    with pytest.raises(ValueError, match="x: expected one dtype"):
        call(SMALL, {**drawn, "x": [drawn["x"][0].double(), *drawn["x"][1:]]})
    big = Case(lengths=(2,), widths=(3,), rank=33)
    with pytest.raises(RuntimeError, match="rank 33"):
        call(big, inputs(big))
    assert torch.isfinite(call(big, inputs(big), "auto")[0][0]).all()
