"""Inputs and the yardstick for the ops of AFW: one layer of feature weighting, through any backend."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator

import torch
from hypothesis import settings, strategies as st
from torch import Tensor

from ada2i_fast import node
from ada2i_fast.ops import attention_mapping, keep_mask, tensor_ring
from ada2i_fast.reference import attention_mapping as textbook_mapping, tensor_ring as textbook_ring
from ada2i_fast.reference.attention_mapping import AttentionMapping
from ada2i_fast.reference.tensor_ring import TensorRing

settings.register_profile("ops", deadline=None, derandomize=True, max_examples=25, print_blob=True)

FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
PARAMETERS = ("x", "proj_weight", "proj_bias", "map_weight", "map_bias")


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    widths: tuple[int, ...]
    rank: int
    ring: tuple[tuple[int, ...], ...] = ()
    scale: float = 0.4
    beta: float = 0.3
    dropout: float = 0.0
    gated_target: bool = False
    reduction: str = "sum"
    seed: int = 0

    @property
    def rings(self) -> list[list[int]]:
        m = len(self.widths)
        return [list(r) for r in self.ring] or [[(j + s) % m for s in range(1, m)] for j in range(m)]

    @property
    def options(self) -> dict:
        return dict(ring=self.rings, scale=self.scale, beta=self.beta, dropout=self.dropout, gated_target=self.gated_target,
                    seed=torch.tensor([2 ** 40 + 7 * self.seed + 1]) if self.dropout else None)


@st.composite
def cases(draw, most_rows: int = 40) -> Case:
    m = draw(st.integers(1, 4))
    # Modest numbers, and those around a vector, a tile and a panel.
    width = st.one_of(st.integers(1, 40), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 63, 64, 65]))
    others = [draw(st.permutations([l for l in range(m) if l != j])) for j in range(m)]
    return Case(
        lengths=tuple(draw(st.lists(st.one_of(st.integers(0, 3), st.integers(0, most_rows // 2)), min_size=0, max_size=4))),
        widths=tuple(draw(st.lists(width, min_size=m, max_size=m))), rank=draw(st.one_of(st.integers(1, 12), st.integers(1, 32))),
        ring=tuple(map(tuple, others)), scale=draw(st.sampled_from([1.0, 0.37])), beta=draw(st.sampled_from([0.0, 0.012, 0.55])),
        dropout=draw(st.sampled_from([0.0, 0.3, 0.5])), gated_target=draw(st.booleans()),
        reduction=draw(st.sampled_from(["sum", "mean"])), seed=draw(st.integers(0, 999)))


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, list[Tensor]]:
    """Numbers of a size that keeps all terms of the result alike, rounded to `dtype` and held in it."""
    g = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    rows, r = sum(case.lengths), case.rank
    return {
        "x": [draw(rows, d) for d in case.widths],
        "proj_weight": [draw(4 * r, d, size=d ** -0.5) for d in case.widths],
        "proj_bias": [draw(4 * r, size=0.5) for _ in case.widths],
        "map_weight": [draw(d, r * r, size=1 / r) for d in case.widths],
        "map_bias": [draw(d, size=0.3) for d in case.widths],
        "phi": [draw(d, d, size=d ** -0.5) for d in case.widths],
        "phi_bias": [draw(d, size=0.3) for d in case.widths],
        "grad_out": [draw(rows, d) for d in case.widths],
        "grad_target": [draw(rows, d) for d in case.widths],
    }


def offsets(case: Case) -> Tensor:
    return torch.tensor([0, *case.lengths]).cumsum(0)


def leaves(given: dict[str, list[Tensor]], names=PARAMETERS, dtype: torch.dtype | None = None) -> dict[str, list[Tensor]]:
    return {name: [t.detach().to(dtype or t.dtype).requires_grad_(t.is_floating_point()) for t in given[name]] for name in names}


def run_ring(case: Case, given: dict[str, list[Tensor]], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All outputs and gradients of tensor_ring."""
    at = leaves(given, dtype=dtype)
    out, target = tensor_ring(at["x"], offsets(case), *(at[n] for n in PARAMETERS[1:]), backend=backend, **case.options)
    grads = [t.to(out[0].dtype) for t in given["grad_out"] + given["grad_target"]]
    flat = [t for name in PARAMETERS for t in at[name]]
    found = torch.autograd.grad(out + target, flat, grads)
    names = [f"grad {name}[{j}]" for name in PARAMETERS for j in range(len(out))]
    return named("out", out) | named("target", target) | dict(zip(names, found))


def run_mapping(case: Case, given: dict[str, list[Tensor]], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The loss, times 1000 so that its gradients are no rounding errors, and its gradients."""
    names = ("x", "grad_target", "phi", "phi_bias")
    at = leaves(given, names, dtype)
    loss = attention_mapping(at["x"], at["grad_target"], at["phi"], at["phi_bias"], reduction=case.reduction, backend=backend)
    found = torch.autograd.grad(1000 * loss, [t for name in names for t in at[name]])
    return {"loss": loss} | dict(zip([f"grad {n}[{j}]" for n in names for j in range(len(case.widths))], found))


def named(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{j}]": t for j, t in enumerate(tensors)}


def assert_close(actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype,
                 terms: dict[str, float] | None = None) -> None:
    """flash-attention's rule: at most twice the error of plain torch in the same dtype, plus a floor of a few roundings.

    Errors are taken in the norm and in the worst element; both relative to the tensor's largest element, or to the terms of a
    difference that can vanish altogether.
    """
    for name, e in exact.items():
        a, p = actual[name].detach().double(), plain[name].detach().double()
        assert a.shape == e.shape and torch.isfinite(a).all(), name
        if not e.numel():
            continue
        top = e.abs().max().clamp_min((terms or {}).get(name, 1e-300))
        for kind, of in (("largest", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
            limit = 2 * of(p - e) + FLOOR[dtype] * top
            assert of(a - e) <= limit, f"{name}: {kind} error {of(a - e) / top:.2e}, plain torch {of(p - e) / top:.2e}"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Both in float64, where two ways of computing one formula at these sizes (sums of 10^4 terms at most, a dozen in a row) agree to 1e-11 of
    the largest element: 10^4 roundings of 1e-16, and ten times that for cancellation."""
    for name, e in expected.items():
        torch.testing.assert_close(actual[name], e, rtol=0, atol=1e-11 * max(1.0, e.abs().max().item() if e.numel() else 0.0), msg=name)


def textbook(case: Case, given: dict[str, list[Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What run_ring and run_mapping return, from the padded textbook in float64."""
    m, r, steps = len(case.widths), case.rank, max(case.lengths)
    lengths = torch.tensor(case.lengths)
    mask = torch.arange(steps)[None] < lengths[:, None]
    ring, phi = TensorRing(case.widths, r).double(), AttentionMapping(case.widths).double()
    with torch.no_grad():
        for j in range(m):
            for i, name in enumerate(("trans_q1", "trans_q2", "trans_k1", "trans_k2")):
                lin = getattr(ring, name)[j].lin
                lin.weight.copy_(given["proj_weight"][j][i * r:(i + 1) * r])
                lin.bias.copy_(given["proj_bias"][j][i * r:(i + 1) * r])
            ring.lin_att[j].lin.weight.copy_(given["map_weight"][j])
            ring.lin_att[j].lin.bias.copy_(given["map_bias"][j])
            phi.fc[j].weight.copy_(given["phi"][j])
            phi.fc[j].bias.copy_(given["phi_bias"][j])

    def pad(t: Tensor) -> Tensor:
        return torch.zeros(len(case.lengths), steps, t.shape[1], dtype=torch.float64).masked_scatter(mask[..., None], t.double())

    x = [t.detach().double().requires_grad_() for t in given["x"]]
    attention, gated = textbook_ring(ring, [pad(t) for t in x], ring=case.rings, scale=case.scale, beta=case.beta, mask=mask)
    out = [t[mask] for t in gated]
    target = out if case.gated_target else [t[mask] for t in attention]
    if case.dropout:
        out = [t * keep_mask(case.options["seed"], j, *t.shape, case.dropout) / (1 - case.dropout) for j, t in enumerate(out)]
    parts = [[getattr(ring, name)[j].lin for name in ("trans_q1", "trans_q2", "trans_k1", "trans_k2")] for j in range(m)]
    weights = [p.weight for ps in parts for p in ps] + [p.bias for ps in parts for p in ps]
    weights += [ring.lin_att[j].lin.weight for j in range(m)] + [ring.lin_att[j].lin.bias for j in range(m)]
    grads = [t.double() for t in given["grad_out"] + given["grad_target"]]
    found = torch.autograd.grad(out + target, x + weights, grads)
    stacked = [torch.cat(found[m + 4 * j:m + 4 * j + 4]) for j in range(2 * m)]
    names = [f"grad {name}[{j}]" for name in PARAMETERS for j in range(m)]
    first = named("out", out) | named("target", target) | dict(zip(names, [*found[:m], *stacked, *found[9 * m:]]))

    x = [t.detach().double().requires_grad_() for t in given["x"]]
    target = [t.detach().double().requires_grad_() for t in given["grad_target"]]
    loss = textbook_mapping(phi, [pad(t) for t in x], [pad(t) for t in target], reduction=case.reduction, mask=mask)
    wanted = x + target + [fc.weight for fc in phi.fc] + [fc.bias for fc in phi.fc]
    found = torch.autograd.grad(1000 * loss, wanted)
    names = [f"grad {n}[{j}]" for n in ("x", "grad_target", "phi", "phi_bias") for j in range(m)]
    return first, {"loss": loss} | dict(zip(names, found))


def assert_same_bits_with_threads(run, counts=(1, 2, 2, 3, 4)) -> None:
    """run() -> tensors, in a list or a dictionary: the same bits with each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found = run()
            results.append(list(found.values()) if isinstance(found, dict) else found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def poisoned(monkeypatch) -> None:
    """torch.empty and its kin return NaN (-128 for signs, and NaN again where bytes hold numbers): whoever leaves an element unwritten is
    found out."""

    def fill(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else {torch.int8: -128, torch.uint8: 255}[t.dtype])
        return made

    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))


def guarded(t: Tensor, margin: int = 67) -> tuple[Tensor, Tensor]:
    """A misaligned copy of t inside a buffer of NaN, and the buffer."""
    buffer = torch.full((t.numel() + 2 * margin,), float("nan"), dtype=t.dtype)
    inside = buffer[margin:margin + t.numel()].view(t.shape)
    inside.copy_(t)
    return inside, buffer


@contextmanager
def by_way_of(way: str, name: str, monkeypatch) -> Iterator[None]:
    """way: "python", for which `node` declines all calls of that name; or "node", which has to take at least one of them."""
    one_call, served = getattr(node, name), []

    def counted(*arguments):
        found = one_call(*arguments) if way == "node" else None
        served.append(found is not None)
        return found

    monkeypatch.setattr(node, name, counted)
    yield
    assert any(served) == (way == "node")
