"""Runs the Triton kernels under the interpreter, or on a GPU, in a process of their own, and reports every comparison.

    python tests/kernels/triton_cases.py [--device cuda] [--cases quick|slow|all] [--only NAME] [--kernels FOLDER]

One JSON line per case: {"case", "seconds", "checks": [[what, error, allowed], ..]}. --kernels takes the kernels from another
folder than the installed one (`mutations.py` breaks a copy).

The rule: the error against float64 is at most twice that of plain PyTorch in the same dtype, plus a floor of a few units in the
last place of the largest element; a result that plain PyTorch gets right by luck needs the floor. The interpreter truncates
where the device rounds when float32 is stored as bfloat16, one unit more there.

Inputs lie inside buffers full of NaN, and so do the results, which start as NaN themselves: a read outside its tensor shows
as NaN in a result, a write outside as a number in the padding, and a missing write as NaN.
"""

from __future__ import annotations

import os
import sys

if "cuda" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"     # read when triton is imported

import argparse
import importlib.util
import json
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
import triton.language as tl

import encoder_cases
import interpreter
from runs import claim

PAD = 64
EPS = {torch.float32: 2.0 ** -23, torch.float16: 2.0 ** -10, torch.bfloat16: 2.0 ** -7}
FLOOR = {torch.float32: 4, torch.float16: 1, torch.bfloat16: 2}      # units in the last place

# name: (dtype, widths, rank, lengths, settings). ring "list": the others in list order; "ring": once around.
# parameters: their dtype, where not that of x; the yardsticks take them rounded to that of x. into: gradients of x from elsewhere.
# beside: the gradients of the parameters apart from the rest, as in a CUDA graph.
RING = {
    "three-modalities": ("float32", [14, 14, 14], 5, [3, 0, 20, 1, 7], dict(gated=True, dropout=0.5, ring="list", into=True)),
    "one-modality-rank-1": ("float32", [7], 1, [3, 4], dict()),
    "two-widths": ("float32", [40, 7], 11, [17, 1, 0, 0, 30], dict(dropout=0.3)),
    "four-modalities": ("float32", [14, 7, 14, 7], 6, [5, 2], dict(dropout=0.1)),
    "beside": ("float32", [70, 14, 70], 10, [40, 0, 1, 7], dict(dropout=0.5, into=True, beside=True)),
    "several-column-blocks": ("float32", [70, 70], 16, [40], dict(gated=True, dropout=0.5)),
    "no-target": ("float32", [14, 14, 14], 3, [9, 8], dict(gated=True, dropout=0.5, target=False)),
    "into-no-target": ("float32", [14, 7, 14], 3, [9, 8], dict(target=False, into=True)),
    "rank-32": ("float32", [7, 7], 32, [3, 2], dict(gated=True)),
    "rank-17": ("float32", [7, 7, 7], 17, [4, 1], dict()),
    "wide-tiles": ("float32", [70, 70, 70], 10, [36, 3], dict(gated=True, dropout=0.5, ring="list", tf32=True)),
    "parts": ("float32", [7, 7, 7], 3, [0, 150, 3], dict(dropout=0.5, parts=2)),
    "float16": ("float16", [40, 40, 40], 10, [3, 0, 20, 1], dict(gated=True, dropout=0.5, ring="list")),
    "float16-rank-3": ("float16", [14, 14], 3, [2, 3], dict()),
    "bfloat16": ("bfloat16", [40, 40, 40], 11, [3, 0, 20, 1], dict(dropout=0.5)),
    "bfloat16-rank-6": ("bfloat16", [14], 6, [2, 3], dict(gated=True)),
    "bfloat16-mixed": ("bfloat16", [40, 14], 6, [3, 0, 20, 1], dict(dropout=0.5, parameters="float32", into=True)),
    "float16-mixed": ("float16", [14, 14, 14], 3, [2, 3], dict(gated=True, parameters="float32")),
}
# Dense products through the library, as at many rows; in chunks of 64 rows where "chunks".
LIBRARY_RING = {
    "library-three-modalities": ("float32", [14, 14, 14], 5, [3, 0, 20, 1, 7], dict(gated=True, dropout=0.5, ring="list", into=True)),
    "library-one-modality": ("float32", [7], 1, [3, 4], dict()),
    "library-two-widths": ("float32", [40, 7], 11, [17, 1, 0, 0, 30], dict(dropout=0.3)),
    "library-four-modalities": ("float32", [14, 70, 14, 7], 6, [5, 2], dict(dropout=0.1)),
    "library-one-chunk": ("float32", [70, 14, 70], 10, [60, 0, 70, 9], dict(gated=True, dropout=0.5, ring="list")),
    "library-chunks": ("float32", [70, 14, 70], 10, [60, 0, 70, 9], dict(gated=True, dropout=0.5, ring="list", chunks=True)),
    "library-chunks-into": ("float32", [14, 14], 3, [60, 0, 33], dict(target=False, chunks=True, into=True)),
    "library-tf32": ("float32", [70, 70, 70], 10, [36, 3], dict(dropout=0.5, tf32=True)),
    "library-parts": ("float32", [7, 7, 7], 3, [0, 150, 3], dict(dropout=0.5, parts=2, chunks=True)),
    "library-gate": ("float32", [14, 40, 14], 5, [3, 0, 20, 1, 7], dict(gated=True, dropout=0.5, ring="list", into=True, gate=True)),
    "library-gate-chunks": ("float32", [14, 14], 3, [60, 0, 33], dict(chunks=True, into=True, gate=True)),
    "library-gate-bfloat16": ("bfloat16", [14, 40], 5, [3, 0, 20], dict(dropout=0.5, into=True, gate=True)),
    "library-no-target": ("float32", [14, 14, 14], 3, [9, 8], dict(gated=True, dropout=0.5, target=False)),
    "library-no-dialogue-rows": ("float32", [7, 7], 17, [0, 2, 0], dict(gated=True)),
    "library-rank-32": ("float32", [7, 7], 32, [3, 2], dict()),
    "library-float16": ("float16", [40, 40, 40], 10, [3, 0, 20, 1], dict(gated=True, dropout=0.5, ring="list")),
    "library-bfloat16": ("bfloat16", [40, 40, 40], 11, [3, 0, 20, 1], dict(dropout=0.5)),
    "library-bfloat16-rank-6": ("bfloat16", [14], 6, [2, 3], dict(gated=True)),
    "library-bfloat16-mixed": ("bfloat16", [40, 14, 40], 6, [64, 0, 20, 1],
                               dict(gated=True, dropout=0.5, parameters="float32", chunks=True, into=True)),
    "library-bfloat16-chunks": ("bfloat16", [14, 14], 3, [60, 0, 33], dict(chunks=True)),
    "library-float16-mixed": ("float16", [14, 14, 14], 3, [2, 3], dict(parameters="float32")),
}
SLOW_RING = {
    "many-dialogues": ("float32", [7, 7], 3, [n % 3 for n in range(150)], dict(gated=True)),
    # The two of 16 bits by turns: they differ in nothing but rounding.
    **{f"rank-{rank}-{dtype}": (dtype, [14, 40, 14], rank, [1, 0, 18, 5], dict(gated=rank % 2 == 0, dropout=0.5, ring="list"))
       for i, rank in enumerate((1, 3, 5, 6, 10, 11, 16, 17, 32)) for dtype in ("float32", ("float16", "bfloat16")[i % 2])},
}
# name: (dtype, widths, rows, reduction, settings)
MAPPING = {
    "mapping": ("float32", [14, 14, 14], 31, "sum", dict()),
    "mapping-two-widths": ("float32", [70, 9], 140, "mean", dict()),
    "mapping-one-row": ("float32", [40], 1, "sum", dict()),
    "mapping-beside": ("float32", [70, 9, 70], 140, "sum", dict(beside=True)),
    "mapping-float16": ("float16", [70, 9], 70, "sum", dict()),
    "mapping-bfloat16": ("bfloat16", [40, 40], 33, "mean", dict()),
    "mapping-bfloat16-mixed": ("bfloat16", [40, 9], 70, "mean", dict(parameters="float32")),
}
LIBRARY_MAPPING = {
    "library-mapping": ("float32", [14, 14, 14], 31, "sum", dict()),
    "library-mapping-two-widths": ("float32", [70, 9], 140, "mean", dict(chunks=True)),
    "library-mapping-one-row": ("float32", [40], 1, "sum", dict()),
    "library-mapping-large": ("float32", [14, 14], 31, "sum", dict(size=1e4)),
    "library-mapping-tf32": ("float32", [70, 9], 70, "sum", dict(tf32=True)),
    "library-mapping-float16": ("float16", [70, 9], 70, "sum", dict(chunks=True)),
    "library-mapping-bfloat16": ("bfloat16", [40, 40], 133, "mean", dict()),
    "library-mapping-bfloat16-mixed": ("bfloat16", [40, 9], 70, "mean", dict(parameters="float32", chunks=True)),
}

# name: (dtype, modalities, rows, width, classes, options), see fusion_case.
FUSION = {
    "fusion-published": ("float32", 3, 37, 21, 6, dict()),
    "fusion-released": ("float32", 3, 37, 70, 7, dict(cosine_norm="classes", scale=1.0, score_from="linear", bias=True)),
    "fusion-mixed": ("float32", 2, 40, 14, 4, dict(cosine_norm="features", score_from="linear", bias=True)),
    "fusion-classes-cosine": ("float32", 1, 5, 70, 2, dict(cosine_norm="classes")),
    "fusion-linear": ("float32", 3, 33, 70, 5, dict(amw=False, score_from="linear", bias=True)),
    "fusion-linear-cosine": ("float32", 2, 9, 7, 3, dict(amw=False)),
    "fusion-no-labels": ("float32", 4, 9, 21, 3, dict(labels=False)),
    "fusion-many-classes": ("float32", 2, 18, 14, 20, dict(bias=True)),
    "fusion-wide": ("float32", 2, 3, 300, 6, dict()),
    "fusion-splits": ("float32", 2, 300, 9, 3, dict(cosine_norm="classes", bias=True)),
    "fusion-many-rows": ("float32", 1, 2100, 2, 3, dict()),
    "fusion-one-row": ("float32", 3, 1, 14, 6, dict(scale=1.0)),
    "fusion-float16": ("float16", 3, 37, 40, 6, dict(bias=True)),
    "fusion-float16-released": ("float16", 3, 37, 40, 6, dict(cosine_norm="classes", scale=1.0, score_from="linear", bias=True)),
    "fusion-bfloat16": ("bfloat16", 3, 37, 40, 7, dict(cosine_norm="classes", bias=True)),
    "fusion-bfloat16-published": ("bfloat16", 2, 20, 70, 6, dict()),
}

# name: (dtype, rows, classes, inner units or 0 without a head, settings), see head_case.
HEAD = {
    "head": ("float32", 37, 6, 24, dict()),
    "head-none": ("float32", 37, 6, 0, dict(log_prob=True)),
    "head-one-row": ("float32", 1, 2, 3, dict(ignored=0)),
    "head-two-blocks": ("float32", 600, 7, 28, dict(extra=False)),
    "head-two-launches": ("float32", 1100, 20, 40, dict(log_prob=True)),
    "head-two-launches-none": ("float32", 2100, 9, 0, dict()),
    "head-splits": ("float32", 2500, 2, 5, dict(log_prob=True)),
    "head-wide": ("float32", 19, 32, 80, dict(log_prob=True)),
    "head-no-labels": ("float32", 37, 6, 24, dict(labels=False)),
    "head-float16": ("float16", 50, 6, 24, dict(log_prob=True)),
    "head-float16-mixed": ("float16", 50, 7, 28, dict(parameters="float32", wide=True)),
    "head-bfloat16-none": ("bfloat16", 20, 4, 0, dict()),
    "head-bfloat16-mixed": ("bfloat16", 37, 6, 24, dict(parameters="float32", wide=True, log_prob=True)),
}


# ---------------------------------------------------------------------------------------------------- guarded allocations


def guarded(shape, dtype: torch.dtype, fill) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, view of it between two margins)."""
    size = torch.Size(shape)
    buffer = torch.full((size.numel() + 2 * PAD,), fill, dtype=dtype)
    return buffer, buffer[PAD:PAD + size.numel()].view(size)


def inside_nan(t: torch.Tensor) -> torch.Tensor:
    """A copy between margins of NaN, of huge offsets where integers are meant."""
    _, view = guarded(t.shape, t.dtype, float("nan") if t.is_floating_point() else 77 if t.dtype == torch.int8 else 2 ** 40)
    return view.copy_(t.detach())


def between(t: torch.Tensor, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Numbers of a wider dtype that t are when rounded."""
    wide = t.to(dtype)
    moved = wide * (1 + 0.4 * EPS[t.dtype] * (torch.rand(t.shape, generator=g) - 0.5))
    return torch.where(moved.to(t.dtype) == t, moved, wide)


@contextmanager
def library(settings: dict):
    """Dense products through the library, in chunks of 64 rows with "chunks", inside; both as at any size again afterwards."""
    from ada2i_fast.kernels import common

    usual = common.LIBRARY_ROWS, common.SCRATCH
    if settings.get("library"):
        common.LIBRARY_ROWS = dict.fromkeys(common.LIBRARY_ROWS, 1)
    if settings.get("chunks"):
        common.SCRATCH = 1
    try:
        yield
    finally:
        common.LIBRARY_ROWS, common.SCRATCH = usual


@contextmanager
def poisoned(found: list):
    """Every uninitialised allocation becomes a guarded one full of NaN (77 for integers); appends what was overwritten."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    buffers = []

    def allocate(shape, dtype):
        buffer, view = guarded(shape, dtype, float("nan") if dtype.is_floating_point else 77)
        buffers.append(buffer)
        return view

    def new_empty_(self, size, *, dtype=None, **others):
        # The interpreter itself asks for empty tensors, of a device.
        return new_empty(self, size, dtype=dtype, **others) if others else allocate(size, dtype or self.dtype)

    torch.empty_like = lambda t, *, dtype=None, memory_format=None: allocate(t.shape, dtype or t.dtype)
    torch.Tensor.new_empty = new_empty_
    try:
        yield
    finally:
        torch.empty_like, torch.Tensor.new_empty = empty_like, new_empty
    for buffer in buffers:
        for margin in (buffer[:PAD], buffer[-PAD:]):
            clean = margin.isnan() if margin.is_floating_point() else margin == 77
            if not clean.all():
                found.append(tuple(buffer.shape))


# ------------------------------------------------------------------------------------------------------------- comparing


class Checks(list):
    """[what, error, allowed] triples; errors relative to the largest element of the float64 result."""

    def against(self, what: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype,
                terms: float = 0.0, floors: float = 1.0) -> None:
        """terms: the size of a sum of such terms that do not cancel, where it is known; what cancels has roundings of that size.
        floors: how many of them are allowed at least."""
        assert actual.shape == exact.shape, (what, actual.shape, exact.shape)
        if exact.numel() == 0:
            return
        largest = max(exact.abs().max().item(), 1e-30)
        error = (actual.double() - exact).abs().max().item() / largest
        plain_error = (plain.double() - exact).abs().max().item() / largest
        # A plain result may overflow where the kernel does not.
        allowed = 2 * plain_error if plain_error == plain_error and plain_error < 1 else 0.0
        self.append([what, error if error == error else float("inf"), allowed + FLOOR[dtype] * EPS[dtype] * max(floors, terms / largest)])

    def true(self, what: str, holds: bool) -> None:
        self.append([what, 0.0 if holds else float("inf"), 0.0])


def beside(settings: dict) -> dict:
    return {"beside": lambda call, *tensors: call(*tensors)} if settings.get("beside") else {}


# What goes into a result of the ring: for each of three modalities q and k of two cores, C, W, g_out, x. A dozen factors, each a sum of some ten
# products and rounded to half a unit: together sqrt(12 * 10) / 2 = 5.5 units in float32, where sums are rounded too, and sqrt(12) / 2 = 1.7 in
# 16 bits (TF32 rounds like float16). Plain PyTorch is sometimes better by luck, not by principle.
RING_FLOORS = 2.0


def ring_case(checks: Checks, dtype: str, widths: list[int], rank: int, lengths: list[int], settings: dict) -> None:
    from ada2i_fast.kernels import common, tensor_ring
    from ada2i_fast.ops.tensor_ring import tensor_ring_torch

    if settings.get("tf32"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"      # block sizes too
    dtype = getattr(torch, dtype)
    gated, dropout, with_target = settings.get("gated", False), settings.get("dropout", 0.0), settings.get("target", True)
    m, rows = len(widths), sum(lengths)
    g = encoder_cases.generator().manual_seed(rank + m)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=g)).to(dtype)

    x = [draw(rows, d) for d in widths]
    proj_weight = [draw(4 * rank, d, scale=d ** -0.5) for d in widths]
    proj_bias = [draw(4 * rank, scale=0.5) for d in widths]
    map_weight = [draw(d, rank * rank, scale=1 / rank) for d in widths]
    map_bias = [draw(d, scale=0.5) for d in widths]
    tensors = [x, proj_weight, proj_bias, map_weight, map_bias]
    given = [[inside_nan(t) for t in kind] for kind in tensors]
    if settings.get("parameters"):
        given[1:] = [[inside_nan(between(t, getattr(torch, settings["parameters"]), g)) for t in kind] for kind in tensors[1:]]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    if settings.get("ring") == "list":
        ring = [[l for l in range(m) if l != j] for j in range(m)]
    else:
        ring = [[(j + i) % m for i in range(1, m)] for j in range(m)]
    flat = [l for others in ring for l in others]
    seed = torch.tensor([-0x123456789ABCDEF]) if dropout else None
    scale, beta = 0.7, 0.3
    grad_out = [draw(rows, d) for d in widths]
    grad_target = [draw(rows, d) for d in widths] if with_target else []
    of_target, factors = grad_target, None
    if settings.get("gate"):
        of_target, factor = [torch.randint(-1, 2, (rows, d), generator=g, dtype=torch.int8) for d in widths], torch.tensor(0.375)
        grad_target, factors = [(-factor * s).to(dtype) for s in of_target], [inside_nan(factor)] * m
    into = [draw(rows, d) for d in widths] if settings.get("into") else None

    def oracle(precision: torch.dtype):
        leaves = [[t.to(precision).requires_grad_() for t in kind] for kind in tensors]
        out, target = tensor_ring_torch(leaves[0], offsets, *leaves[1:], ring, scale, beta, dropout, seed, gated)
        results = out + (target if with_target else [])
        grads = torch.autograd.grad(results, [t for kind in leaves for t in kind],
                                    [t.to(precision) for t in grad_out + grad_target], allow_unused=True)
        if into:
            grads = [*(a + b.to(precision) for a, b in zip(grads, into)), *grads[m:]]
        return [t.detach() for t in results], grads

    exact, exact_grads = oracle(torch.float64)
    plain, plain_grads = oracle(dtype)

    common.MAX_PARTS = settings.get("parts", 32)
    overwritten: list = []
    offsets_in, seed_in = inside_nan(offsets), inside_nan(seed) if dropout else None
    into_in = [inside_nan(t) for t in into] if into else None
    if factors:                                                 # longer rows
        into_in = [inside_nan(torch.nn.functional.pad(t, (0, 3), value=float("nan")))[:, :t.shape[1]] for t in into]
    # TF32 has the mantissa of float16; only a GPU rounds to it.
    rounded = torch.float16 if settings.get("tf32") and encoder_cases.device().type == "cuda" else dtype
    with poisoned(overwritten), library(settings):
        result = tensor_ring.forward(given[0], offsets_in, *given[1:], flat, scale, beta, dropout, seed_in, gated, with_target)
        saved = result[(2 if with_target else 1) * m:]
        checks.true("the attention is returned once", with_target and not gated and
                    all(a is b for a, b in zip(result[m:2 * m], saved[2 * m:])) or gated or not with_target)
        grads = tensor_ring.backward([inside_nan(t) for t in grad_out], [inside_nan(t) for t in of_target], given[0], offsets_in, *given[1:],
                                     saved, flat, scale, beta, dropout, seed_in, gated, into_in, factors=factors, **beside(settings))
    checks.true("added in place", not into or bool(factors) or all(a is b for a, b in zip(grads, into_in)))
    checks.true(f"writes outside of buffers {overwritten}", not overwritten)
    checks.true("saved averages", all(t.dtype == torch.float32 and t.shape == (len(lengths), rank, rank) and bool(
        torch.isfinite(t).all()) for t in saved[m:2 * m]))
    for i, (a, b, c) in enumerate(zip(result, plain, exact)):
        checks.true(f"dtype of result {i}", a.dtype == dtype)
        checks.against(("out" if i < m else "target") + f" {i % m}", a, b, c, rounded, floors=RING_FLOORS)
    names = [f"grad {kind} {j}" for kind in ("x", "proj_weight", "proj_bias", "map_weight", "map_bias") for j in range(m)]
    # g_p sums what g_P sums times x, whose elements have size 1.
    terms = {f"grad proj_bias {j}": exact_grads[m + j].abs().max().item() for j in range(m)}
    inputs = [t for kind in given for t in kind]
    for name, t, a, b, c in zip(names, inputs, grads, plain_grads, exact_grads):
        checks.true(f"dtype of {name}", a.dtype == t.dtype and a.shape == t.shape)
        checks.against(name, a, b if b is not None else torch.zeros_like(t), c if c is not None else torch.zeros_like(t).double(),
                       rounded, terms.get(name, 0.0), RING_FLOORS)


def mapping_case(checks: Checks, dtype: str, widths: list[int], rows: int, reduction: str, settings: dict) -> None:
    from ada2i_fast.kernels import attention_mapping
    from ada2i_fast.ops.attention_mapping import attention_mapping_torch

    if settings.get("tf32"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    dtype = getattr(torch, dtype)
    # TF32 has the mantissa of float16; only a GPU rounds to it.
    rounded = torch.float16 if settings.get("tf32") and encoder_cases.device().type == "cuda" else dtype
    g = encoder_cases.generator().manual_seed(rows)
    shapes = [[(rows, d), (rows, d), (d, d), (d,)] for d in widths]
    tensors = [[(settings.get("size", 1.0) * torch.randn(shape[i], generator=g)).to(dtype) for shape in shapes] for i in range(4)]
    total = rows * sum(widths)
    coefficient = [1.0 / (total if reduction == "mean" else rows * d) for d in widths]
    grad_loss = torch.tensor(1.3)

    def oracle(precision: torch.dtype):
        leaves = [[t.to(precision).requires_grad_() for t in kind] for kind in tensors]
        loss = attention_mapping_torch(*leaves, coefficient)
        return loss.detach(), torch.autograd.grad(loss, [t for kind in leaves for t in kind], grad_loss.to(loss.dtype))

    exact, exact_grads = oracle(torch.float64)
    plain, plain_grads = oracle(dtype)
    overwritten: list = []
    x, target, weight, bias = given = [[inside_nan(t) for t in kind] for kind in tensors]
    if settings.get("parameters"):
        wide = getattr(torch, settings["parameters"])
        weight, bias = given[2:] = [[inside_nan(between(t, wide, g)) for t in kind] for kind in tensors[2:]]
    with poisoned(overwritten), library(settings):
        loss, *sign = attention_mapping.forward(x, target, weight, bias, coefficient)
        grads = attention_mapping.backward(inside_nan(grad_loss), x, sign, weight, coefficient, **beside(settings))
        for_gate, factors = attention_mapping.backward_for_gate(inside_nan(grad_loss), x, sign, weight, coefficient)
    checks.true("factors from the library", bool(factors) == bool(settings.get("library")))
    if factors:
        of_target = slice(len(widths), 2 * len(widths))
        for_gate[of_target] = [(-factor * s).to(dtype) for factor, s in zip(factors, for_gate[of_target])]
    checks.true(f"writes outside of buffers {overwritten}", not overwritten)
    checks.true("loss is float32 and a scalar", loss.dtype == torch.float32 and loss.shape == ())
    checks.true("signs are int8", all(s.dtype == torch.int8 and s.shape == t.shape for s, t in zip(sign, x)))
    checks.against("loss", loss, plain, exact, torch.float32 if rounded == dtype else rounded)
    names = [f"grad {kind} {j}" for kind in ("x", "target", "weight", "bias") for j in range(len(widths))]
    inputs = [t for kind in given for t in kind]
    for use, found in (("", grads), (" for the gate", for_gate)):
        for name, t, a, b, c in zip(names, inputs, found, plain_grads, exact_grads):
            checks.true(f"dtype of {name}{use}", a.dtype == t.dtype)
            checks.against(name + use, a, b, c, rounded)
    # The derivative of |0| is 0: equal target, so no gradient at all.
    zero = [torch.zeros_like(t) for t in tensors[0]]
    with library(settings):
        loss, *sign = attention_mapping.forward(zero, zero, weight, [torch.zeros_like(t) for t in bias], coefficient)
    checks.true("sign of 0", loss.item() == 0.0 and not any(s.any() for s in sign))


# -------------------------------------------------------------------------------------------------------- cosine_fusion


def fusion_case(checks: Checks, dtype: str, modalities: int, rows: int, width: int, classes: int, options: dict) -> None:
    from ada2i_fast.kernels import cosine_fusion
    from ada2i_fast.ops.cosine_fusion import cosine_fusion_torch

    options = dict(amw=True, cosine_norm="features", scale=10.0, score_from="cosine", bias=False, labels=True) | options
    with_bias, with_labels = options.pop("bias"), options.pop("labels")
    dtype = getattr(torch, dtype)
    g = encoder_cases.generator().manual_seed(rows + classes)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    hidden, weight = [draw(rows, width) for _ in range(modalities)], (draw(classes, modalities * width) * width ** -0.5).to(dtype)
    bias = draw(classes) if with_bias else None
    labels = torch.randint(0, classes, (rows,), generator=g) if with_labels else None
    grad = draw(rows, classes)

    def oracle(precision: torch.dtype):
        leaves = [t.to(precision).requires_grad_() for t in (*hidden, weight, *([bias] if with_bias else []))]
        results = cosine_fusion_torch(leaves[:modalities], leaves[modalities], leaves[-1] if with_bias else None, labels, *options.values())
        grads = torch.autograd.grad(results[0], leaves, grad.to(precision))
        return [t.detach() for t in results if t is not None], grads

    exact, exact_grads = oracle(torch.float64)
    plain, plain_grads = oracle(dtype)
    overwritten: list = []
    given, weight_in = [inside_nan(t) for t in hidden], inside_nan(weight)
    with poisoned(overwritten):
        joint, log_prob, norms, *of_labels = cosine_fusion.forward(
            given, weight_in, inside_nan(bias) if with_bias else None, inside_nan(labels) if with_labels else None, *options.values())
        grads = cosine_fusion.backward(inside_nan(grad), given, weight_in, norms, with_bias, options["amw"], options["cosine_norm"],
                                       options["scale"])
    checks.true(f"writes outside of buffers {overwritten}", not overwritten)
    checks.true("dtypes", joint.dtype == dtype and all(t.dtype == torch.float32 for t in (log_prob, norms, *of_labels)))
    checks.against("norms", norms, torch.stack([h.norm(dim=1) for h in hidden]), torch.stack([h.double().norm(dim=1) for h in hidden]),
                   torch.float32)
    for name, a, b, c in zip(("joint", "log_prob", "scores", "ratio"), (joint, log_prob, *of_labels), plain, exact):
        checks.against(name, a, b, c, dtype if name == "joint" else torch.float32)
    if with_labels:
        checks.true("the weakest has ratio 1", of_labels[1].min().item() == 1.0)
    names = [*(f"grad hidden {m}" for m in range(modalities)), "grad weight", "grad bias"]
    checks.true("all gradients", len(grads) == len(exact_grads))
    for name, a, b, c in zip(names, grads, plain_grads, exact_grads):
        checks.true(f"dtype of {name}", a.dtype == dtype)
        checks.against(name, a, b, c, dtype)


# ---------------------------------------------------------------------------------------------------------- head_losses


def head_case(checks: Checks, dtype: str, rows: int, classes: int, inner: int, settings: dict) -> None:
    """settings: labels, extra; log_prob: it has a gradient, too; ignored: every so many rows have no label; parameters: their dtype; wide:
    log_prob in float32."""
    from ada2i_fast.kernels import head_losses
    from ada2i_fast.ops.head_losses import head_losses_torch

    with_labels, ignored = settings.get("labels", True), settings.get("ignored", 5)
    of_log_prob = settings.get("log_prob", False) or not with_labels
    dtype, parameters = getattr(torch, dtype), getattr(torch, settings.get("parameters", dtype))
    stored = torch.float32 if settings.get("wide") else dtype
    g = encoder_cases.generator().manual_seed(rows + classes)

    def draw(*shape, of=dtype):
        return torch.randn(shape, generator=g).to(of)

    joint = draw(rows, classes)
    head = [(size * draw(*shape)).to(parameters) for size, shape in (
        (classes ** -0.5, (inner, classes)), (1.0, (inner,)), (inner ** -0.5, (classes, inner)), (1.0, (classes,)))] if inner else []
    labels = torch.randint(0, classes, (rows,), generator=g) if with_labels else None
    if with_labels and ignored:
        labels[::ignored] = -100
    extra = draw(of=torch.float32) if with_labels and settings.get("extra", True) else None
    grad_log_prob, grad_loss = draw(rows, classes, of=stored) / rows if of_log_prob else None, draw(of=torch.float32)

    def oracle(precision: torch.dtype):
        leaves = [t.to(precision).requires_grad_() for t in (joint, *head)]
        log_prob, loss = head_losses_torch(leaves[0], leaves[1:], labels, None if extra is None else extra.to(precision))
        given = [(t, grad.to(t)) for t, grad in ((log_prob, grad_log_prob), (loss, grad_loss)) if t is not None and grad is not None]
        grads = torch.autograd.grad([t for t, _ in given], leaves, [grad for _, grad in given])
        return [log_prob.detach(), *([] if loss is None else [loss.detach()])], grads

    exact, exact_grads = oracle(torch.float64)
    plain, plain_grads = oracle(dtype)
    overwritten: list = []
    x, head_in = inside_nan(joint), [inside_nan(t) for t in head]
    y, e = (None if t is None else inside_nan(t) for t in (labels, extra))
    with poisoned(overwritten):
        log_prob, *of_labels = head_losses.forward(x, head_in, y, e, stored)
        grads = head_losses.backward(None if grad_log_prob is None else inside_nan(grad_log_prob),
                                     inside_nan(grad_loss) if with_labels else None, x, head_in, y, log_prob,
                                     of_labels[1] if with_labels else None)
    checks.true(f"writes outside of buffers {overwritten}", not overwritten)
    checks.true("dtypes", log_prob.dtype == stored and all(t.dtype == torch.float32 and not t.dim() for t in of_labels))
    checks.against("log_prob", log_prob, plain[0], exact[0], stored)
    if with_labels:
        checks.true("count", of_labels[1].item() == (labels != -100).sum().item())
        checks.against("loss", of_labels[0], plain[1], exact[1], torch.float32)
    names = ["grad joint", "grad W_1", "grad b_1", "grad W_2", "grad b_2"]
    checks.true("all gradients", len(grads) == len(exact_grads))
    for name, a, b, c, t in zip(names, grads, plain_grads, exact_grads, (joint, *head)):
        checks.true(f"dtype of {name}", a.dtype == t.dtype)
        checks.against(name, a, b, c, dtype)


def head_edges_case(checks: Checks) -> None:
    """No row with a label, labels that are no class, NaN, strides, an empty batch; and the op around the kernels."""
    from ada2i_fast.kernels import head_losses
    from ada2i_fast.ops.head_losses import head_losses as op, head_losses_torch

    g = encoder_cases.generator().manual_seed(6)
    joint, labels, extra = torch.randn(9, 4, generator=g), torch.arange(9) % 4, torch.tensor(0.25)
    head = [torch.randn(shape, generator=g) for shape in ((6, 4), (6,), (4, 6), (4,))]
    one = torch.tensor(1.0)
    for own in (head, []):
        none = torch.full_like(labels, -100)
        log_prob, loss, count = head_losses.forward(joint, own, none, extra, torch.float32)
        grads = head_losses.backward(None, one, joint, own, none, log_prob, count)
        checks.true("no labels: NaN, gradients of 0", bool(loss.isnan()) and count == 0 and not any(t.any() for t in grads))
        for away in (4, -1, 2 ** 40):
            other = labels.clone()
            other[3] = away
            log_prob, loss, count = head_losses.forward(joint, own, other, extra, torch.float32)
            checks.true(f"label {away}", bool(loss.isnan()) and bool(log_prob.isfinite().all()))
        broken = joint.clone()
        broken[5, 1] = float("nan")
        dropped = labels.clone()
        dropped[5] = -100
        for y in (labels, dropped):
            log_prob, loss, _ = head_losses.forward(broken, own, y, extra, torch.float32)
            checks.true("NaN stays in its row", log_prob.isnan().any(1).tolist() == [n == 5 for n in range(9)] and
                        bool(loss.isnan()) == (y is labels))
        strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in (joint, *own)]
        expected, found = (head_losses.forward(t[0], t[1:], labels, extra, torch.float32) for t in ([joint, *own], strided))
        checks.true("any strides", all(torch.equal(a, b) for a, b in zip(found, expected)))
        checks.true("any strides, gradients", all(torch.equal(*pair) for pair in zip(*(
            head_losses.backward(joint.t().contiguous().t(), one, t[0], t[1:], labels.repeat_interleave(2)[::2], *expected[::2])
            for t in ([joint, *own], strided)))))
        log_prob, loss, count = head_losses.forward(joint[:0], own, labels[:0], extra, torch.float32)
        grads = head_losses.backward(None, one, joint[:0], own, labels[:0], log_prob, count)
        checks.true("empty", log_prob.shape == (0, 4) and bool(loss.isnan()) and count == 0 and not any(t.any() for t in grads) and
                    [t.shape for t in grads] == [(0, 4), *(t.shape for t in own)])

        def run(call, create_graph):
            leaves = [t.clone().requires_grad_() for t in (extra, joint, *own)]
            log_prob, loss = call(leaves[1], leaves[2:], labels, leaves[0])
            grads = torch.autograd.grad(3.0 * loss + log_prob[0].square().sum(), leaves, create_graph=create_graph)
            second = torch.autograd.grad(grads[1].square().sum(), leaves[1:]) if create_graph else ()
            return [log_prob, loss, *grads, *second]

        for create_graph in (False, True):
            pairs = zip(*(run(call, create_graph) for call in (lambda *t: op(*t, backend="triton"), head_losses_torch)))
            checks.true(f"the op, create_graph {create_graph}", all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs))
    checks.true("classes", "33 classes" in head_losses.why_not(joint.device.type, torch.float32, (33,)))
    checks.true("inner units", "1025 inner" in head_losses.why_not(joint.device.type, torch.float32, (6, 1025)))
    checks.true("float64", "float64" in head_losses.why_not(joint.device.type, torch.float64, (6, 24)))


# ------------------------------------------------------------------------------------------------------------ encoders


def counted_case(checks: Checks) -> None:
    """A loss over the first rows alone, whatever is in the others: that of these rows, and no gradient elsewhere."""
    from ada2i_fast.kernels import attention_mapping
    from ada2i_fast.ops.attention_mapping import attention_mapping_torch

    rows, counted, widths = 70, 41, [14, 9]
    g = encoder_cases.generator().manual_seed(7)
    shapes = [[(rows, d), (rows, d), (d, d), (d,)] for d in widths]
    drawn = [[torch.randn(shape[i], generator=g) for shape in shapes] for i in range(4)]
    grad_loss, count = torch.tensor(1.3), torch.tensor(counted)
    for dtype, settings in ((torch.float32, {}), (torch.float32, {"library": True}), (torch.bfloat16, {"library": True})):
        tensors = [[t.to(dtype) for t in kind] for kind in drawn]

        def oracle(precision: torch.dtype):
            leaves = [[t.to(precision).requires_grad_() for t in kind] for kind in tensors]
            first = [[t[:counted] for t in kind] for kind in leaves[:2]]
            loss = attention_mapping_torch(*first, *leaves[2:], [1.0 / (counted * d) for d in widths])
            return loss.detach(), torch.autograd.grad(loss, [t for kind in leaves for t in kind], grad_loss.to(loss.dtype))

        (exact, exact_grads), (plain, plain_grads) = oracle(torch.float64), oracle(dtype)
        coefficient = [1.0 / (rows * d) for d in widths]
        x, target, weight, bias = ([inside_nan(t) for t in kind] for kind in tensors)
        overwritten: list = []
        with library(settings), poisoned(overwritten):
            loss, *sign = attention_mapping.forward(x, target, weight, bias, coefficient, count)
            grads = attention_mapping.backward(inside_nan(grad_loss), x, sign, weight, coefficient, count)
        checks.true(f"writes outside of buffers {overwritten}", not overwritten)
        checks.against("loss", loss, plain, exact, torch.float32)
        for name, a, b, c in zip([f"{kind} {j}" for kind in ("x", "target", "weight", "bias") for j in range(2)], grads, plain_grads, exact_grads):
            checks.against(f"grad {name}", a, b, c, dtype)


def close_case(checks: Checks) -> None:
    """A target so close that the loss shows the last bits of Phi x, which is some 8 and off by 1e-6 in float32, where differences are 2e-5: their
    mean changes by less than 1 % then. Without one of the smallest products of parts, 2^-18 of Phi x, it would by 30 %."""
    from ada2i_fast.kernels import attention_mapping
    from ada2i_fast.ops.attention_mapping import attention_mapping_torch

    rows, width = 40, 70
    g = encoder_cases.generator().manual_seed(8)
    x, weight, bias, noise = (torch.randn(shape, generator=g) for shape in ((rows, width), (width, width), (width,), (rows, width)))
    target = (x.double() @ weight.double().t() + bias.double() + 2e-5 * noise).float()
    exact = attention_mapping_torch(*([t.double()] for t in (x, target, weight, bias)), [1.0 / (rows * width)])
    with library({"library": True}):
        loss, _ = attention_mapping.forward(*([inside_nan(t)] for t in (x, target, weight, bias)), [1.0 / (rows * width)])
    checks.append(["loss of small differences", abs(loss.item() / exact.item() - 1), 0.05])


def fused_case(checks: Checks, x_type: str, other: str, rows: int, width: int, p: float) -> None:
    """relu_dropout and dropout_residual_norm."""
    from ada2i_fast.kernels import dropout
    from ada2i_fast.ops.dropout import keep_mask

    tensors, grad = encoder_cases.fused_inputs(x_type, other, rows, width)
    seed, stream, dtype = torch.tensor([encoder_cases.SEED]), encoder_cases.STREAM, grad.dtype
    overwritten: list = []
    given, s = [inside_nan(t) for t in tensors], inside_nan(seed) if p else None
    grads = {"relu": grad, "norm": grad.to(tensors[2].dtype)}               # of the type of x, and of the residual
    with poisoned(overwritten):
        out = dropout.relu_forward(*given[:2], p, s, stream)
        found = {"relu": [out, *dropout.relu_backward(inside_nan(grads["relu"]), out, p)]}
        out, mean, rstd = dropout.norm_forward(*given, p, encoder_cases.EPS, s, stream)
        found["norm"] = [out, *dropout.norm_backward(inside_nan(grads["norm"]), *given[:4], mean, rstd, p, s, stream)]
    checks.true(f"writes outside of buffers {overwritten}", not overwritten)
    checks.true("statistics are float32 [N]", all(t.dtype == torch.float32 and t.shape == (rows,) for t in (mean, rstd)))
    for op, results in found.items():
        inputs = tensors[:2] if op == "relu" else tensors
        types = [grads["norm"].dtype, *(t.dtype for t in inputs)] if op == "norm" else [dtype, dtype, torch.float32]
        for name, expected, a, b, c in zip(encoder_cases.NAMES[op], types, results, encoder_cases.plain(op, inputs, grads[op], p),
                                           encoder_cases.exact(op, inputs, grads[op], p)):
            checks.true(f"dtype of {op} {name}", a.dtype == expected)
            checks.against(f"{op} {name}", a, b, c, expected)
    if p:
        ones = dropout.relu_forward(torch.ones_like(tensors[0]), torch.zeros_like(tensors[1]), p, seed, stream)
        checks.true("the mask is keep_mask", torch.equal(ones != 0, keep_mask(seed, stream, rows, width, p)))
        checks.true("kept elements are scaled", torch.equal(ones[ones != 0].unique(), torch.tensor([1 / (1 - p)]).to(dtype)) or
                    dtype == torch.bfloat16)


def attention_case(checks: Checks, dtype: str, lengths: list[int], heads: int, width: int, p: float) -> None:
    from ada2i_fast.kernels import dialogue_attention

    qkv, grad = encoder_cases.attention_inputs(dtype, lengths, heads, width)
    seed, stream, dtype = torch.tensor([encoder_cases.SEED]) if p else None, encoder_cases.STREAM, qkv.dtype
    overwritten: list = []
    given, s = inside_nan(qkv), inside_nan(seed) if p else None
    with poisoned(overwritten):
        out, *saved = dialogue_attention.forward(given, lengths, heads, p, s, stream)
        results = [out, dialogue_attention.backward(inside_nan(grad), given, out, *saved, lengths, heads, p, s, stream)]
    checks.true(f"writes outside of buffers {overwritten}", not overwritten)
    checks.true("statistics are finite float32", all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in saved))
    settings = (lengths, heads, p)
    for name, a, b, c in zip(encoder_cases.NAMES["attention"], results, encoder_cases.plain("attention", [qkv], grad, *settings),
                             encoder_cases.exact("attention", [qkv], grad, *settings)):
        checks.true(f"dtype of {name}", a.dtype == dtype)
        checks.against(name, a, b, c, dtype)


def fusion_zeros_case(checks: Checks) -> None:
    """Norms of zero, rows without an own class, NaN, strides, an empty batch: as plain PyTorch has them."""
    from ada2i_fast.kernels import cosine_fusion
    from ada2i_fast.ops.cosine_fusion import cosine_fusion_torch

    g = encoder_cases.generator().manual_seed(5)
    hidden = [torch.randn(6, 9, generator=g) for _ in range(2)]
    weight, bias, grad = torch.randn(4, 18, generator=g), torch.randn(4, generator=g), torch.randn(6, 4, generator=g)
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    for h in hidden:
        h[1], h[2] = 0, 1e-13 * h[2]
    weight[2], weight[:, 5] = 0, 0
    for norm in ("classes", "features"):
        options = (True, norm, 3.0, "cosine")
        leaves = [t.clone().requires_grad_() for t in (*hidden, weight, bias)]
        plain = cosine_fusion_torch(leaves[:2], leaves[2], leaves[3], labels, *options)
        plain_grads = torch.autograd.grad(plain[0], leaves, grad)
        joint, log_prob, norms, scores, ratio = cosine_fusion.forward(hidden, weight, bias, labels, *options)
        grads = cosine_fusion.backward(grad, hidden, weight, norms, True, *options[:3])
        for name, a, b in zip(("joint", "log_prob", "scores", "ratio"), (joint, log_prob, scores, ratio), plain):
            checks.true(f"{norm} {name}", torch.allclose(a, b, rtol=1e-5, atol=1e-5))
        for m in range(2):
            size = plain_grads[m].abs().amax(1, keepdim=True)
            checks.true(f"{norm} grad hidden {m}", bool(((grads[m] - plain_grads[m]).abs() <= 1e-4 * size).all()))
        # What is divided by 1e-12 apart from the rest.
        large = plain_grads[2].abs() > 1e6
        checks.true(f"{norm} some are large", bool(large.any()))
        for part in (large, ~large):
            a, b = grads[2][part], plain_grads[2][part]
            checks.true(f"{norm} grad weight", bool(((a - b).abs() <= 1e-4 * b.abs().max()).all()))
        strided = [torch.stack([h, h], dim=2)[:, :, 1] for h in hidden]
        again = cosine_fusion.forward(strided, weight.t().contiguous().t(), bias, labels.repeat_interleave(2)[::2], *options)
        checks.true("any strides", all(torch.equal(a, b) for a, b in zip(again, (joint, log_prob, norms, scores, ratio))))
        hidden[1][4, 2] = float("nan")
        joint, log_prob, _, scores, ratio = cosine_fusion.forward(hidden, weight, bias, labels, *options)
        checks.true("NaN", scores.isnan().tolist() == [False, True] and bool(ratio.isnan().all()) and
                    joint.isnan().any(1).tolist() == [n == 4 for n in range(6)])
        hidden[1][4, 2] = 1.0
        away = labels.clone()
        away[3] = 99
        left = cosine_fusion.forward(hidden, weight, bias, labels, *options)
        checks.true("a label that is no class has score 0", torch.allclose(
            cosine_fusion.forward(hidden, weight, bias, away, *options)[3], left[3] - left[1][:, 3, 2].exp(), atol=1e-5))
        empty = [h[:0] for h in hidden]
        found = cosine_fusion.forward(empty, weight, bias, labels[:0], *options)
        checks.true("empty", [tuple(t.shape) for t in found] == [(0, 4), (2, 0, 4), (2, 0), (2,), (2,)] and
                    not found[3].any() and bool(found[4].isnan().all()))
        grads = cosine_fusion.backward(found[0], empty, weight, found[2], True, *options[:3])
        checks.true("zero gradients", not any(t.any() for t in grads) and grads[2].shape == weight.shape and grads[3].shape == bias.shape)


def large_scores_case(checks: Checks) -> None:
    """Scores of some hundreds, all of them below 0: exp of them, or of their inverse, would be 0 or infinite."""
    from ada2i_fast.kernels import dialogue_attention

    lengths, heads, width = [20, 9, 40], 1, 16
    qkv, grad = encoder_cases.attention_inputs("float32", lengths, heads, width)
    qkv[:, :width] = 25.0 + qkv[:, :width]
    qkv[:, width:2 * width] -= 25.0
    out, *saved = dialogue_attention.forward(inside_nan(qkv), lengths, heads, 0.0, None, 0)
    results = [out, dialogue_attention.backward(grad, inside_nan(qkv), out, *saved, lengths, heads, 0.0, None, 0)]
    exact = encoder_cases.exact("attention", [qkv], grad, lengths, heads, 0.0)
    plain = encoder_cases.plain("attention", [qkv], grad, lengths, heads, 0.0)
    # Scores of size S are rounded to S 2^-24 at least: so much is a weight off.
    size = ((qkv[:, :width] @ qkv[:, width:2 * width].t()).abs().max() / width ** 0.5).item()
    for a, b, c in zip(results, plain, exact):
        largest = c.abs().max()
        checks.append(["large scores", ((a - c).abs().max() / largest).item(),
                       (2 * (b - c).abs().max() / largest).item() + (8 + size) * 2.0 ** -24])


def offsets_case(checks: Checks) -> None:
    """Offsets of the dialogues are made once for batches of the same lengths; the batch used longest ago goes first."""
    from ada2i_fast.kernels import dialogue_attention

    device = encoder_cases.device()
    make = dialogue_attention.dialogue_offsets
    first = make([2, 0, 3], device)
    checks.true("offsets", first.tolist() == [0, 2, 2, 5] and first.dtype == torch.int64)
    for n in range(dialogue_attention.MOST_BATCHES - 1):
        make([n], device)
    checks.true("made once", make([2, 0, 3], device) is first)
    make([999], device)
    checks.true("the others go first", make([2, 0, 3], device) is first and ((0,), device) not in dialogue_attention._batches)
    checks.true("bounded", len(dialogue_attention._batches) == dialogue_attention.MOST_BATCHES)

    from ada2i_fast.ops import DialogueOffsets, dialogue_attention as op

    lengths = [3, 0, 7, 2]
    qkv, grad = encoder_cases.attention_inputs("float32", lengths, 2, 16)
    found = []
    for given in (lengths, DialogueOffsets(make(lengths, device), 8)):
        leaf = qkv.clone().requires_grad_()
        out = op(leaf, given, 2, dropout=0.3, seed=torch.tensor([5]), backend="triton")
        found.append([out, *torch.autograd.grad(out, leaf, grad)])
    checks.true("offsets of the device are lengths", all(torch.equal(a, b) for a, b in zip(*found)))


# -------------------------------------------------------------------------------------------------------- shared pieces


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers (Salmon et al., SC 2011)."""
    word = 0xFFFFFFFF
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & word, a >> 32 ^ counter[3] ^ key[1], a & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return counter


def dropout_case(checks: Checks) -> None:
    from ada2i_fast.kernels import common
    from ada2i_fast.ops.dropout import keep_mask, philox_words, threshold

    @triton.jit
    def mask(seed, result, first_row, d0, stream, KEEP: tl.constexpr, THRESHOLD: tl.constexpr):
        rows = tl.load(first_row) + tl.arange(0, 16)
        kept = KEEP(seed, tl.load(stream), rows, d0, THRESHOLD, 16, 32)
        tl.store(result + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :], kept.to(tl.int8))

    def run(seed: int, first_row: int, d0: int, stream: int, p: float) -> torch.Tensor:
        result = torch.zeros(16, 32, dtype=torch.int8)
        mask[(1,)](torch.tensor([seed]), result, torch.tensor([first_row]), d0, torch.tensor([stream]), KEEP=common.keep,
                   THRESHOLD=threshold(p))
        return result.bool()

    for seed in (0, 12, -1, -0x123456789ABCDEF, 2 ** 63 - 1):
        for stream, p in ((0, 0.5), (3, 0.1), (1, 0.999)):
            expected = keep_mask(torch.tensor([seed]), stream, 24, 50, p)
            checks.true(f"keep_mask({seed}, {stream}, {p})", torch.equal(run(seed, 8, 16, stream, p), expected[8:24, 16:48]))
    words = philox_words(torch.tensor([5]), 1, range(16), 32)
    at_threshold = run(5, 0, 0, 1, int(words[3, 7]) / 2 ** 32)
    checks.true("a word at the threshold is kept", bool(at_threshold[3, 7]) and torch.equal(at_threshold, words >= words[3, 7]))
    first, seed = 2 ** 33 + 5, 77
    expected = torch.tensor([[philox([d // 4, n & 0xFFFFFFFF, n >> 32, 2], [seed, 0])[d % 4] >= threshold(0.5)
                              for d in range(32)] for n in range(first, first + 16)])
    checks.true("rows beyond 2^32", torch.equal(run(seed, first, 0, 2, 0.5), expected))


def locate_case(checks: Checks) -> None:
    from ada2i_fast.kernels import common

    @triton.jit(do_not_specialize=["dialogues"])
    def where(offsets, result, dialogues, LOCATE: tl.constexpr):
        tile = tl.program_id(0).to(tl.int64)
        dialogue, first_tile, start, end = LOCATE(tile, offsets, dialogues, 16)
        tl.store(result + tile * 4, dialogue)
        tl.store(result + tile * 4 + 1, first_tile)
        tl.store(result + tile * 4 + 2, start)
        tl.store(result + tile * 4 + 3, end)

    g = encoder_cases.generator().manual_seed(0)
    for dialogues in (1, 2, 128, 129, 160):
        lengths = torch.randint(0, 40, (dialogues,), generator=g) * (torch.rand(dialogues, generator=g) < 0.7)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        tiles = int(offsets[-1]) // 16 + dialogues
        result = torch.full((tiles, 4), -1)
        where[(tiles,)](inside_nan(offsets), result, dialogues, LOCATE=common.locate)
        rows, fine = set(), True
        for tile, (b, first, start, end) in enumerate(result.tolist()):
            fine &= first <= tile and (start, end) == (int(offsets[b]), int(offsets[b + 1]))
            mine = range(start + (tile - first) * 16, min(start + (tile - first + 1) * 16, end))
            fine &= rows.isdisjoint(mine)
            rows.update(mine)
        checks.true(f"{dialogues} dialogues: each row in one tile", fine and rows == set(range(int(offsets[-1]))))


def empty_case(checks: Checks) -> None:
    from ada2i_fast.kernels import attention_mapping, dialogue_attention, dropout, tensor_ring

    for lengths in ([], [0, 0]):
        x = [torch.empty(0, 5) for _ in range(2)]
        weights = [[torch.randn(shape) for _ in x] for shape in ((12, 5), (12,), (5, 9), (5,))]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        result = tensor_ring.forward(x, offsets, *weights, [1, 0], 1.0, 0.1, 0.0, None, True, True)
        shapes = [(0, 5)] * 4 + [(0, 12)] * 2 + [(len(lengths), 3, 3)] * 2 + [(0, 5)] * 2
        checks.true("shapes", [tuple(t.shape) for t in result] == shapes)
        checks.true("averages are zero", not any(t.any() for t in result[6:8]))
        grads = tensor_ring.backward(x, x, x, offsets, *weights, result[4:], [1, 0], 1.0, 0.1, 0.0, None, True)
        checks.true("zero gradients", not any(t.any() for t in grads) and
                    [t.shape for t in grads] == [t.shape for kind in (x, *weights) for t in kind])
        out, logsum = dialogue_attention.forward(torch.empty(0, 12), lengths, 2, 0.0, None, 0)
        grad = dialogue_attention.backward(out, torch.empty(0, 12), out, logsum, lengths, 2, 0.0, None, 0)
        checks.true("empty attention", (out.shape, logsum.shape, grad.shape) == ((0, 4), (0, 2, 2), (0, 12)))
    one, bias = torch.empty(0, 5), torch.randn(5)
    out, mean, rstd = dropout.norm_forward(one, bias, one, bias, bias, 0.0, 1e-5, None, 0)
    checks.true("empty rows", (out.shape, mean.shape, rstd.shape) == ((0, 5), (0,), (0,)) and
                dropout.relu_forward(one, bias, 0.0, None, 0).shape == (0, 5))
    for grads in (dropout.norm_backward(one, one, bias, one, bias, mean, rstd, 0.0, None, 0), dropout.relu_backward(one, one, 0.0)):
        checks.true("zero gradients of the parameters", not any(t.any() for t in grads) and grads[1].shape == (5,))
    square = [torch.randn(5, 5) for _ in range(2)]
    loss, *sign = attention_mapping.forward(x, x, square, weights[3], [0.0, 0.0])
    checks.true("zero loss", loss.item() == 0.0 and loss.dtype == torch.float32)
    grads = attention_mapping.backward(loss, x, sign, square, [0.0, 0.0])
    checks.true("zero gradients of the mapping", not any(t.any() for t in grads))


def reason_case(checks: Checks) -> None:
    from ada2i_fast.kernels import attention_mapping, dialogue_attention, dropout, tensor_ring

    here = encoder_cases.device().type
    for module in (dropout, dialogue_attention):
        checks.true("any width", module.why_not(here, torch.float16, (6144,)) is None)
        checks.true("float64", "float64" in (module.why_not(here, torch.float64, (7,)) or ""))
    checks.true("serves this device", tensor_ring.why_not(here, torch.float32, (7,), 32) is None)
    checks.true("rank 33", "rank 33" in (tensor_ring.why_not(here, torch.float32, (7,), 33) or ""))
    checks.true("float64", "float64" in (attention_mapping.why_not(here, torch.float64, (7,)) or ""))
    checks.true("mps", "mps" in (attention_mapping.why_not("mps", torch.float32, (7,)) or ""))


def repeat_case(checks: Checks) -> None:
    """Non-contiguous and expanded inputs give the bits of their contiguous copies."""
    from ada2i_fast.kernels import tensor_ring

    g = encoder_cases.generator().manual_seed(3)
    x = [torch.randn(12, 14, generator=g)[:, ::2], torch.randn(1, 7, generator=g).expand(12, 7)]
    weights = [[torch.randn(*shape, generator=g).t() for _ in x] for shape in ((7, 12), (9, 7))]
    biases = [[torch.randn(n, generator=g) for _ in x] for n in (12, 7)]
    offsets = torch.tensor([0, 5, 12])
    ones = [torch.ones(()).expand(12, 7)] * 2

    def run(f):
        arguments = [[f(t) for t in kind] for kind in (x, weights[0], biases[0], weights[1], biases[1])]
        result = tensor_ring.forward(arguments[0], offsets, *arguments[1:], [1, 0], 1.0, 0.1, 0.0, None, False, True)
        return result + tensor_ring.backward([f(t) for t in ones], [], arguments[0], offsets, *arguments[1:], result[4:], [1, 0],
                                             1.0, 0.1, 0.0, None, False)

    checks.true("any strides", all(torch.equal(a, b) for a, b in zip(run(lambda t: t), run(lambda t: t.contiguous()))))


def reduce_case(checks: Checks) -> None:
    """Sums of two kinds of partial gradients in several steps, columns beyond them left alone."""
    from ada2i_fast.kernels import common

    partial = torch.randn(7, 2, 48, generator=encoder_cases.generator().manual_seed(4))
    for dtype in (torch.float32, torch.bfloat16):
        overwritten: list = []
        with poisoned(overwritten):
            kinds = [[partial.new_empty(shape, dtype=dtype) for _ in range(2)] for shape in ((5, 6), (7,))]
            common.reduce(inside_nan(partial), kinds, block=16, together=4)
        checks.true(f"writes outside of buffers {overwritten}", not overwritten)
        for j in range(2):
            for kind, columns in zip(kinds, (slice(0, 30), slice(30, 37))):
                exact = partial[:, j, columns].double().sum(0)
                checks.against(f"sum {j}", kind[j].flatten(), exact.to(dtype), exact, dtype)


def cases(slow: bool) -> dict:
    found = {"dropout": dropout_case, "reduce": reduce_case, "locate": locate_case, "empty": empty_case, "reasons": reason_case,
             "strides": repeat_case, "large-scores": large_scores_case, "offsets": offsets_case}
    length = 1_200 if encoder_cases.device().type == "cpu" else 10_000      # minutes under the interpreter
    long = {"long-dialogue": ("float32", [7, 7], 3, [length, 1], dict(dropout=0.5))}
    for name, arguments in {**RING, **(SLOW_RING | long if slow else {})}.items():
        found[name] = lambda checks, arguments=arguments: ring_case(checks, *arguments)
    for name, arguments in MAPPING.items():
        found[name] = lambda checks, arguments=arguments: mapping_case(checks, *arguments)
    for case, table in ((ring_case, LIBRARY_RING), (mapping_case, LIBRARY_MAPPING)):
        for name, (*arguments, settings) in table.items():
            settings = settings | {"library": True}
            found[name] = lambda checks, case=case, arguments=(*arguments, settings): case(checks, *arguments)
    found["mapping-counted"] = counted_case
    found["library-mapping-close"] = close_case
    found["fusion-zeros"] = fusion_zeros_case
    for name, arguments in FUSION.items():
        found[name] = lambda checks, arguments=arguments: fusion_case(checks, *arguments)
    found["head-edges"] = head_edges_case
    for name, arguments in HEAD.items():
        found[name] = lambda checks, arguments=arguments: head_case(checks, *arguments)
    for name, arguments in {**encoder_cases.FUSED, **(encoder_cases.SLOW_FUSED if slow else {})}.items():
        found[name] = lambda checks, arguments=arguments: fused_case(checks, *arguments)
    for name, arguments in {**encoder_cases.ATTENTION, **(encoder_cases.SLOW_ATTENTION if slow else {})}.items():
        found[name] = lambda checks, arguments=arguments: attention_case(checks, *arguments)
    return found


def use_kernels(folder: Path) -> None:
    """Import `ada2i_fast.kernels` from a folder."""
    spec = importlib.util.spec_from_file_location("ada2i_fast.kernels", folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    sys.modules["ada2i_fast.kernels"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu: the interpreter")
    parser.add_argument("--cases", choices=["quick", "slow", "all"], default="quick")
    parser.add_argument("--only", action="append")
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--claims", type=Path, metavar="FOLDER", help="shared with other processes: each case is run by one of them")
    arguments = parser.parse_args()
    if arguments.kernels:
        use_kernels(arguments.kernels)
    torch.set_num_threads(1)
    if arguments.device == "cpu":
        interpreter.hurry(overflow=arguments.cases != "slow")
    else:                                       # the default device "cpu" is slower under the interpreter
        torch.set_default_device(arguments.device)
    left_out = cases(False) if arguments.cases == "slow" else ()
    found = {name: run for name, run in cases(arguments.cases != "quick").items() if name not in left_out}
    for name, run in found.items():
        if arguments.only and name not in arguments.only or arguments.claims and not claim(arguments.claims / name):
            continue
        checks, start = Checks(), time.perf_counter()
        torch.backends.cuda.matmul.fp32_precision = "ieee"      # some cases want TF32
        try:
            run(checks)
        except Exception as error:      # a broken kernel may fail in any way; the case fails with it
            checks.true(f"{type(error).__name__}: {str(error)[:500]}", False)
        print(json.dumps({"case": name, "seconds": round(time.perf_counter() - start, 2), "checks": checks}), flush=True)


if __name__ == "__main__":
    main()
