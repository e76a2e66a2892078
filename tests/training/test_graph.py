"""Training steps in buckets, and the logic around their CUDA graphs; the graphs themselves need a GPU (-m gpu)."""

from __future__ import annotations

import contextlib
import random
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ada2i_fast import Ada2I, BalancedAdam, DialogueBatch, backends, cpu
from ada2i_fast.batch import FixedBatch
from ada2i_fast.ops import attention_mapping, cosine_fusion, dialogue_attention
from ada2i_fast.ops.dialogue_attention import DialogueOffsets
from ada2i_fast.ops.linear import Branches
from ada2i_fast.training import GraphedStep
from ada2i_fast.training.graph import HELD_GRAPH
from ada2i_fast.training.loop import ahead
from model_cases import WIDTHS, padded_case, small_config, spread_parameters

NATIVE = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
LENGTHS = [[7, 3, 13, 1], [2, 2, 2, 2], [20, 1, 5, 9], [16, 16, 3, 1], [9, 9]]


def batch_of(lengths, dtype=torch.float64, seed=0, device="cpu") -> DialogueBatch:
    return DialogueBatch.from_padded(*padded_case(lengths, dtype=dtype, seed=seed)).to(device)


def model_of(preset, dtype=torch.float64, backend="torch", device="cpu", **changes) -> Ada2I:
    config = small_config(preset, **{**dict(noise="none"), **changes})
    torch.manual_seed(0)
    model = Ada2I(config, backend=backend).to(dtype)
    spread_parameters(model)
    return model.to(device)


def fixed_of(batch, model, rows=48, dialogues=7, longest=32) -> FixedBatch:
    if model.config.padding == "attended":
        rows, dialogues, longest = batch.num_dialogues * batch.max_length, batch.num_dialogues, batch.max_length
    return FixedBatch.empty(batch, rows, dialogues, longest, model.config.padding == "attended")


def outcome(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(batch)
    out.loss.backward()
    return {"loss": out.loss.detach(), "feature loss": out.feature_loss.detach(), **{f"ratio {m}": r for m, r in out.ratio.items()},
            **{name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}}


# ---- the arithmetic of a fixed batch


@pytest.mark.parametrize("changes", [{}, dict(afw=False), dict(amw=False), dict(feature_target="gated", feature_reduction="mean"),
                                     dict(modalities="at")])
@pytest.mark.parametrize("preset", ["published", "released"])
def test_filler_changes_nothing(preset, changes):
    """Loss, ratios and every gradient, in float64."""
    model = model_of(preset, **changes)
    fixed = fixed_of(batch_of(LENGTHS[0]), model)
    for i, lengths in enumerate([LENGTHS[2], LENGTHS[0]]):      # the second into the place of a larger one
        batch = batch_of(lengths, seed=i)
        if model.config.padding == "attended":
            fixed = fixed_of(batch, model)
        found, expected = outcome(model, fixed.fill_(batch)), outcome(model, batch)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


@NATIVE
@pytest.mark.parametrize("preset", ["published", "released"])
def test_filler_costs_no_accuracy(preset):
    """float32 on the native ops: at most twice the error of the unpadded step plus 32 roundings of the largest element."""
    model, batch = model_of(preset, torch.float32, "auto"), batch_of(LENGTHS[0], torch.float32)
    batch64 = batch.to(dtype=torch.float64)
    exact_model = model_of(preset)
    exact_model.load_state_dict({name: v.double() for name, v in model.state_dict().items()})
    exact, usual = outcome(exact_model, batch64), outcome(model, batch)
    for name, got in outcome(model, fixed_of(batch, model).fill_(batch)).items():
        e = exact[name]
        assert (got - e).abs().max() <= 2 * (usual[name] - e).abs().max() + 32 * 2.0 ** -24 * e.abs().max(), name


@NATIVE
@pytest.mark.parametrize("preset", ["published", "released"])
def test_masks_of_real_rows_do_not_depend_on_filler(preset):
    """The counter-based masks go by row: with dropout, too, a seed gives the unpadded step."""
    model, batch = model_of(preset, torch.float32, "auto", dropout=0.4), batch_of(LENGTHS[0], torch.float32)
    results = []
    for data in (batch, fixed_of(batch, model).fill_(batch)):
        torch.manual_seed(3)
        results.append(outcome(model, data))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


def test_attention_with_offsets_on_the_device():
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(27, 36, generator=g, dtype=torch.float64, requires_grad=True)
    lengths = [7, 0, 13, 1, 6, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    grad = torch.randn(27, 12, generator=g, dtype=torch.float64)
    results = []
    for form in (lengths, DialogueOffsets(offsets, 16), DialogueOffsets(offsets, 13)):
        out = dialogue_attention(qkv, form, 3, backend="torch")
        results.append((out, *torch.autograd.grad(out, qkv, grad)))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=NATIVE)])
def test_loss_over_some_rows(reduction, backend):
    g = torch.Generator().manual_seed(0)
    x = [torch.cat((torch.randn(9, d, generator=g, dtype=torch.float64), torch.zeros(4, d, dtype=torch.float64))).requires_grad_() for d in (5, 8)]
    target, weight, bias = ([torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
                            for shapes in (((13, 5), (13, 8)), ((5, 5), (8, 8)), ((5,), (8,))))
    leaves = [*x, *target, *weight, *bias]
    loss = attention_mapping(x, target, weight, bias, reduction=reduction, rows=torch.tensor(9), backend=backend)
    expected = attention_mapping([t[:9] for t in x], [t[:9] for t in target], weight, bias, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("score_from", ["cosine", "linear"])
def test_scores_of_rows_with_labels(score_from):
    g = torch.Generator().manual_seed(0)
    hidden, weight = [torch.randn(9, 4, generator=g) for _ in range(2)], torch.randn(3, 8, generator=g)
    labels = torch.tensor([0, 1, -100, 2, 2, -100, 0, 1, -100])
    real = labels >= 0
    found = cosine_fusion(hidden, weight, None, labels, score_from=score_from)[2]
    torch.testing.assert_close(found, cosine_fusion([h[real] for h in hidden], weight, None, labels[real], score_from=score_from)[2])


# ---- steps


def trajectory(mode, preset="published", dtype=torch.float64, backend="torch", steps=7, device="cpu", **changes):
    """Results of some steps over batches of all sizes, and the parameters at the end. Learning rate and modulation change on the way."""
    model = model_of(preset, dtype, backend, device, learning_rate=1e-3, **changes)
    optimizer = BalancedAdam(model)
    step = GraphedStep(model, optimizer, mode=mode)
    torch.manual_seed(5)
    results = []
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + i // 3)
        results.append(step(batch_of(LENGTHS[i % len(LENGTHS)], dtype, i, device), modulate=i >= 2))
    return step, results, [p.detach() for p in model.parameters()]


def assert_same(first, second, rtol, atol):
    for a, b in zip(first[1], second[1], strict=True):
        for name in ("loss", "feature_loss", "norm"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=atol)
        for name in ("ratio", "coefficient"):
            assert list(getattr(a, name)) == list(getattr(b, name))
            for x, y in zip(getattr(a, name).values(), getattr(b, name).values()):
                torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
    for p, q in zip(first[2], second[2]):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


@pytest.mark.parametrize("preset", ["published", "released"])
def test_steps_in_buckets_are_ordinary_steps(preset):
    eager, padded = trajectory("eager", preset), trajectory("padded", preset)
    assert_same(eager, padded, rtol=1e-7, atol=1e-9)
    assert not eager[0]._captured and len(padded[0]._captured) >= 4
    coefficients = [list(r.coefficient.values()) for r in eager[1]]
    assert all(k == 1 for k in sum(coefficients[:2], [])) and any(k < 1 for k in sum(coefficients[2:], []))


def test_the_result_outlives_the_next_step():
    _, results, _ = trajectory("padded")
    assert len({r.loss.item() for r in results}) == len(results)


@NATIVE
@pytest.mark.parametrize("changes", [dict(dropout=0.4), dict(noise="parameter")])
def test_every_step_draws_anew(changes):
    ends = []
    for seed in (1, 1, 2):
        model = model_of("published", torch.float32, "auto", **changes)
        step = GraphedStep(model, BalancedAdam(model, lr=0.0 if "dropout" in changes else 1e-3), mode="padded")
        torch.manual_seed(seed)
        batch = batch_of(LENGTHS[0], torch.float32)
        ends.append([step(batch).loss.item() for _ in range(3)])
    assert ends[0] == ends[1] and len({*ends[0], *ends[2]}) > 3


def test_buckets():
    model = model_of("published")
    step = GraphedStep(model, BalancedAdam(model), mode="padded")

    def bucket(lengths, step=step):
        found = step._bucket(batch_of(lengths), True)
        return found and (found.rows, found.dialogues, found.longest)

    assert bucket([16]) == (16, 2, 16) and bucket([17]) == (32, 2, 32) and bucket([50] * 10) == (512, 11, 64)
    assert bucket([3] * 43) == (144, 44, 16) and bucket([1]) == (16, 2, 16)
    generator = random.Random(0)
    for _ in range(40):                                         # there is always room for what is left over
        lengths = [generator.choice((1, 2, 9, 40)) for _ in range(generator.randint(1, 30))]
        rows, dialogues, longest = bucket(lengths)
        fixed = FixedBatch.empty(batch_of(lengths), rows, dialogues, longest).fill_(batch_of(lengths))
        assert fixed.offsets[-1] == rows <= max(16, 1.125 * sum(lengths) + 16) and fixed.offsets.diff().max() <= longest
        assert (fixed.labels >= 0).sum() == sum(lengths) == fixed.rows
    own = GraphedStep(model, BalancedAdam(model), mode="padded", buckets=[20, 100])
    assert bucket([5, 5], own) == (20, 4, 16) and bucket([21], own) == (100, 4, 32) and bucket([101], own) is None
    attended = GraphedStep(model_of("released"), None, mode="padded")
    assert bucket([5, 9], attended) == (18, 2, 9)


def test_no_more_buckets_than_asked_for():
    model = model_of("published")
    step = GraphedStep(model, BalancedAdam(model), mode="padded", max_graphs=2)
    for lengths in LENGTHS:
        step(batch_of(lengths))
    assert len(step._captured) == 2


def test_reasons():
    model = model_of("published")
    step = GraphedStep(model, BalancedAdam(model))
    assert step.why_not() == "the model is on cpu"
    assert GraphedStep(model, BalancedAdam(model), mode="padded").why_not() == "mode is 'padded'"
    with pytest.raises(RuntimeError, match="no CUDA graphs: the model is on cpu"):
        GraphedStep(model, BalancedAdam(model), mode="graph")
    with pytest.raises(ValueError, match="mode: expected"):
        GraphedStep(model, BalancedAdam(model), mode="fast")
    with pytest.raises(ValueError, match="buckets: expected ascending"):
        GraphedStep(model, BalancedAdam(model), buckets=[4, 4])
    with pytest.raises(ValueError, match="batch: expected labels"):
        step(DialogueBatch(batch_of([3]).features, torch.tensor([0, 3])))
    lstm = model_of("published", encoder="lstm")
    lstm_step = GraphedStep(lstm, BalancedAdam(lstm), mode="padded")
    assert "biLSTM" in lstm_step._why_not_fixed() and lstm_step(batch_of([3, 2])).loss.isfinite() and not lstm_step._captured
    with pytest.raises(ValueError, match="biLSTM"):
        lstm(fixed_of(batch_of([3]), lstm).fill_(batch_of([3])))
    assert "not a BalancedAdam" in GraphedStep(model, torch.optim.SGD(model.parameters(), lr=1.0))._why_not_fixed()
    l1 = model_of("published", clip_norm_type=1.0)
    assert "the norm of clipping is L1" in GraphedStep(l1, BalancedAdam(l1))._why_not_fixed()


def test_a_batch_that_does_not_fit_is_refused():
    batch = batch_of([4, 3])
    for sizes, words in (((6, 9, 8), "at most 6 utterances"), ((32, 2, 16), "in at most 2 dialogues"), ((16, 9, 3), "at most 3 utterances")):
        with pytest.raises(ValueError, match=words):
            FixedBatch.empty(batch, *sizes).fill_(batch)
    with pytest.raises(ValueError, match="expected 3 dialogues"):
        FixedBatch.empty(batch, 12, 3, 4, attended=True).fill_(batch)
    with pytest.raises(ValueError, match="labels"):
        FixedBatch.empty(batch, 16, 3, 16).fill_(DialogueBatch(batch.features, batch.offsets))


def test_a_fixed_batch_holds_nothing_of_what_was_there():
    """Whatever filled it before, a batch that failed half-way among it."""
    model = model_of("published")
    fixed = fixed_of(batch_of(LENGTHS[0]), model)

    def content(batch):
        return [*batch.features.values(), batch.labels, batch.offsets, batch.rows]

    for lengths in ([7, 3, 13, 1], [2], [20, 1, 5, 9], [20, 1, 5, 9], [16, 16, 3, 1, 1], "fails", [1, 1], [2, 1], [9], [8]):
        if lengths == "fails":
            batch = batch_of([24, 16])
            for x in batch.features.values():
                x.fill_(float("nan"))
            object.__setattr__(batch, "labels", torch.zeros(3, dtype=torch.int64))
            with pytest.raises(RuntimeError):
                fixed.fill_(batch)
            continue
        batch = batch_of(lengths)
        expected = fixed_of(batch, model).fill_(batch)
        assert all(map(torch.equal, content(fixed.fill_(batch)), content(expected))), lengths


# ---- captures, with graphs that only pretend


class PretendGraph:
    """Replays by running the step again."""

    def replay(self):
        self.result.copy_(self.step._step(self.batch, self.modulate))


@pytest.fixture
def pretend(monkeypatch):
    """CUDA's graphs on a CPU: what is captured does not happen, and a replay does."""
    captures = []

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        assert pool == "pool"
        captures.append(graph)
        step = captures.step
        with step._undone(torch.device("cpu")):
            yield
        captured = next(c for c in step._captured.values() if c.graph is graph)
        bucket = next(b for b, c in step._captured.items() if c is captured)
        graph.step, graph.batch, graph.modulate, graph.result = step, captured.batch, bucket.modulate, captured.result
        assert all(p.grad is None for p in step.model.parameters())

    class Captures(list):
        step: GraphedStep

    captures = Captures()
    side = type("Stream", (), {"wait_stream": lambda self, other: None})
    for name, value in dict(graph=capture, CUDAGraph=PretendGraph, graph_pool_handle=lambda: "pool", Stream=lambda device, priority=0: side(),
                            current_stream=lambda device: side(), stream=contextlib.nullcontext, device=contextlib.nullcontext).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(GraphedStep, "why_not", lambda self: self._failed or self._why_not_fixed())
    return captures


@NATIVE
@pytest.mark.parametrize("changes", [{}, dict(dropout=0.4), dict(noise="gradient", preset="released")])
def test_captures_do_not_train(pretend, monkeypatch, changes):
    """The whole way of a graphed step: as many updates as steps, and the seeds of the padded ones."""
    original = GraphedStep.__init__
    monkeypatch.setattr(GraphedStep, "__init__", lambda self, *args, **options: (original(self, *args, **options),
                                                                                 setattr(pretend, "step", self))[0])
    settings = dict(dtype=torch.float32, backend="auto", steps=12, **changes)
    graphed, padded = trajectory("graph", **settings), trajectory("padded", **settings)
    assert_same(graphed, padded, rtol=0, atol=0)
    assert len(pretend) == len(graphed[0]._captured) >= 4
    assert all(s["step"] == 12 for s in graphed[0].optimizer.state.values())


@NATIVE
def test_a_loaded_state_is_captured_anew(pretend):
    model = model_of("published", torch.float32, "auto")
    optimizer = BalancedAdam(model)
    step = pretend.step = GraphedStep(model, optimizer)
    batch = batch_of(LENGTHS[0], torch.float32)
    for _ in range(3):
        step(batch)
    assert len(pretend) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    step(batch)
    assert len(pretend) == 2 and all(s["step"] == 4 for s in optimizer.state.values())


@NATIVE
@pytest.mark.parametrize("failures, late, branches", [(0, True, True), (1, False, True), (2, False, False)])
def test_a_capture_is_tried_with_fewer_branches(pretend, monkeypatch, failures, late, branches):
    """First without those that end behind backward, then without any; each time with memory of its own."""
    pools, capture = [], torch.cuda.graph

    def fails_at_first(graph, pool, stream):
        pools.append(pool)
        if len(pools) <= failures:
            raise RuntimeError("not this way")
        return capture(graph, pool="pool", stream=stream)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "graph", fails_at_first)
    model = model_of("published", torch.float32, "auto")
    step = pretend.step = GraphedStep(model, BalancedAdam(model))
    assert step(batch_of(LENGTHS[0], torch.float32)).loss.isfinite() and step.why_not() is None and not model.side_by_side
    assert (step._late, step._branches) == (late, branches) and len({*pools}) == failures + 1 == len(pools)
    assert all(s["step"] == 1 for s in step.optimizer.state.values())


@NATIVE
def test_a_failed_capture_is_told_once(pretend, monkeypatch):
    def fail(graph, pool, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    model = model_of("published", torch.float32, "auto")
    step = GraphedStep(model, BalancedAdam(model))
    batch = batch_of(LENGTHS[0], torch.float32)
    assert step(batch).loss.isfinite() and not model.side_by_side and all(s["step"] == 1 for s in step.optimizer.state.values())
    assert step.why_not() == f"a capture failed: operation not permitted when stream is capturing ({HELD_GRAPH})"
    step(batch)
    assert all(s["step"] == 2 for s in step.optimizer.state.values())
    with pytest.raises(RuntimeError, match="not permitted") as failed:
        GraphedStep(model, BalancedAdam(model), mode="graph")(batch)
    assert failed.value.__notes__ == [HELD_GRAPH]


# ---- launches


class Launches(TorchDispatchMode):
    """Counts operators that compute something: neither views nor allocations. A native op is one, however many launches it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not views and not function._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")):
            self.found[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


@NATIVE
@pytest.mark.parametrize("form, most", [("packed", 354), ("fixed", 398)])
def test_a_step_launches_no_more_than_it_did(form, most):
    """Operators of a step with dropout, modulation and noise (two layers of everything, three modalities), on the native CPU ops, whose
    places the GPU's take. Fewer are welcome: then the limit here goes down."""
    model = model_of("published", torch.float32, "auto", dropout=0.4, noise="parameter")
    step = GraphedStep(model, BalancedAdam(model))
    batch = batch_of(LENGTHS[0], torch.float32)
    data = batch if form == "packed" else fixed_of(batch, model).fill_(batch)
    step._step(data, True)
    with Launches() as launches:
        step._step(data, True)
    counts = launches.found
    optimizer = {name: count for name, count in counts.items() if "balanced_adam" in name}
    assert optimizer == {f"ada2i_fast::balanced_adam_{part}": 1 for part in ("measure", "settings", "update")}
    assert counts.total() <= most, (counts.total(), counts.most_common())


def test_batches_on_a_cpu_stay_as_they_are():
    host = [batch_of(lengths) for lengths in LENGTHS]
    assert all(a is b for a, b in zip(host, ahead(iter(host), torch.device("cpu")), strict=True))


@pytest.mark.parametrize("mode, in_a_graph", [("padded", True), ("eager", False)])
def test_backends_know_of_graphs(monkeypatch, mode, in_a_graph):
    """In a graph kernels count, and eager the host: another backend may be the best."""
    choose, found = backends.choose, []
    monkeypatch.setattr(backends, "choose", lambda op, *given, **named: found.append((op, backends._graphs.wanted)) or choose(op, *given, **named))
    model = model_of("published", torch.float32, "torch")
    GraphedStep(model, BalancedAdam(model, lr=1e-3), mode=mode)(batch_of(LENGTHS[0], torch.float32))
    assert {wanted for op, wanted in found if op == "tensor_ring"} == {in_a_graph} and not backends._graphs.wanted


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["published", "released"])
def test_graphs_on_a_gpu(preset):
    """Losses of replayed steps are as near to float64 as those of ordinary steps in float32, twice over, and as many steps were taken."""
    settings = dict(preset=preset, dtype=torch.float32, backend="auto", steps=12, device="cuda")
    exact = trajectory("eager", preset, steps=12)
    graphed, usual = trajectory("graph", **settings), trajectory("eager", **settings)
    assert graphed[0].why_not() is None and graphed[0]._captured and all(c.graph is not None for c in graphed[0]._captured.values())
    assert all(s["step"] == 12 for s in graphed[0].optimizer.state.values())
    losses = [torch.stack([r.loss for r in results]).double().cpu() for _, results, _ in (exact, usual, graphed)]
    assert (losses[2] - losses[0]).abs().max() <= 2 * (losses[1] - losses[0]).abs().max() + 32 * 2.0 ** -24 * losses[0].abs().max()
    for e, u, got in zip(exact[2], usual[2], graphed[2]):
        e = e.cuda()
        assert (got - e).abs().max() <= 2 * (u - e).abs().max() + 32 * 2.0 ** -24 * e.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [dict(dropout=0.4), dict(noise="parameter"), dict(dropout=0.4, context="bfloat16")])
def test_every_replay_draws_anew(changes):
    context = (lambda: torch.autocast("cuda", torch.bfloat16)) if changes.pop("context", None) else contextlib.nullcontext
    ends = []
    for seed in (1, 1, 2):
        model = model_of("published", torch.float32, "auto", "cuda", **changes)
        step = GraphedStep(model, BalancedAdam(model, lr=0.0 if "dropout" in changes else 1e-3), mode="graph", context=context)
        torch.manual_seed(seed)
        batch = batch_of(LENGTHS[0], torch.float32, device="cuda")
        ends.append([step(batch).loss.item() for _ in range(4)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5) and len({*ends[0], *ends[2]}) > 4


def test_what_was_made_beside_must_have_arrived():
    """Gradients that were copied, added to or dropped have been read before the branches ended."""
    def branches(*made):
        found = Branches()
        found._take(None, [], [t.untyped_storage().data_ptr() for t in made])
        return found

    a, b, c = (torch.ones(4) for _ in range(3))
    assert branches(a, b).all_in([b[1:3], None, a, c]) and branches().all_in([])
    assert not branches(a, b).all_in([a, b.clone()])
    assert not branches(a, a).all_in([a])               # freed in between, and given away again


@pytest.mark.gpu
@pytest.mark.parametrize("context", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["late", "tied", "hooked", "frozen"])
def test_gradients_end_behind_backward(case, context):
    """Steps as graphs are ordinary steps where gradients of parameters are branches that end behind backward, and where they cannot be."""
    def train(mode):
        model = model_of("published", torch.float32, "auto", "cuda", dropout=0.0)
        first, second = (model.net.encoder[m].transformer_encoder.layers for m in model.config.modalities[:2])
        seen = []
        if case == "tied":
            first[1].linear1, first[1].norm1 = first[0].linear1, first[0].norm1
        elif case == "hooked":
            first[1].linear1.weight.register_hook(lambda g: seen.append(g.square().sum()))
        elif case == "frozen":
            second[0].norm2.bias.requires_grad_(False)
        autocast = (lambda: torch.autocast("cuda", context)) if context else contextlib.nullcontext
        step = GraphedStep(model, BalancedAdam(model, lr=1e-3), mode=mode, context=autocast)
        losses = torch.stack([step(batch_of(LENGTHS[i % 3], torch.float32, i, "cuda")).loss for i in range(6)])
        return step, losses, seen

    (step, losses, seen), (_, expected, _) = train("graph"), train("padded")
    assert step._late == (case in ("late", "hooked"))
    assert (losses - expected).abs().max() <= (2e-2 if context else 1e-4) * expected.abs().max()
    if case == "hooked":
        assert seen and seen[-1].isfinite()


@pytest.mark.gpu
def test_encoders_side_by_side():
    """Streams change nothing but the time: outcomes are those of one stream."""
    model, batch = model_of("published", torch.float32, "auto", "cuda"), batch_of(LENGTHS[2], torch.float32, device="cuda")
    expected = outcome(model, batch)
    model.side_by_side = True
    for _ in range(5):
        for name, value in outcome(model, batch).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6 * expected[name].abs().max().item(), msg=name)


@pytest.mark.gpu
def test_batches_arrive_ahead():
    host = [batch_of(lengths, torch.float32, i) for i, lengths in enumerate(LENGTHS * 4)]
    for before, after in zip(host, ahead(iter(host), torch.device("cuda")), strict=True):
        assert all(torch.equal(after.features[m].cpu(), x) for m, x in before.features.items()) and torch.equal(after.labels.cpu(), before.labels)
