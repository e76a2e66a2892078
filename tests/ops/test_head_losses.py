"""head_losses: plain PyTorch as the model always had it, the node around the kernels, and the kernels on a GPU.

Kernels run under the interpreter in tests/kernels; here the closed formulas of the op's docstring stand in for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ada2i_fast import Ada2I, DialogueBatch, backends
from ada2i_fast.ops import head_losses
from afw_cases import assert_close
from model_cases import padded_case, small_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("grad joint", "grad extra", "grad W_1", "grad b_1", "grad W_2", "grad b_2")


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    inner: int = 0              # 0: no head
    labels: bool = True
    ignored: int = 4            # every so many rows have no label; 0: all rows have one
    of_log_prob: bool = False   # it has a gradient, too
    seed: int = 0


SMALL = Case(19, 5, 20, seed=1)
SHAPES = {"small": SMALL, "iemocap": Case(500, 6, 24, seed=2), "meld": Case(96, 7, 28, ignored=0, of_log_prob=True),
          "one row": Case(1, 2, 8, ignored=0), "released": Case(300, 6, seed=3), "no labels": Case(37, 6, 24, labels=False),
          "wide": Case(700, 20, 80, of_log_prob=True),
          "two launches": Case(5000, 6, 24), "released, two launches": Case(5000, 6, of_log_prob=True), "many rows": Case(100_000, 6, 24)}


def inputs(case: Case, dtype: torch.dtype = torch.float64, parameters: torch.dtype | None = None) -> dict:
    g = torch.Generator().manual_seed(case.seed)
    c, i = case.classes, case.inner

    def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(shape, generator=g, dtype=torch.float64)

    labels = torch.randint(0, c, (case.rows,), generator=g) if case.labels else None
    if case.labels and case.ignored:
        labels[::case.ignored] = -100
    head = [draw(i, c, size=c ** -0.5), draw(i), draw(c, i, size=i ** -0.5), draw(c)] if i else []
    return {"joint": draw(case.rows, c, size=2.0).to(dtype), "head": [t.to(parameters or dtype) for t in head], "labels": labels,
            "extra": draw().to(torch.promote_types(dtype, torch.float32)), "grad": draw(case.rows, c) / max(case.rows, 1)}


def leaves(drawn: dict, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in (drawn["joint"], drawn["extra"], *drawn["head"])]


def call(drawn: dict, tensors: list[torch.Tensor], backend: str = "auto"):
    return head_losses(tensors[0], tensors[2:] or None, drawn["labels"], tensors[1], backend=backend)


def run(case: Case, drawn: dict, backend: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All outputs and gradients."""
    tensors = leaves(drawn, dtype)
    log_prob, loss = call(drawn, tensors, backend)
    found = {"log_prob": log_prob} | ({} if loss is None else {"loss": loss})
    outputs, grads = ([loss], [torch.full_like(loss, 1.7)]) if case.labels else ([], [])
    if case.of_log_prob or not case.labels:
        outputs, grads = [*outputs, log_prob], [*grads, drawn["grad"].to(log_prob)]
    found |= {name: t for name, t in zip(NAMES, torch.autograd.grad(outputs, tensors, grads, allow_unused=True)) if t is not None}
    assert case.labels == ("grad extra" in found) and ("grad W_1" in found) == bool(case.inner)
    return found


def usual(joint, head, labels, extra):
    """The lines that the model had for it."""
    logits = head(joint) if head else joint
    log_prob = F.log_softmax(logits, dim=1)
    loss = F.nll_loss(log_prob, labels) + extra
    return log_prob, loss + F.cross_entropy(joint, labels) if head else loss


# ------------------------------------------------------------------------------------------------------------ plain PyTorch


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("inner", [20, 0])
@pytest.mark.parametrize("autocast", [True, False])
def test_on_a_cpu_the_same_bits_as_ever(dtype, inner, autocast):
    drawn = inputs(replace(SMALL, inner=inner), dtype)
    head = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 5)).to(dtype) if inner else None
    with torch.no_grad():
        for p, t in zip(head.parameters() if inner else (), drawn["head"]):
            p.copy_(t)
    for backend in ("auto", "torch"):
        results = []
        for new in (True, False):
            joint, extra, *own = leaves(drawn)
            own = [joint, extra, *(own if new or not inner else head.parameters())]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
                log_prob, loss = call(drawn, own, backend) if new else usual(joint, head, drawn["labels"], extra)
            results.append([log_prob, loss, *torch.autograd.grad(loss, own)])
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


def test_auto_is_plain_pytorch_on_a_cpu(monkeypatch):
    monkeypatch.delenv("ADA2I_FAST_BACKEND", raising=False)
    drawn = inputs(SMALL, torch.float32)
    assert backends.choose("head_losses", [drawn["joint"], drawn["head"][2]]) == "torch"
    assert "not cpu: it does not bring head_losses" in backends.explain("head_losses", drawn["joint"], drawn["head"][2])
    for backend in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match=f"head_losses: backend '{backend}' cannot serve this input"):
            call(drawn, leaves(drawn), backend)


@pytest.mark.parametrize("case", [Case(4, 3, 5), Case(4, 3), Case(3, 4, 3, labels=False)], ids=["head", "none", "no labels"])
def test_derivatives_of_the_formula(case):
    drawn = inputs(case)
    tensors = leaves(drawn) if case.labels else [leaves(drawn)[0], *leaves(drawn)[2:]]

    def function(*given):
        given = given if case.labels else (given[0], None, *given[1:])
        return tuple(t for t in call(drawn, list(given)) if t is not None)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_rows_without_a_label():
    drawn = inputs(replace(SMALL, ignored=3))
    kept = drawn["labels"] != -100
    some = {**drawn, "joint": drawn["joint"][kept], "labels": drawn["labels"][kept]}
    torch.testing.assert_close(call(drawn, leaves(drawn))[1], call(some, leaves(some))[1])
    for labels in (torch.full_like(drawn["labels"], -100), drawn["labels"][:0]):
        joint = drawn["joint"][:labels.shape[0]]
        log_prob, loss = head_losses(joint, drawn["head"], labels)
        assert loss.isnan() and loss.dim() == 0 and log_prob.shape == joint.shape


# ------------------------------------------------------------------------------------------------- the node around kernels


def closed_forward(joint, head, labels, extra, dtype):
    wide = backends.accumulator(joint.dtype)
    x, logits = joint.to(wide), joint.to(wide)
    if head:
        w_1, b_1, w_2, b_2 = (t.to(wide) for t in head)
        logits = (x @ w_1.t() + b_1).clamp_min(0) @ w_2.t() + b_2
    log_prob = logits - logits.logsumexp(1, keepdim=True)
    if labels is None:
        return [log_prob.to(dtype)]
    kept = labels != -100
    count = kept.sum().to(wide)
    of = [-t[kept, labels[kept]].sum() / count for t in ([log_prob, x - x.logsumexp(1, keepdim=True)] if head else [log_prob])]
    return [log_prob.to(dtype), sum(of) + (0 if extra is None else extra.to(wide)), count]


def closed_backward(grad_log_prob, grad_loss, joint, head, labels, log_prob, count):
    wide = backends.accumulator(joint.dtype)
    x, p = joint.to(wide), log_prob.to(wide).exp()
    g, aside = torch.zeros_like(p), 0
    if labels is not None:
        hot = F.one_hot(labels.clamp_min(0), p.shape[1]).to(wide)
        factor = (grad_loss / count * (labels != -100))[:, None]
        g, aside = factor * (p - hot), factor * (x.softmax(1) - hot)
    if grad_log_prob is not None:
        given = grad_log_prob.to(wide)
        g = g + given - p * given.sum(1, keepdim=True)
    if not head:
        return [g.to(joint.dtype)]
    w_1, b_1, w_2, _ = (t.to(wide) for t in head)
    h = x @ w_1.t() + b_1
    g_h = g @ w_2 * (h > 0)
    grads = [g_h @ w_1 + aside, g_h.t() @ x, g_h.sum(0), g.t() @ h.clamp_min(0), g.sum(0)]
    return [g.to(t.dtype) for g, t in zip(grads, (joint, *head))]


@pytest.fixture
def kernels(monkeypatch):
    """The closed formulas in the place of Triton's kernels, for all tensors."""
    seen = []

    def forward(*arguments):
        seen.append(arguments)
        return closed_forward(*arguments)

    monkeypatch.setattr(backends, "module", lambda op, backend: SimpleNamespace(forward=forward, backward=closed_backward))
    monkeypatch.setattr(backends, "choose", lambda op, x, backend="auto", rank=1: "torch" if backend == "torch" else "triton")
    return seen


NODES = {"head": replace(SMALL, of_log_prob=True), "loss alone": SMALL, "none": replace(SMALL, inner=0),
         "no labels": replace(SMALL, labels=False), "no row": Case(0, 5, 20), "all ignored": replace(SMALL, ignored=1)}


@pytest.mark.parametrize("case", NODES.values(), ids=NODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_node(kernels, case, dtype):
    drawn = inputs(case, dtype)
    actual, plain, exact = run(case, drawn, "triton"), run(case, drawn, "torch"), run(case, drawn, "torch", torch.float64)
    assert kernels and actual.keys() == exact.keys() and actual["log_prob"].dtype == dtype
    if case.labels:
        assert actual["loss"].dtype == torch.promote_types(dtype, torch.float32)
        if case.rows == 0 or case.ignored == 1:
            assert actual["loss"].isnan() and exact["loss"].isnan()
            del exact["loss"]
    actual = {name: t.nan_to_num() if case.ignored == 1 else t for name, t in actual.items()}      # 0 / 0 of the closed formulas
    assert_close(actual, plain, exact, dtype)


@pytest.mark.parametrize("case", [Case(4, 3, 5), Case(4, 3)], ids=["head", "none"])
def test_derivatives_of_the_node(kernels, case):
    drawn = inputs(case)
    tensors = leaves(drawn)

    def function(*given):
        return call(drawn, list(given))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    loss, log_prob = (function(*tensors)[i] for i in (1, 0))
    for output, grad in ((loss, torch.ones_like(loss)), (log_prob, drawn["grad"])):
        plain = torch.autograd.grad(output, tensors, grad, allow_unused=True, retain_graph=True)
        graphed = torch.autograd.grad(output, tensors, grad, allow_unused=True, create_graph=True)
        for a, b in zip(graphed, plain):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-14))


def test_second_order_of_mixed_dtypes(kernels):
    drawn = inputs(SMALL, torch.bfloat16, torch.float32)
    tensors = leaves(drawn)
    loss = call(drawn, tensors)[1]
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]
    torch.autograd.grad(grads[0].float().square().sum(), tensors[2])


def test_dtypes_of_autocast(kernels):
    """bfloat16 joint logits beside float32 parameters: float32 out, as F.log_softmax has it under autocast on CUDA."""
    drawn = inputs(SMALL, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(SMALL, drawn, "triton")
    assert found["log_prob"].dtype == found["loss"].dtype == found["grad W_1"].dtype == torch.float32
    assert found["grad joint"].dtype == torch.bfloat16
    assert call(drawn, leaves(drawn))[0].dtype == torch.bfloat16


def test_saves_what_is_there_anyway(kernels):
    drawn = inputs(SMALL, torch.float32)
    tensors, saved = leaves(drawn), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        log_prob, _ = call(drawn, tensors)
    own = {t.data_ptr() for t in (*tensors, log_prob, drawn["labels"])}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 4         # the number of labels


def test_gradients_for_some(kernels):
    drawn = inputs(SMALL)
    expected = run(SMALL, drawn, "triton")
    tensors = [t.detach() for t in leaves(drawn)]
    tensors[3].requires_grad_()
    call(drawn, tensors)[1].backward(torch.tensor(1.7, dtype=torch.float64))
    assert torch.equal(tensors[3].grad, expected["grad b_1"]) and all(t.grad is None for n, t in enumerate(tensors) if n != 3)
    with torch.no_grad():
        assert not call(drawn, leaves(drawn))[1].requires_grad


@pytest.mark.parametrize("case", list(NODES.values())[:4], ids=list(NODES)[:4])           # a loss of NaN is none that opcheck finds equal
def test_opcheck(kernels, case):
    drawn = inputs(case, torch.float32)
    given = (drawn["joint"], drawn["head"], drawn["labels"], drawn["extra"], torch.float32, "triton")
    torch.library.opcheck(torch.ops.ada2i_fast.head_losses_forward.default, given)
    log_prob, *of_labels = torch.ops.ada2i_fast.head_losses_forward(*given)
    loss, count = of_labels or (None, None)
    grad = drawn["grad"].float() if case.of_log_prob or not case.labels else None
    torch.library.opcheck(torch.ops.ada2i_fast.head_losses_backward.default, (grad, loss, *given[:3], log_prob, count, "triton"))


@pytest.mark.parametrize("case", [NODES["head"], NODES["none"], NODES["no labels"]], ids=["head", "none", "no labels"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_whole_and_once(kernels, case, backend):
    torch._dynamo.reset()

    def both(joint, extra, labels, *head):
        log_prob, loss = head_losses(joint, head, labels, extra, backend=backend)
        return log_prob if loss is None else log_prob.square().sum() + loss

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (8, 15, 21):
            drawn = inputs(replace(case, rows=rows), torch.float32)
            results = []
            for f in (both, compiled):
                joint, extra, *head = leaves(drawn)
                out = f(joint, extra, drawn["labels"], *head)
                results.append([out, *torch.autograd.grad(out.sum(), [joint, *head])])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("preset", ["published", "released"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_model_takes_it(kernels, monkeypatch, preset, labelled):
    """With kernels the model's numbers are those of plain PyTorch; what they can do is asked with the sizes of the head."""
    tensors, lengths, labels = padded_case([5, 3], dtype=torch.float32)
    batch, results, asked = DialogueBatch.from_padded(tensors, lengths, labels if labelled else None), [], []
    monkeypatch.setattr(backends, "best", lambda op, device, dtype, *widths: asked.append((op, *widths)) or "triton")
    for backend in ("torch", "auto"):
        torch.manual_seed(0)
        model = Ada2I(small_config(preset), backend="torch")
        model.backend = backend
        out = model(batch)
        (out.loss if labelled else out.log_prob.square().sum()).backward()
        results.append([out.log_prob, *([out.loss] if labelled else []), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert asked == [("head_losses", 6, 24) if preset == "published" else ("head_losses", 6)]
    assert len(kernels) == 1 and len(results[0]) == len(results[1])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,parameters", [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_triton_on_a_gpu(case, dtype, parameters):
    drawn = {name: [h.cuda() for h in t] if isinstance(t, list) else None if t is None else t.cuda()
             for name, t in inputs(case, dtype, parameters).items()}
    run(case, drawn, "triton")                                  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = run(case, drawn, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = run(case, drawn, "torch", torch.float64)
    assert_close(actual, run(case, drawn, "torch", dtype), exact, dtype)
    again = run(case, drawn, "triton")
    assert all(torch.equal(actual[name], again[name]) for name in again)


@pytest.mark.gpu
def test_in_a_cuda_graph(captured):
    drawn = {name: [h.cuda() for h in t] if isinstance(t, list) else t.cuda()
             for name, t in inputs(SHAPES["iemocap"], torch.float32).items()}
    tensors = leaves(drawn)

    def step():
        log_prob, loss = call(drawn, tensors, "triton")
        return [log_prob.detach(), loss.detach(), *torch.autograd.grad(loss, tensors)]

    graph, replayed = captured(step)
    with torch.no_grad():
        tensors[0].mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, step()))


def test_refusals():
    x, y, e = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(())
    head = [torch.ones(5, 3), torch.ones(5), torch.ones(3, 5), torch.ones(3)]
    for arguments, message in (
            ((x[0], head, y, e), r"joint: expected \[N, C\], got \[3\]"),
            ((x, head[:3], y, e), r"head: expected \[I, 3\], \[I\], \[3, I\], \[3\] or None, got \[\[5, 3\], \[5\], \[3, 5\]\]"),
            ((x, [*head[:2], head[2].t(), head[3]], y, e), r"head: .* got \[\[5, 3\], \[5\], \[5, 3\], \[3\]\]"),
            ((x, head, y[:3], e), r"labels: expected int64 \[4\] or None, got int64 \[3\]"),
            ((x, head, y.int(), e), r"labels: .* got int32 \[4\]"),
            ((x, head, y, e[None]), r"extra: expected a tensor without dimensions or None, got \[1\]"),
            ((x, head, y.to("meta"), e), "labels: expected a tensor on cpu, got one on meta"),
            ((x, [*head[:3], head[3].to("meta")], y, e), r"head\[3\]: expected a tensor on cpu, got one on meta")):
        with pytest.raises(ValueError, match=message):
            head_losses(*arguments)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve this input: .*"):
        head_losses(x, head, y, e, backend="cuda")


@pytest.mark.parametrize("label", [3, -1])
def test_labels_that_are_no_class(label):
    with pytest.raises(IndexError, match="out of bounds"):
        head_losses(torch.ones(4, 3), None, torch.tensor([0, label, 1, 2]))
