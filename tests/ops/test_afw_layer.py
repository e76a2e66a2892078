"""afw_layer, tensor_ring and attention_mapping as one node: against float64, the two ops, and what an op of torch has to obey.

On the CPU's library; the CUDA kernels on the shim; Triton's in its interpreter, which has processes of its own: as a script this is
one of them. tests/ops/test_cuda.py has both on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"                        # read when triton is imported

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, example, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("cuda_shim", "kernels")]

import cuda_cases  # noqa: E402
import shim_build  # noqa: E402

from ada2i_fast import backends, cpu  # noqa: E402
from ada2i_fast import node  # noqa: E402
from ada2i_fast.ops import afw_layer, attention_mapping, tensor_ring  # noqa: E402
from ada2i_fast.reference import attention_mapping as textbook_mapping, tensor_ring as textbook_ring  # noqa: E402
from ada2i_fast.reference.attention_mapping import AttentionMapping  # noqa: E402
from ada2i_fast.reference.tensor_ring import TensorRing  # noqa: E402
from afw_cases import (PARAMETERS, Case, assert_close, assert_same_bits_with_threads, by_way_of, cases, guarded, inputs,  # noqa: E402
                       leaves, named, offsets, poisoned)
from runs import LAYER, claim, results as results_of  # noqa: E402

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
profile = settings.get_profile("ops")
TIERS = cpu.tiers() if cpu.why_not() is None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = (*PARAMETERS, "phi", "phi_bias")

SMALL = Case(lengths=(5, 0, 14), widths=(18, 33, 7), rank=5, dropout=0.3, seed=1)
IEMOCAP = Case(lengths=(51, 46, 59, 50, 39), widths=(300, 300, 300), rank=11, dropout=0.5, seed=2)
LONG = Case(lengths=(700, 421), widths=(20, 35), rank=6, gated_target=True, reduction="mean", seed=3)


NODE = "afw_layer"
needs_node = pytest.mark.skipif(node.why_not() is not None, reason=str(node.why_not()))


def with_options(case: Case, **changes) -> Case:
    return Case(**{**case.__dict__, **changes})


def options(case: Case, device: torch.device) -> dict:
    return {**case.options, "seed": case.options["seed"].to(device) if case.dropout else None}


def call(case: Case, at, backend="cpu", **changes):
    """at: tensors by name, the projections stacked as tensor_ring has them."""
    weights, biases = ([part for t in at[name] for part in t.chunk(4)] for name in ("proj_weight", "proj_bias"))
    device = at["x"][0].device
    return afw_layer(at["x"], offsets(case).to(device), weights, biases, at["map_weight"], at["map_bias"], at["phi"], at["phi_bias"],
                     reduction=case.reduction, backend=backend, **{**options(case, device), **changes})


def two_ops(case: Case, at, backend="cpu", rows=None):
    device = at["x"][0].device
    out, target = tensor_ring(at["x"], offsets(case).to(device), *(at[n] for n in PARAMETERS[1:]), backend=backend, **options(case, device))
    return out, attention_mapping(at["x"], target, at["phi"], at["phi_bias"], reduction=case.reduction, rows=rows, backend=backend)


def run(case: Case, given, backend="cpu", dtype=None, call=call) -> dict[str, torch.Tensor]:
    """Outputs, loss and all gradients; the loss counts so much that its gradients are of the size of the others."""
    at = leaves(given, NAMES, dtype)
    out, loss = call(case, at, backend)
    weight = float(sum(t.numel() for t in out))
    found = torch.autograd.grad([*out, loss], [t for n in NAMES for t in at[n]],
                                [*(g.to(out[0].dtype) for g in given["grad_out"]), torch.full_like(loss, weight)])
    names = [f"grad {n}[{j}]" for n in NAMES for j in range(len(out))]
    return named("out", out) | {"loss": loss} | dict(zip(names, found))


def decided(case: Case, dtype: torch.dtype):
    """Inputs whose differences lie far from 0: near it the sign, and with it a gradient, is a matter of rounding."""
    drawn = inputs(case, dtype)
    drawn["phi_bias"] = [t + 60.0 * (-1.0) ** torch.arange(t.numel()).to(t) for t in drawn["phi_bias"]]
    return drawn


def check(case: Case, dtype: torch.dtype) -> None:
    drawn = decided(case, dtype)
    assert_close(run(case, drawn), run(case, drawn, "torch"), run(case, drawn, "torch", torch.float64), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(profile, max_examples=20)
@given(case=cases())
@example(case=Case(lengths=(), widths=(3, 4), rank=2))
@example(case=Case(lengths=(0,), widths=(3,), rank=2, dropout=0.5))
@example(case=Case(lengths=(1,), widths=(1,), rank=1))
@example(case=Case(lengths=(), widths=(3,), rank=17))           # gradients of more columns than go out at once
def test_error_against_float64(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("case", [SMALL, IEMOCAP, LONG], ids=["small", "iemocap", "long"])
@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tier(case, tier, dtype):
    check(case, dtype)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", [SMALL, IEMOCAP, LONG], ids=["small", "iemocap", "long"])
@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_two_ops(case, gated, tier, dtype):
    """Differences of either sign everywhere: what the two ops compute in the same order is the same to the last bit."""
    case = with_options(case, gated_target=gated)
    drawn = inputs(case, dtype)
    one, two = run(case, drawn), run(case, drawn, call=two_ops)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-13)
    for name, expected in two.items():
        if name.startswith(("out", "loss", "grad phi")):
            assert torch.equal(one[name], expected), name
        else:
            torch.testing.assert_close(one[name], expected, **tolerance, msg=name)


def test_same_bits_whatever_the_threads():
    for dtype in DTYPES:
        drawn = inputs(IEMOCAP, dtype)
        assert_same_bits_with_threads(lambda: run(IEMOCAP, drawn))


@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stays_within_its_arrays(monkeypatch, tier, dtype, route):
    """Misaligned inputs inside buffers of NaN, outputs and state (which Python can reach only where it makes them) poisoned: the same bits."""
    for case in (SMALL, LONG, with_options(SMALL, gated_target=True), Case(lengths=(0, 0), widths=(5, 3), rank=3)):
        drawn = inputs(case, dtype)
        expected = run(case, drawn)
        inside = {name: [guarded(t)[0] for t in drawn[name]] for name in (*NAMES, "grad_out")}
        with monkeypatch.context() as patch:
            poisoned(patch)
            actual = run(case, inside)
        for name, e in expected.items():
            assert torch.equal(actual[name], e), name


def test_strided_inputs():
    case = Case(lengths=(6, 5), widths=(12, 12), rank=4, seed=6)
    drawn = inputs(case)
    drawn["x"][0] = drawn["x"][0][:1].expand(11, 12)
    drawn["x"][1] = drawn["x"][1].t().contiguous().t()
    drawn["proj_weight"][0] = drawn["proj_weight"][0].t().contiguous().t()
    drawn["map_weight"][1] = torch.stack([drawn["map_weight"][1]] * 2, dim=2)[:, :, 0]
    drawn["phi"][1] = drawn["phi"][1].t()
    drawn["grad_out"][0] = torch.ones((), dtype=torch.float64).expand(11, 12)
    plain = {name: [t.contiguous() for t in tensors] for name, tensors in drawn.items()}
    a, b = run(case, drawn), run(case, plain)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_without_gradients(monkeypatch, route):
    """The same bits; without the loss nothing but the outputs is allocated."""
    for case in (SMALL, LONG):
        drawn = inputs(case, torch.float32)
        out, loss = call(case, leaves(drawn, NAMES))
        alone, same = call(case, drawn)
        assert torch.equal(loss, same) and not same.requires_grad
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", None)
            without, none = call(case, drawn, with_loss=False)
        assert none is None and len(out) == len(alone) == len(without) == len(case.widths)
        for a, b, c in zip(out, alone, without):
            assert torch.equal(a, b) and torch.equal(a, c)
        graph, none = call(case, leaves(drawn, NAMES), with_loss=False)
        assert none is None and all(a.requires_grad for a in graph)


def test_only_some_gradients_wanted(route):
    """The loss alone, one output alone, frozen parameters."""
    drawn = inputs(SMALL)
    for pick in (lambda out, loss: [loss], lambda out, loss: out[1:2]):
        results = []
        for backend in ("cpu", "torch"):
            at = leaves(drawn, NAMES)
            picked = pick(*call(SMALL, at, backend))
            results.append(torch.autograd.grad([t.sum() for t in picked], [t for n in NAMES for t in at[n]], allow_unused=True))
        for a, e in zip(*results):
            torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros_like(a) if e is None and a is not None else
                                       torch.zeros(()) if e is None else e)
    at = {n: [t.detach() for t in drawn[n]] for n in NAMES}
    at["phi"][1].requires_grad_()
    out, loss = call(SMALL, at)
    grad, = torch.autograd.grad(loss, at["phi"][1])
    torch.testing.assert_close(1.0 * sum(SMALL.lengths) * sum(SMALL.widths) * grad, run(SMALL, drawn, "torch")["grad phi[1]"])


@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [SMALL, LONG], ids=["small", "long"])
def test_parameters_in_float32(case, tier, dtype):
    """As a module under autocast has them: gradients come in float32, closer to those of float64 than plain torch's."""
    drawn = decided(case, dtype)
    mixed = {n: [t if n in ("x", "grad_out") else t.float() for t in ts] for n, ts in drawn.items()}
    exact = run(case, drawn, "torch", torch.float64)
    found = run(case, mixed)
    assert all(found[f"grad {n}[0]"].dtype == (dtype if n == "x" else torch.float32) for n in NAMES) and found["out[0]"].dtype == dtype
    assert_close(found, run(case, drawn, "torch"), exact, dtype)
    with torch.no_grad():
        out, loss = call(case, mixed)
        assert all(torch.equal(out[j], found[f"out[{j}]"]) for j in range(len(out))) and torch.equal(loss, found["loss"])


@pytest.mark.parametrize("x_dtype, dtype", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float64)], ids=str)
def test_parameters_in_another_dtype(x_dtype, dtype):
    """They are cast to that of x, and their gradients back."""
    mixed = {n: [t.to(x_dtype if n == "x" else dtype) for t in ts] for n, ts in inputs(SMALL, torch.float32).items()}
    results = []
    for at in (leaves(mixed, NAMES), leaves({n: [t.to(x_dtype) for t in ts] for n, ts in mixed.items()}, NAMES)):
        flat = [t for n in NAMES for t in at[n]]
        out, loss = call(SMALL, at)
        assert out[0].dtype == x_dtype
        found = torch.autograd.grad([*(t.float().sum() for t in out), loss], flat)
        assert all(g.dtype == t.dtype for g, t in zip(found, flat))
        results.append(found)
    for a, b in zip(*results):
        coarser = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        assert torch.equal(a.to(coarser), b.to(coarser))


def test_first_and_second_derivatives(route):
    case = Case(lengths=(2, 0, 1), widths=(2, 1, 2), rank=2, dropout=0.3, gated_target=True, seed=7)
    for case in (case, with_options(case, gated_target=False, dropout=0.0)):
        at = leaves(decided(case, torch.float64), NAMES)
        flat, m = [t for name in NAMES for t in at[name]], len(case.widths)

        def function(*tensors):
            out, loss = call(case, {name: tensors[i * m:(i + 1) * m] for i, name in enumerate(NAMES)})
            return (*out, loss)

        assert torch.autograd.gradcheck(function, flat)
        assert torch.autograd.gradgradcheck(function, flat)

        def gradients(**options):
            return torch.autograd.grad(sum(t.sin().sum() for t in function(*flat)), flat, **options)

        torch.testing.assert_close(gradients(create_graph=True), gradients(), rtol=1e-10, atol=1e-12)


def test_compiles_whole_and_once():
    """Compiled code takes the two ops, with the same result."""
    torch._dynamo.reset()

    def layer(case, at):
        out, loss = call(case, at)
        return sum(t.square().sum() for t in out) + loss

    def compiled_layer(x, offsets, seed, parameters):
        weights, biases = ([part for t in parameters[name] for part in t.chunk(4)] for name in ("proj_weight", "proj_bias"))
        out, loss = afw_layer(x, offsets, weights, biases, *(parameters[n] for n in NAMES[3:]), seed=seed, backend="cpu",
                              **{k: v for k, v in SMALL.options.items() if k != "seed"})
        return sum(t.square().sum() for t in out) + loss

    compiled = torch.compile(compiled_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((5, 3), (9, 2, 4), (3,) * 7):
            case = with_options(SMALL, lengths=lengths)
            results = []
            for f in (lambda at: layer(case, at), lambda at: compiled_layer_of(compiled, case, at)):
                at = leaves(inputs(case, torch.float32), NAMES)
                loss = f(at)
                results.append([loss, *torch.autograd.grad(loss, [t for n in NAMES for t in at[n]])])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


def compiled_layer_of(compiled, case, at):
    return compiled(at["x"], offsets(case), case.options["seed"], {n: at[n] for n in NAMES[1:]})


def test_saves_a_quarter_of_what_the_textbook_saves(route):
    """Inputs and parameters, which are there anyway, do not count."""
    case, drawn = IEMOCAP, inputs(IEMOCAP, torch.float32)
    steps, ring, phi = max(case.lengths), TensorRing(case.widths, case.rank), AttentionMapping(case.widths)
    padded = [torch.randn(len(case.lengths), steps, d, requires_grad=True) for d in case.widths]
    mask = torch.arange(steps)[None] < torch.tensor(case.lengths)[:, None]
    at = leaves(drawn, NAMES)

    def textbook_layer():
        attention, gated = textbook_ring(ring, padded, ring=case.rings, scale=case.scale, beta=case.beta, mask=mask)
        return [torch.nn.functional.dropout(t, 0.5) for t in gated], textbook_mapping(phi, padded, attention, reduction="sum", mask=mask)

    def saved_bytes(compute, given):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t     # holding t keeps its address from being used again
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results = compute()
        assert results[1].requires_grad
        for t in given:
            kept.pop(t.untyped_storage().data_ptr(), None)
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    theirs = saved_bytes(textbook_layer, [*padded, *ring.parameters(), *phi.parameters()])
    for ours_layer in (call, two_ops):
        ours = saved_bytes(lambda: ours_layer(case, at), [t for tensors in at.values() for t in tensors])
        assert ours <= theirs / 4, f"{ours / theirs:.3f} of the textbook's {theirs} bytes"


# --------------------------------------------------------------------------------------------------- in one call, by node


def by_python(monkeypatch, compute):
    with monkeypatch.context() as patch:
        patch.setattr(node, "afw_layer", lambda *_: None)
        return compute()


@needs_node
@pytest.mark.parametrize("dtype, parameters", [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
                         ids=str)
@settings(profile, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
@example(case=Case(lengths=(), widths=(3, 4), rank=2))
@example(case=Case(lengths=(0,), widths=(3,), rank=2, dropout=0.5))
@example(case=Case(lengths=(2, 1), widths=(3, 5, 2, 4), rank=32, dropout=0.5, reduction="mean"))
def test_node_is_what_python_does(monkeypatch, dtype, parameters, case):
    """To the last bit, with the loss, without it, and without its gradient."""
    drawn = inputs(case, dtype)
    drawn |= {name: [t.to(parameters) for t in drawn[name]] for name in NAMES[1:]}

    def results():
        found = run(case, drawn)
        found |= named("alone", call(case, drawn, with_loss=False)[0])
        at = leaves(drawn, NAMES)
        out, _ = call(case, at)
        gradients = torch.autograd.grad(out, [t for n in NAMES for t in at[n]], [g.to(dtype) for g in drawn["grad_out"]], allow_unused=True)
        return found | {f"without the loss's: {i}": g for i, g in enumerate(gradients) if g is not None}

    ours, theirs = results(), by_python(monkeypatch, results)
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected) and ours[name].dtype == expected.dtype and ours[name].is_contiguous(), name


@needs_node
def test_node_draws_the_same_mask(monkeypatch):
    drawn = inputs(SMALL, torch.float32)

    def drawn_anew():
        torch.manual_seed(5)
        return call(SMALL, drawn, seed=None)[0]

    assert all(map(torch.equal, drawn_anew(), by_python(monkeypatch, drawn_anew)))
    assert not torch.equal(call(SMALL, drawn, seed=None)[0][0], call(SMALL, drawn, seed=None)[0][0])


def one_call(case: Case, at, **changes):
    """What `node` says to the arguments that ops.afw_layer has."""
    weights, biases = ([part for t in at[name] for part in t.chunk(4)] for name in ("proj_weight", "proj_bias"))
    given = dict(x=at["x"], offsets=offsets(case), kinds=(weights, biases, at["map_weight"], at["map_bias"], at["phi"], at["phi_bias"]),
                 ring=case.rings, scale=case.scale, beta=case.beta, dropout=case.dropout, seed=options(case, torch.device("cpu"))["seed"],
                 gated_target=case.gated_target, reduction=case.reduction, with_loss=True) | changes
    return node.afw_layer(*given.values())


@needs_node
def test_node_declines_what_is_not_plain(monkeypatch):
    """Then Python serves it, or says what is wrong."""
    drawn = inputs(SMALL, torch.float32)
    x, plain = drawn["x"], torch.zeros(19, 18)
    assert one_call(SMALL, drawn) is not None

    class Own(torch.Tensor):
        pass

    class Through(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **kwargs or {})

    with torch.inference_mode():
        inference = torch.zeros(19, 18)
    odd = {"transposed": torch.zeros(18, 19).t(), "another shape": torch.zeros(18, 18), "a vector": torch.zeros(19), "a subclass": plain.as_subclass(Own),
           "meta": plain.to("meta"), "sparse": plain.to_sparse(), "negative": torch._neg_view(plain), "inference": inference,
           "another dtype": plain.double(), "whole numbers": plain.long(), "no tensor": "x"}
    for name, t in odd.items():
        assert one_call(SMALL, {**drawn, "x": [t, *x[1:]]}) is None, name
        assert one_call(SMALL, drawn, offsets=t) is None, name
        assert one_call(SMALL, drawn, seed=t) is None, name
    for name in NAMES[1:]:
        for wrong in (torch.zeros(2, 2), torch.zeros_like(drawn[name][0], dtype=torch.float64), drawn[name][0].to("meta")):
            assert one_call(SMALL, {**drawn, name: [wrong.repeat(4, *[1] * (wrong.dim() - 1)) if "proj" in name else wrong, *drawn[name][1:]]}) is None, name
        assert one_call(SMALL, {**drawn, name: drawn[name][:2]}) is None, name
    start = offsets(SMALL)
    for wrong in (start + 1, start - 1, start.flip(0), start[:-1], start[:0], start.int(), start[None], torch.tensor([0, 9, 5, 19])):
        assert one_call(SMALL, drawn, offsets=wrong) is None, wrong
    for wrong in (dict(ring=[[1, 2], [2, 0]]), dict(ring=[[1, 2], [2, 0], [0]]), dict(ring=[[1, 2], [2, 3], [0, 1]]), dict(ring=[[1, 2], [2, -1], [0, 1]]),
                  dict(ring=None), dict(ring=[[1, 2], [2, 2 ** 70], [0, 1]]), dict(scale="1"), dict(beta=None), dict(dropout=1.0), dict(dropout=-0.1), dict(dropout=float("nan")),
                  dict(reduction="median"), dict(reduction=None), dict(reduction="\ud800"), dict(gated_target=torch.ones(2)), dict(seed=torch.zeros(2, dtype=torch.int64)), dict(x=[]), dict(x=None), dict(kinds=())):
        assert one_call(SMALL, drawn, **wrong) is None, wrong
    big = Case(lengths=(2,), widths=(3,), rank=33)
    assert one_call(big, inputs(big)) is None
    many = Case(lengths=(2,), widths=(3,) * 9, rank=2)
    assert one_call(many, inputs(many)) is None

    graph = leaves(drawn, NAMES)
    assert one_call(SMALL, graph, with_loss=False) is None
    with Through():
        assert one_call(SMALL, drawn) is None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        assert one_call(SMALL, {**drawn, "x": [dual, *x[1:]]}) is None
    found = []
    torch.func.grad(lambda t: found.append(one_call(SMALL, {**drawn, "x": [t, *x[1:]]})) or found.append(one_call(SMALL, drawn)) or t.sum())(x[0])
    assert found == [None, None]
    for forced, served in (("torch", False), ("cpu", True), ("auto", True), ("", True)):
        monkeypatch.setenv("ADA2I_FAST_BACKEND", forced)
        assert (one_call(SMALL, drawn) is not None) == served, forced
    assert one_call(SMALL, {**drawn, "x": [torch.nn.Parameter(x[0]), *x[1:]]}) is not None


@needs_node
def test_node_keeps_to_the_rules_of_autograd():
    drawn = inputs(SMALL, torch.float32)
    at = leaves(drawn, NAMES)
    out, loss = call(SMALL, at)
    assert loss.grad_fn.name() == "AFWLayerBackward" and all(t.grad_fn is loss.grad_fn for t in out)
    (sum(t.sum() for t in out) + loss).backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    kept = [at["x"][1].grad.clone(), at["phi"][0].grad.clone()]
    at["phi_bias"][2].grad.zero_()                              # shares memory with the others, and nothing else
    assert torch.equal(at["phi"][0].grad, kept[1])
    out, loss = call(SMALL, at)
    (sum(t.sum() for t in out) + loss).backward()               # accumulates
    torch.testing.assert_close(at["x"][1].grad, 2 * kept[0])
    out, loss = call(SMALL, at)
    with torch.no_grad():
        at["map_weight"][0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    same = [at["x"][0], drawn["x"][1], drawn["x"][2]]           # of one modality alone a gradient is wanted
    out, loss = call(SMALL, {**drawn, "x": same})
    found, = torch.autograd.grad(loss, [same[0]])
    everything = torch.autograd.grad(call(SMALL, {**at, "x": [same[0], *at["x"][1:]], "map_weight": drawn["map_weight"]})[1], [same[0]])[0]
    assert torch.equal(found, everything)


@needs_node
def test_node_in_several_threads():
    drawn = inputs(IEMOCAP, torch.float32)
    expected = run(IEMOCAP, drawn)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run(IEMOCAP, drawn), range(8)):
            assert all(torch.equal(found[name], t) for name, t in expected.items())


@needs_node
def test_node_shows_in_a_profile_and_to_hooks():
    at = leaves(inputs(SMALL, torch.float32), NAMES)
    seen = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace, \
            torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
        call(SMALL, at)[1].backward()
    names = {event.key for event in trace.key_averages()}
    assert {"ada2i_tensor_ring_forward", "ada2i_tensor_ring_backward"} <= names
    assert len(seen) == 13 * 3 + 3 and at["x"][0].grad is not None

    def gradients(function):
        return torch.autograd.grad(function(*at["x"]), [t for n in NAMES[:5] for t in at[n]])

    def loss(*x):
        out, loss = call(SMALL, {**at, "x": x})
        return sum(t.sum() for t in out) + loss

    again = gradients(lambda *x: torch.utils.checkpoint.checkpoint(loss, *x, use_reentrant=False))
    assert all(map(torch.equal, gradients(loss), again))

    def refuses(t):
        raise KeyError("a hook's own error")

    with pytest.raises(KeyError, match="a hook's own error"), torch.autograd.graph.saved_tensors_hooks(refuses, lambda t: t):
        call(SMALL, at)
    with pytest.raises(KeyError, match="a hook's own error"):
        out, _ = call(SMALL, at)
        with torch.autograd.graph.saved_tensors_hooks(refuses, lambda t: t):
            torch.autograd.grad(out[0].sum(), at["x"], create_graph=True)


@needs_node
def test_node_begun_in_inference_mode():
    drawn, outside = inputs(SMALL, torch.float32), dict(offsets=offsets(SMALL), seed=SMALL.options["seed"])
    node._load.cache_clear()
    with torch.inference_mode():
        alone = one_call(SMALL, drawn, **outside)
        assert alone[0][0].is_inference()
    out, loss = one_call(SMALL, leaves(drawn, NAMES))
    assert loss.grad_fn is not None and torch.equal(out[0], alone[0][0])


@needs_node
def test_a_node_of_another_version_rests(monkeypatch):
    built = node.ABI_VERSION
    monkeypatch.setattr(node, "ABI_VERSION", 2 ** 20)
    node._load.cache_clear()
    try:
        assert f"it speaks version {built} of the interface, this package 1048576: build it again" in node.why_not()
        assert call(SMALL, leaves(inputs(SMALL), NAMES))[1].grad_fn.name() != "AFWLayerBackward"
    finally:
        monkeypatch.undo()
        node._load.cache_clear()


def test_why_there_is_no_node(monkeypatch, tmp_path):
    facts = {"torch": torch.__version__, "python": "%d.%d" % sys.version_info[:2]}
    library = tmp_path / node.PATH.name
    monkeypatch.setattr(node, "PATH", library)
    monkeypatch.setattr(backends, "build_facts", lambda name: facts)

    def reason():
        node._load.cache_clear()
        return node.why_not()

    try:
        assert reason() == "not built: install the package (pip install -e .)"
        facts["reason"] = "torch was not there"
        assert reason() == "not built: torch was not there"
        assert node.afw_layer() is None and node.cuda_afw_layer() is None
        library.write_bytes(b"no library")
        assert "does not load" in reason()
        facts["torch"] = "1.0"
        assert reason() == f"built for torch 1.0, not {torch.__version__}: install the package again (pip install -e .)"
        monkeypatch.setattr(cpu, "why_not", lambda: "no library for the CPU")
        assert reason() == "no library for the CPU"
    finally:
        monkeypatch.undo()
        node._load.cache_clear()


def test_refusals():
    drawn = inputs(SMALL, torch.float32)
    with pytest.raises(ValueError, match="dropout: expected a probability below 1, got 1.0"):
        call(SMALL, drawn, dropout=1.0)
    with pytest.raises(ValueError, match="x: expected one dtype"):
        call(SMALL, {**drawn, "x": [*drawn["x"][:2], drawn["x"][2].double()]})
    with pytest.raises(ValueError, match="reduction: expected 'sum' or 'mean', got 'median'"):
        call(with_options(SMALL, reduction="median"), drawn)
    big = Case(lengths=(2,), widths=(3,), rank=33)
    with pytest.raises(RuntimeError, match="rank 33"):
        call(big, inputs(big))
    assert torch.isfinite(call(big, inputs(big), "auto")[1])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_refused_shapes(backend):
    """Of the layer and of the two ops: the libraries would read and write beyond their tensors."""
    drawn = inputs(SMALL, torch.float32)
    for name, place, wrong, layer, op in (
            ("x", 1, (18, 33), r"x\[1\]: expected \[19, 33\] on cpu, got \[18, 33\] on cpu", r"x\[1\]: expected \[19, 33\]"),
            ("x", 0, (19,), r"x\[0\]: expected \[19, 19\]", r"x\[0\]: expected \[19, 19\]"),
            ("proj_weight", 2, (20, 6), r"proj_weight\[8\]: expected \[5, 7\]", r"proj_weight\[2\]: expected \[20, 7\]"),
            ("proj_bias", 1, (24,), r"proj_bias\[4\]: expected \[5\]", r"proj_bias\[1\]: expected \[20\]"),
            ("map_weight", 0, (18, 24), r"map_weight\[0\]: expected \[18, 25\]", r"map_weight\[0\]: expected \[18, 25\]"),
            ("map_bias", 2, (1,), r"map_bias\[2\]: expected \[7\]", r"map_bias\[2\]: expected \[7\]"),
            ("phi", 2, (7, 8), r"phi_weight\[2\]: expected \[7, 7\]", r"weight\[2\]: expected \[7, 7\]"),
            ("phi_bias", 0, (17,), r"phi_bias\[0\]: expected \[18\]", r"bias\[0\]: expected \[18\]")):
        given = {**drawn, name: [torch.zeros(wrong) if j == place else t for j, t in enumerate(drawn[name])]}
        for run, words in ((call, layer), (two_ops, op)):
            with pytest.raises(ValueError, match=words):
                run(SMALL, given, backend)
    with pytest.raises(ValueError, match="phi_bias: expected 3 tensors, got 2"):
        call(SMALL, {**drawn, "phi_bias": drawn["phi_bias"][:2]}, backend)
    with pytest.raises(ValueError, match="target: expected 3 tensors, got 2"):
        attention_mapping(drawn["x"], drawn["x"][:2], drawn["phi"], drawn["phi_bias"], backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("wrong", [torch.tensor([0, 5, 5, 18]), torch.tensor([0, 5, 5, 20]), torch.tensor([1, 5, 19]), torch.tensor([0, 7, 5, 19]),
                                   torch.tensor([], dtype=torch.int64), torch.tensor([0, 5, 5, 19], dtype=torch.int32),
                                   torch.tensor([[0, 19]]), torch.arange(19)], ids=lambda t: str(t.tolist()[:5]))
def test_refused_offsets(wrong, backend, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "offsets", lambda case: wrong)
    drawn = inputs(SMALL, torch.float32)
    for run in (call, two_ops):
        with pytest.raises(ValueError, match="offsets: expected "):
            run(SMALL, drawn, backend)


# ---- the layers of other devices


DEVICE_CASES = [SMALL, with_options(SMALL, gated_target=True, reduction="mean"),
                Case(lengths=(3, 0, 33), widths=(8,), rank=3, dropout=0.5, seed=4),
                Case(lengths=(9, 2), widths=(4, 12, 8, 4), rank=4, gated_target=True, seed=5), Case(lengths=(0, 0), widths=(5, 3), rank=3)]


def float32_parameters(drawn):
    return {n: [t if n in ("x", "grad_out") else t.float() for t in ts] for n, ts in drawn.items()}


def assert_is_the_two_ops(case: Case, drawn, backend: str, **tolerance) -> None:
    """To the last bit, for the kernels and their order are the same; with a tolerance, within that. Triton's layer adds the loss's gradient
    of x before the projections' share instead of after it: the last bits of the largest."""
    def check(name: str, found: torch.Tensor, expected: torch.Tensor, **otherwise) -> None:
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        allowed = dict(tolerance or otherwise or dict(rtol=0, atol=0))
        if backend == "triton" and name.startswith("grad x") and expected.numel():
            allowed["atol"] += 4 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, msg=name, **allowed)

    one, two = run(case, drawn, backend), run(case, drawn, backend, call=two_ops)
    for name, expected in two.items():
        check(name, one[name], expected)
    with torch.no_grad():
        (out, loss), (without, none) = call(case, drawn, backend), call(case, drawn, backend, with_loss=False)
    assert none is None
    check("loss, no gradients", loss, one["loss"])
    for j in range(len(out)):
        check(f"out[{j}], no gradients", out[j], one[f"out[{j}]"])
        check(f"out[{j}], no loss", without[j], one[f"out[{j}]"])

    if count := sum(case.lengths):
        filled = {**drawn, **{n: [torch.cat([t[:-2], torch.zeros_like(t[-2:])]) for t in drawn[n]] for n in ("x", "grad_out")}}
        rows = torch.tensor(count - 2, device=filled["x"][0].device)
        one, two = (run(case, filled, backend, call=lambda *given: layer(*given, rows=rows)) for layer in (call, two_ops))
        for name, expected in two.items():
            # What x is in filler rows plays no part in the loss, and what its gradient is there is nobody's; N / rows may join c early.
            found, expected = (t[:-2] if name.startswith("grad x") else t for t in (one[name], expected))
            check(f"{name}, filler left out", found, expected, rtol=4 * torch.finfo(expected.dtype).eps, atol=1e-6 * float(expected.abs().max()))


@pytest.fixture(params=["python", pytest.param("node", marks=needs_node)])
def cuda_kernels(request, monkeypatch):
    """backend="cuda" on CPU tensors, the threads of a block in any order; by way of Python, and in one call."""
    if shim_build.compiler() is None:
        pytest.skip("no C++ compiler")
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda op, x, backend="auto", rank=1: backend if backend == "cuda" else
                        choose(op, x, backend, rank))
    with cuda_cases.shim(shim_build.compile_library()) as order, by_way_of(request.param, "cuda_afw_layer", monkeypatch):
        order("shuffled", seed=3)
        yield


@pytest.mark.parametrize("case", DEVICE_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_layer_is_the_two_ops(cuda_kernels, case, dtype):
    drawn = inputs(case, dtype)
    with cuda_cases.kernels("float32"):                         # fresh memory holds NaN
        assert_is_the_two_ops(case, drawn, "cuda")
        if dtype != torch.float32:
            assert_is_the_two_ops(case, float32_parameters(drawn), "cuda")


def test_cuda_layer_against_float64(cuda_kernels):
    for dtype in (torch.float32, torch.bfloat16):
        drawn = decided(SMALL, dtype)
        assert_close(run(SMALL, drawn, "cuda"), run(SMALL, drawn, "torch"), run(SMALL, drawn, "torch", torch.float64), dtype)


def test_cuda_layer_stays_within_its_arrays(cuda_kernels):
    """Misaligned inputs, and strided ones, inside buffers of NaN: the same bits."""
    for case in DEVICE_CASES[:4]:
        drawn = inputs(case, torch.float32)
        expected = run(case, drawn, "cuda")
        strided = {n: [t.t().contiguous().t() if t.dim() == 2 else t for t in drawn[n]] for n in (*NAMES, "grad_out")}
        inside = {n: [guarded(t)[0] for t in drawn[n]] for n in (*NAMES, "grad_out")}
        for changed in (strided, inside):
            for name, value in run(case, changed, "cuda").items():
                assert torch.equal(value, expected[name]), name


def test_cuda_layer_gradients(cuda_kernels):
    """The loss alone, an output alone, and those of gradients."""
    drawn = decided(SMALL, torch.float32)
    for pick in (lambda out, loss: [loss], lambda out, loss: out[1:2]):
        results = []
        for backend, layer in (("cuda", call), ("cuda", two_ops)):
            at = leaves(drawn, NAMES)
            results.append(torch.autograd.grad([t.sum() for t in pick(*layer(SMALL, at, backend))], [t for n in NAMES for t in at[n]],
                                               allow_unused=True))
        for a, e in zip(*results):
            assert (a is None or not a.any()) if e is None else torch.equal(a, e)
    results = []
    for backend, dtype in (("cuda", torch.float32), ("torch", torch.float64)):
        at = leaves(drawn, NAMES, dtype)
        flat = [t for n in NAMES for t in at[n]]
        out, loss = call(SMALL, at, backend)
        _, of_rows = call(SMALL, at, backend, rows=torch.tensor(17))
        first = torch.autograd.grad(sum(t.sin().sum() for t in out) + loss + of_rows, flat, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), flat))
    for a, e in zip(*results):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


def test_cuda_layer_refusals(cuda_kernels):
    drawn = inputs(SMALL, torch.float32)
    for name, place, wrong, words in (("map_bias", 1, torch.zeros(34), r"map_bias\[1\]: expected \[33\].*got \[34\]"),
                                      ("phi", 2, torch.zeros(7, 8), r"phi_weight\[2\]: expected \[7, 7\]"),
                                      ("proj_weight", 0, torch.zeros(20, 17), r"proj_weight\[0\]: expected \[5, 18\]"),
                                      ("x", 1, torch.zeros(18, 33), r"x\[1\]: expected \[19, 33\]")):
        with pytest.raises(ValueError, match=words):
            call(SMALL, {**drawn, name: [wrong if j == place else t for j, t in enumerate(drawn[name])]}, "cuda")
    for seed in (torch.tensor([1], dtype=torch.int32), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="seed: "):
            call(SMALL, drawn, "cuda", seed=seed)
    with pytest.raises(ValueError, match="ring: expected 6 modalities, got 2"):
        call(SMALL, drawn, "cuda", ring=[[1], [0]])
    call(SMALL, drawn, "cuda")


def test_triton_layer_is_the_two_ops(request):
    pytest.importorskip("triton")
    import interpreter

    if reason := interpreter.why_not():
        pytest.skip(reason)
    assert len(results_of(*LAYER, config=request.config)) == 3 * len(DEVICE_CASES)


def main(claims: Path) -> None:
    """The cases that no other process has claimed."""
    import interpreter
    from ada2i_fast.kernels import common

    interpreter.hurry(overflow=False)
    torch.set_num_threads(1)
    rows = common.LIBRARY_ROWS
    for number, (case, dtype, library) in enumerate((case, dtype, library) for dtype, library in (
            (torch.float32, False), (torch.bfloat16, False), (torch.float32, True)) for case in DEVICE_CASES):
        if not claim(claims / str(number)):
            continue
        common.LIBRARY_ROWS = dict.fromkeys(rows, 1) if library else rows       # what many rows take: the loss hands over other things
        drawn = inputs(case, dtype)
        assert_is_the_two_ops(case, drawn, "triton")
        if dtype != torch.float32:
            exact = run(case, decided(case, dtype), "torch", torch.float64)
            mixed = float32_parameters(decided(case, dtype))
            assert_close(run(case, mixed, "triton"), run(case, decided(case, dtype), "torch"), exact, dtype)
        print(json.dumps({"case": number, "checks": []}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--claims", type=Path, required=True)
    main(parser.parse_args().claims)
