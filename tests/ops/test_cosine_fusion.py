"""cosine_fusion: the native backend against float64, the textbook, and what an op of torch has to obey."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn

from ada2i_fast import cpu, reference
from ada2i_fast.balance import disparity_ratio
from ada2i_fast.modules import ModalityWeighting
from ada2i_fast.ops import cosine_fusion
from afw_cases import assert_close, assert_same_bits_with_threads, guarded, poisoned

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
profile = settings.get_profile("ops")
TIERS = cpu.tiers() if cpu.why_not() is None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    classes: int
    modalities: int = 3
    amw: bool = True
    cosine_norm: str = "features"
    scale: float = 10.0
    score_from: str = "cosine"
    bias: bool = False
    labels: bool = True
    seed: int = 0

    @property
    def options(self) -> dict:
        return dict(amw=self.amw, cosine_norm=self.cosine_norm, scale=self.scale, score_from=self.score_from)


RELEASED = dict(cosine_norm="classes", scale=1.0, score_from="linear", bias=True)
SMALL = Case(19, 18, 5, seed=1)
OPTIONS = [Case(37, 21, classes, 2, amw, norm, 3.0, score, bias, labels, seed=3)
           for classes, amw in ((4, True), (7, False)) for norm in ("classes", "features") for score in ("linear", "cosine")
           for bias in (True, False) for labels in (True, False)]
SHAPES = {"small": SMALL, "iemocap": Case(500, 300, 6, seed=2), "meld released": Case(96, 200, 7, **RELEASED),
          "chunks": Case(2100, 9, 2, 2, seed=4, bias=True)}


@st.composite
def cases(draw) -> Case:
    return Case(
        rows=draw(st.one_of(st.integers(0, 5), st.integers(0, 80))), classes=draw(st.integers(2, 10)), modalities=draw(st.integers(1, 4)),
        width=draw(st.one_of(st.integers(1, 40), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 130]))), amw=draw(st.booleans()),
        cosine_norm=draw(st.sampled_from(["classes", "features"])), scale=draw(st.sampled_from([1.0, 10.0])),
        score_from=draw(st.sampled_from(["linear", "cosine"])), bias=draw(st.booleans()), labels=draw(st.booleans()),
        seed=draw(st.integers(0, 999)))


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> dict:
    """Rows of unlike norms; held in `dtype`."""
    g = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    size = 4.0 ** draw(case.rows, 1).clamp(-2, 2)
    return {"hidden": [(size * draw(case.rows, case.width)).to(dtype) for _ in range(case.modalities)],
            "weight": (draw(case.classes, case.modalities * case.width) * case.width ** -0.5).to(dtype),
            "bias": draw(case.classes).to(dtype) if case.bias else None,
            "labels": torch.randint(0, case.classes, (case.rows,), generator=g) if case.labels else None,
            "grad": draw(case.rows, case.classes).to(dtype)}


def leaves(drawn: dict, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """hidden, weight and, if there is one, bias."""
    tensors = [*drawn["hidden"], drawn["weight"], *([] if drawn["bias"] is None else [drawn["bias"]])]
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def call(case: Case, drawn: dict, tensors: list[torch.Tensor], backend: str = "cpu"):
    m = case.modalities
    return cosine_fusion(tensors[:m], tensors[m], tensors[m + 1] if case.bias else None, drawn["labels"], backend=backend, **case.options)


def run(case: Case, drawn: dict, backend: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All outputs and gradients."""
    tensors = leaves(drawn, dtype)
    names = [*(f"grad hidden[{m}]" for m in range(case.modalities)), "grad weight", "grad bias"]
    found = dict(zip(("joint", "log_prob", "scores", "ratio"), call(case, drawn, tensors, backend)))
    grads = torch.autograd.grad(found["joint"], tensors, drawn["grad"].to(found["joint"].dtype))
    assert not any(t.requires_grad for name, t in found.items() if t is not None and name != "joint")
    if not case.rows:                                           # 0 / 0
        found["ratio"] = None if found["ratio"] is None else found["ratio"].isnan().double()
    return {name: t for name, t in found.items() if t is not None} | dict(zip(names, grads))


def terms(case: Case, drawn: dict, exact: dict) -> dict[str, float]:
    """The size of what is subtracted: a cosine's gradient is what is left of u (see the op) without its part along h, all or nothing
    where D is 1; likewise for W where C or D is 1. A sum of cosines can vanish, too. And a probability's relative error is the absolute
    error of its logarithm."""
    found = {}
    if not case.rows:
        return found
    if case.labels:
        logarithm = 1 + exact["log_prob"].abs().max().item()
        found = {"scores": logarithm * exact["scores"].max().item(), "ratio": 2 * logarithm * exact["ratio"].max().item()}
    if not case.amw:
        return found
    found["joint"] = case.scale
    axis = 0 if case.cosine_norm == "classes" else 1
    grad, sizes = case.scale * drawn["grad"].double(), []
    for m, (h, w) in enumerate(zip(drawn["hidden"], drawn["weight"].double().chunk(case.modalities, dim=1))):
        h_norm, w_norm = h.double().norm(dim=1, keepdim=True), w.norm(dim=axis, keepdim=True)
        found[f"grad hidden[{m}]"] = (grad @ (w / w_norm) / h_norm).abs().max().item()
        sizes.append((grad.t() @ (h.double() / h_norm) / w_norm).abs().max().item())
    return found | {"grad weight": max(sizes)}


def check(case: Case, dtype: torch.dtype) -> None:
    drawn = inputs(case, dtype)
    actual = run(case, drawn, "cpu")
    assert actual["joint"].dtype == dtype and all(t.dtype == dtype for name, t in actual.items() if name.startswith("grad"))
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(actual[name].dtype == precise for name in ("log_prob", "scores") if name in actual)
    exact = run(case, drawn, "torch", torch.float64)
    assert_close(actual, run(case, drawn, "torch"), exact, dtype, terms(case, drawn, exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(profile, max_examples=50)
@given(case=cases())
@example(case=Case(0, 3, 4))
@example(case=Case(1, 1, 2, 1))
@example(case=Case(1, 1, 1, 1, cosine_norm="classes"))
@example(case=Case(33, 7, 100, 2))
def test_error_against_float64(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("case", OPTIONS, ids=lambda c: f"{c.classes}-{c.amw}-{c.cosine_norm}-{c.score_from}-{c.bias}-{c.labels}")
def test_every_option(case):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(case, dtype)


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tier(case, tier, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", [c for c in OPTIONS if c.labels], ids=lambda c: f"{c.amw}-{c.cosine_norm}-{c.score_from}-{c.bias}")
def test_against_textbook(case):
    drawn = inputs(case)
    book = nn.Linear(case.modalities * case.width, case.classes, bias=case.bias).double()
    with torch.no_grad():
        book.weight.copy_(drawn["weight"])
        if case.bias:
            book.bias.copy_(drawn["bias"])
    hidden = {str(m): h.clone().requires_grad_() for m, h in enumerate(drawn["hidden"])}
    joint, unimodal = reference.cosine_fusion(hidden, book, **case.options)
    grads = torch.autograd.grad(joint, [*hidden.values(), *book.parameters()], drawn["grad"])
    ratio = reference.disparity_ratio(unimodal, drawn["labels"])
    score = [sum(x[i].softmax(0)[y] for i, y in enumerate(drawn["labels"])) for x in unimodal.values()]
    exact = {"joint": joint, "log_prob": torch.stack([x.log_softmax(1) for x in unimodal.values()]), "scores": torch.stack(score),
             "ratio": torch.stack(list(ratio.values()))}
    names = [*(f"grad hidden[{m}]" for m in range(case.modalities)), "grad weight", "grad bias"]
    exact |= dict(zip(names, grads))
    for backend in ("cpu", "torch"):            # the textbook's rounding is as large as any: the floor alone
        assert_close(run(case, drawn, backend), exact, exact, torch.float64, terms(case, drawn, exact))


def test_ratio_is_that_of_the_public_function():
    for dtype in (torch.float32, torch.float64):
        drawn = inputs(SMALL, dtype)
        for backend in ("cpu", "torch"):
            _, _, scores, ratio = call(SMALL, drawn, leaves(drawn), backend)
            assert torch.equal(ratio, torch.stack(list(disparity_ratio(scores, "atv").values())))
            assert ratio.min() == 1


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, **RELEASED)], ids=["published", "released"])
@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_of_zero(case, tier, dtype):
    """As F.normalize has it: norms below 1e-12 count as 1e-12, and nothing is projected out of their gradients."""
    drawn = inputs(case, dtype)
    for h in drawn["hidden"]:
        h[0], h[1], h[2] = 0, h[1] * (3e-13 / h[1].norm()), h[2] * (2e-12 / h[2].norm())
    w = drawn["weight"]
    w[1], w[:, 3] = 0, 0                                        # a class, a feature
    w[2, :case.width] *= 3e-13 / w[2, :case.width].norm()
    w[:, 6] *= 3e-13 / w[:, 6].norm()
    actual, plain = (run(case, drawn, backend) for backend in ("cpu", "torch"))
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4       # of each row of its own: their gradients are 1e12 apart
    for name, e in plain.items():
        across = 0 if name == "grad weight" and case.cosine_norm == "classes" else -1
        top = e.abs().amax(across, keepdim=True).clamp_min(1e-3)
        assert ((actual[name] - e).abs() <= tolerance * top).all(), name
    assert actual["grad hidden[0]"][0].abs().max() > 1e10


def test_rows_of_zero_in_half_precision():
    """1e-12 is 0 in float16; norms are float32, so cosines of such a row are 0 and not NaN."""
    drawn = inputs(SMALL, torch.float16)
    for h in drawn["hidden"]:
        h[4] = 0
    joint, log_prob, _, ratio = call(SMALL, drawn, leaves(drawn))
    assert not joint[4].any() and log_prob.isfinite().all() and ratio.isfinite().all()


@pytest.mark.parametrize("tier", TIERS, indirect=True)
def test_nan_stays_in_its_row(tier):
    for case in (SMALL, replace(SMALL, **RELEASED)):
        for dtype in (torch.float32, torch.float64):
            drawn = inputs(case, dtype)
            drawn["hidden"][1][5, 3] = float("nan")
            joint, log_prob, scores, ratio = call(case, drawn, leaves(drawn))
            others = [n for n in range(case.rows) if n != 5]
            assert joint[5].isnan().all() and joint[others].isfinite().all()
            assert log_prob[1, 5].isnan().all() and log_prob[[0, 2]].isfinite().all() and log_prob[:, others].isfinite().all()
            assert scores.isnan().tolist() == [False, True, False] and ratio.isnan().all()


def test_same_bits_whatever_the_threads():
    for case in (SHAPES["iemocap"], SHAPES["chunks"]):
        for dtype in DTYPES:
            drawn = inputs(case, dtype)
            assert_same_bits_with_threads(lambda: run(case, drawn, "cpu"))


@pytest.mark.parametrize("tier", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stays_within_its_arrays(monkeypatch, tier, dtype):
    """Misaligned inputs inside buffers of NaN, outputs poisoned: the same bits."""
    for case in (SMALL, replace(SMALL, classes=7, **RELEASED), SHAPES["chunks"]):
        drawn = inputs(case, dtype)
        expected = run(case, drawn, "cpu")
        around = torch.full((case.rows + 20,), 2 ** 40)
        around[10:-10] = drawn["labels"]
        inside = [guarded(t.detach())[0].requires_grad_() for t in leaves(drawn)]
        with monkeypatch.context() as patch:
            poisoned(patch)
            found = call(case, {**drawn, "labels": around[10:-10]}, inside)
            grads = torch.autograd.grad(found[0], inside, guarded(drawn["grad"])[0])
        for (name, e), a in zip(expected.items(), [*found, *grads]):
            assert torch.equal(a, e), name


def test_strided_and_expanded_inputs():
    case = Case(11, 12, 4, bias=True, seed=6)
    drawn = inputs(case)
    drawn["hidden"] = [drawn["hidden"][0][:1].expand(11, 12), drawn["hidden"][1].t().contiguous().t(),
                       torch.stack([drawn["hidden"][2]] * 2, dim=2)[:, :, 0]]
    drawn["weight"] = drawn["weight"].t().contiguous().t()
    drawn["bias"] = drawn["bias"][:1].expand(4)
    drawn["labels"] = torch.stack([drawn["labels"]] * 2, dim=1)[:, 1]
    drawn["grad"] = drawn["grad"][:, :1].expand(11, 4)
    plain = {name: [h.contiguous() for h in t] if name == "hidden" else t.contiguous() for name, t in drawn.items()}
    a, b = (run(case, d, "cpu") for d in (drawn, plain))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_saves_the_norms_alone():
    case = SHAPES["iemocap"]
    drawn = inputs(case, torch.float32)
    tensors, saved = leaves(drawn), {}
    own = {t.data_ptr() for t in tensors}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        assert call(case, drawn, tensors)[0].requires_grad
    assert sum(t.nbytes for p, t in saved.items() if p not in own) == 4 * 3 * 500


def test_gradients_for_some():
    """Whoever needs no gradient gets none."""
    drawn = inputs(SMALL)
    expected = run(SMALL, drawn, "cpu")
    for wanted in ("hidden[1]", "weight"):
        tensors = [t.detach() for t in leaves(drawn)]
        tensors[1 if wanted == "hidden[1]" else 3].requires_grad_()
        joint = call(SMALL, drawn, tensors)[0]
        joint.backward(drawn["grad"])
        for t, name in zip(tensors, ("hidden[0]", "hidden[1]", "hidden[2]", "weight")):
            assert t.grad is None if name != wanted else torch.equal(t.grad, expected[f"grad {name}"])
    with torch.no_grad():
        assert not call(SMALL, drawn, leaves(drawn))[0].requires_grad


@pytest.mark.parametrize("case", [Case(3, 4, 3, 2), Case(3, 4, 3, 2, **RELEASED), Case(3, 2, 2, 2, amw=False, bias=True, labels=False)],
                         ids=["published", "released", "without amw"])
def test_first_and_second_derivatives(case):
    drawn = inputs(case)
    tensors = leaves(drawn)

    def function(*given):
        return call(case, drawn, list(given))[0]

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)

    # gradgradcheck takes the first derivative as it comes: with create_graph it is another expression, which has to agree.
    plain = torch.autograd.grad(function(*tensors), tensors, drawn["grad"])
    graphed = torch.autograd.grad(function(*tensors), tensors, drawn["grad"], create_graph=True)
    torch.testing.assert_close(graphed, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    for case in (SMALL, replace(SMALL, **RELEASED), replace(SMALL, labels=False)):
        drawn, o = inputs(case, dtype), case.options
        given = (drawn["hidden"], drawn["weight"], drawn["bias"], drawn["labels"], *o.values(), "cpu")
        torch.library.opcheck(torch.ops.ada2i_fast.cosine_fusion_forward.default, given)
        norm = torch.ops.ada2i_fast.cosine_fusion_forward(*given)[2]
        torch.library.opcheck(torch.ops.ada2i_fast.cosine_fusion_backward.default,
                              (drawn["grad"], drawn["hidden"], drawn["weight"], norm, case.bias, *list(o.values())[:3], "cpu"))


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, **RELEASED), replace(SMALL, labels=False)],
                         ids=["published", "released", "no labels"])
def test_compiles_whole_and_once(case):
    torch._dynamo.reset()
    module = ModalityWeighting(case.width, case.modalities, case.classes, bias=case.bias, **case.options)

    def both(hidden, labels):
        joint, log_prob, scores, ratio = module(hidden, labels)
        return joint, log_prob, *(() if scores is None else (scores, ratio))

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (8, 15, 21):
            drawn = inputs(replace(case, rows=rows), torch.float32)
            results = []
            for f in (both, compiled):
                hidden = [h.clone().requires_grad_() for h in drawn["hidden"]]
                found = f(hidden, drawn["labels"])
                results.append([*found, *torch.autograd.grad(found[0], [*hidden, *module.parameters()], drawn["grad"])])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


def test_autocast_leaves_the_dtype_of_hidden():
    case = replace(SMALL, bias=True)
    drawn = inputs(case, torch.float32)
    expected = call(case, drawn, leaves(drawn))
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("cpu", "torch"):
            torch.testing.assert_close(call(case, drawn, leaves(drawn), backend), expected, rtol=1e-4, atol=1e-4)
    tensors = [t.detach().bfloat16().requires_grad_() if i < 3 else t for i, t in enumerate(leaves(drawn))]
    joint, log_prob, *_ = call(case, drawn, tensors)
    assert joint.dtype == torch.bfloat16 and log_prob.dtype == torch.float32
    for g, t in zip(torch.autograd.grad(joint, tensors, drawn["grad"].bfloat16()), tensors):
        assert g.dtype == t.dtype


def test_the_module_takes_the_best_backend(monkeypatch):
    module = ModalityWeighting(18, 3, 5)
    drawn, seen = inputs(SMALL, torch.float32), []
    forward = cpu.call
    monkeypatch.setattr("ada2i_fast.cpu.cosine_fusion.call", lambda name, args: (seen.append(name), forward(name, args)))
    for backend, calls in (("torch", 0), ("auto", 1), ("cuda", 1)):       # there is no such kernel in CUDA C++
        seen.clear()
        module.backend = backend
        module([h.float() for h in drawn["hidden"]], drawn["labels"])
        assert len(seen) == calls, backend


@pytest.mark.parametrize("label", [5, -1, 2 ** 40, -(2 ** 63)])
def test_labels_that_are_no_class(label):
    drawn = inputs(SMALL)
    drawn["labels"][7] = drawn["labels"][12] = label
    with pytest.raises(ValueError, match=f"labels: expected classes from 0 to 4, got {label} at position 7"):
        call(SMALL, drawn, leaves(drawn))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_triton_on_a_gpu(case, dtype):
    drawn = {name: [h.cuda() for h in t] if isinstance(t, list) else None if t is None else t.cuda()
             for name, t in inputs(case, dtype).items()}
    run(case, drawn, "triton")                                  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = run(case, drawn, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = run(case, drawn, "torch", torch.float64)
    assert_close(actual, run(case, drawn, "torch"), exact, dtype, terms(case, drawn, exact))
    again = run(case, drawn, "triton")
    assert all(torch.equal(actual[name], again[name]) for name in again)


def test_refusals():
    h, w, b, y = [torch.ones(4, 3)] * 2, torch.ones(5, 6), torch.ones(5), torch.zeros(4, dtype=torch.int64)
    for arguments, options, message in (
            ((h, w, b, y), dict(cosine_norm="rows"), "cosine_norm: expected 'classes' or 'features', got 'rows'"),
            ((h, w, b, y), dict(score_from="joint"), "score_from: expected 'linear' or 'cosine', got 'joint'"),
            (([], w, b, y), {}, r"hidden: expected one or more tensors \[N, D\] of one shape, got \[\]"),
            (([h[0], h[0][:2]], w, b, y), {}, r"hidden: .* got \[\[4, 3\], \[2, 3\]\]"),
            (([h[0], h[0].double()], w, b, y), {}, "hidden: expected one dtype"),
            ((h, w[:, :5], b, y), {}, r"weight: expected \[C, 2 \* 3\], got \[5, 5\]"),
            ((h, w, b[:4], y), {}, r"bias: expected \[5\] or None, got \[4\]"),
            ((h, w, b, y[:3]), {}, r"labels: expected int64 \[4\] or None, got int64 \[3\]"),
            ((h, w, b, y.int()), {}, r"labels: .* got int32 \[4\]"),
            ((h, w, b, y.to("meta")), {}, "labels: expected a tensor on cpu, got one on meta"),
            ((h, w.to("meta"), b, y), {}, "weight: expected a tensor on cpu, got one on meta")):
        with pytest.raises(ValueError, match=message):
            cosine_fusion(*arguments, **options)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve this input"):
        cosine_fusion(h, w, b, y, backend="cuda")
