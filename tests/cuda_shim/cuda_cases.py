"""Cases for the CUDA backend and the rule that judges them; the CPU shim and a real GPU run the same ones.

As a script, runs every case on a shim library: python cuda_cases.py LIBRARY. That is how AddressSanitizer sees them, in a process of
its own with its runtime loaded first.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import torch
from torch import Tensor

from ada2i_fast import cuda
from ada2i_fast.cuda import attention_mapping, tensor_ring
from ada2i_fast.ops.attention_mapping import attention_mapping_torch
from ada2i_fast.ops.tensor_ring import tensor_ring_torch

ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
# TF32 has float16's mantissa, and no plain torch on a CPU: there float16 is the measure.
PLAIN = {"float32": torch.float32, "tf32": torch.float16, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a result may be off beyond twice plain torch's error, in units of rounding: torch may be right by chance.
EPSILON = {"float32": 2.0 ** -23, "tf32": 2.0 ** -10, "bfloat16": 2.0 ** -8, "float16": 2.0 ** -10}


@dataclass(frozen=True)
class Ring:
    """widths: D_j; lengths: rows per dialogue; misaligned: x and grad_out start one element off any alignment."""

    rank: int
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    dropout: float = 0.0
    gated_target: bool = False
    grad_target: bool = True
    misaligned: bool = False
    seed: int = 0


# Every rank that the datasets use and both sides of the tiles' borders: 16 and 17 (4R = 64), 11 and 12 (R^2 = 128), 32; widths
# odd, one, at and over 64; dialogues of no row and of one, on both sides of the segments' 32 rows; rows in several pieces.
RINGS = {
    "smallest": Ring(1, (1,), (1,)),
    "one modality": Ring(3, (7,), (5, 0, 1), dropout=0.5),
    "one modality, gated": Ring(6, (66,), (33, 0, 40), dropout=0.25, gated_target=True),
    "two": Ring(6, (21, 20), (40, 0, 1, 9), dropout=0.5, gated_target=True),
    "three": Ring(11, (37, 36, 8), (70, 0, 1, 9), dropout=0.5),
    "three, no loss": Ring(10, (20, 12, 9), (0, 31, 2, 0), gated_target=True, grad_target=False),
    "three, wide": Ring(3, (65, 132, 64), (64, 1, 31, 32), dropout=0.1, gated_target=True),
    "three, misaligned": Ring(6, (12, 16, 64), (33, 7), dropout=0.5, misaligned=True),
    "four": Ring(10, (12, 5, 16, 9), (3, 33)),
    "rank 16": Ring(16, (20, 24, 28), (33, 31, 1), dropout=0.3),
    "rank 17": Ring(17, (68, 9), (65, 0)),
    "rank 12": Ring(12, (8, 8, 8), (20,), gated_target=True),
    "rank 32": Ring(32, (12, 9, 16), (35, 0, 2), dropout=0.5),
    "many rows": Ring(2, (5, 8, 70), (150, 0, 100, 40), dropout=0.5),
    "long dialogue": Ring(2, (3, 4), (700, 3)),
    "no rows": Ring(3, (7, 4), (0, 0)),
    "no dialogues": Ring(3, (7, 4), ()),
    "large seed": Ring(2, (9, 8), (6,), dropout=0.5, seed=-(2 ** 62) - 12345),
}


@dataclass(frozen=True)
class Mapping:
    widths: tuple[int, ...]
    rows: int
    misaligned: bool = False


MAPPINGS = {
    "smallest": Mapping((1,), 1),
    "three": Mapping((37, 36, 8), 80),
    "two, wide": Mapping((65, 132), 66),
    "exact tiles": Mapping((64, 128), 128),
    "misaligned": Mapping((12, 16, 64), 40, misaligned=True),
    "many rows": Mapping((5, 8, 70), 300),
    "five": Mapping((4, 3, 2, 1, 8), 33),
    "no rows": Mapping((5, 8), 0),
}


def assert_close(name: str, mode: str, result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype plus a few units of rounding: in the root mean
    square, and in the worst element."""
    assert result.shape == exact.shape, f"{name}: {tuple(result.shape)} instead of {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error, allowed = result.double() - exact, plain.double() - exact
    for what, size, units in (("rms", lambda t: t.square().mean().sqrt().item(), 2), ("worst", lambda t: t.abs().max().item(), 4)):
        limit = 2 * size(allowed) + units * EPSILON[mode] * size(exact)
        assert size(error) <= limit, f"{name}: {what} error {size(error):.3g}, limit {limit:.3g} (values {size(exact):.3g})"


def drawn(generator: torch.Generator, dtype: torch.dtype, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def off_alignment(t: Tensor) -> Tensor:
    """A contiguous copy that starts one element behind an aligned address."""
    buffer = t.new_empty(t.numel() + 1)
    view = buffer[1:].view(t.shape)
    return view.copy_(t)


def ring_inputs(case: Ring, mode: str) -> dict:
    dtype, g = DTYPES[mode], torch.Generator().manual_seed(7)
    rows, rank, m = sum(case.lengths), case.rank, len(case.widths)
    place = off_alignment if case.misaligned else (lambda t: t)
    inputs = {
        "x": [place(drawn(g, dtype, (rows, d))) for d in case.widths],
        "proj_weight": [drawn(g, dtype, (4 * rank, d), d ** -0.5) for d in case.widths],
        "proj_bias": [drawn(g, dtype, (4 * rank,), 0.3) for _ in case.widths],
        "map_weight": [drawn(g, dtype, (d, rank * rank), 1 / rank) for d in case.widths],
        "map_bias": [drawn(g, dtype, (d,)) for d in case.widths],
        "grad_out": [place(drawn(g, dtype, (rows, d))) for d in case.widths],
        "grad_target": [drawn(g, dtype, (rows, d)) for d in case.widths] if case.grad_target else [],
        "offsets": torch.tensor([0, *case.lengths]).cumsum(0),
        "seed": torch.tensor([case.seed or 2 ** 40 + 99]) if case.dropout else None,
        # Not the order of any list, so that the left and the right factor of a contraction differ.
        "ring": [[(j + i) % m for i in range(m - 1, 0, -1)] for j in range(m)],
        "scale": 0.7, "beta": 0.3, "dropout": case.dropout, "gated_target": case.gated_target,
    }
    return inputs


PARAMETERS = ("x", "proj_weight", "proj_bias", "map_weight", "map_bias")


def ring_plain(inputs: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """The algebra in plain torch and its gradient by autograd, in `dtype`."""
    leaves = {name: [t.to(dtype).requires_grad_() for t in inputs[name]] for name in PARAMETERS}
    outs, targets = tensor_ring_torch(leaves["x"], inputs["offsets"], *(leaves[name] for name in PARAMETERS[1:]), inputs["ring"],
                                      inputs["scale"], inputs["beta"], inputs["dropout"], inputs["seed"], inputs["gated_target"])
    given = list(zip(outs, inputs["grad_out"])) + list(zip(targets, inputs["grad_target"]))
    grads = torch.autograd.grad([o for o, _ in given], [t for name in PARAMETERS for t in leaves[name]],
                                [g.to(dtype) for _, g in given], allow_unused=True, materialize_grads=True)
    return named(outs, targets, grads, len(outs))


def named(outs: Sequence[Tensor], targets: Sequence[Tensor], grads: Sequence[Tensor], m: int) -> dict[str, Tensor]:
    names = [f"{name}[{j}]" for name in ("out", "target", *(f"grad {p}" for p in PARAMETERS)) for j in range(m)]
    return dict(zip(names, [t.detach() for t in (*outs, *targets, *grads)], strict=True))


def ring_cuda(inputs: dict) -> dict[str, Tensor]:
    arguments = [inputs["x"], inputs["offsets"], *(inputs[name] for name in PARAMETERS[1:])]
    settings = [[l for others in inputs["ring"] for l in others], inputs["scale"], inputs["beta"], inputs["dropout"], inputs["seed"],
                inputs["gated_target"]]
    m = len(inputs["x"])
    result = tensor_ring.forward(*arguments, *settings)
    grads = tensor_ring.backward(inputs["grad_out"], inputs["grad_target"], *arguments, result[2 * m:], *settings)
    return named(result[:m], result[m:2 * m], grads, m)


def mapping_inputs(case: Mapping, mode: str) -> dict:
    dtype, g = DTYPES[mode], torch.Generator().manual_seed(11)
    place = off_alignment if case.misaligned else (lambda t: t)
    inputs = {
        "x": [place(drawn(g, dtype, (case.rows, d))) for d in case.widths],
        "target": [place(drawn(g, dtype, (case.rows, d))) for d in case.widths],
        "weight": [drawn(g, dtype, (d, d), d ** -0.5) for d in case.widths],
        "bias": [drawn(g, dtype, (d,)) for d in case.widths],
        "coefficient": [0.5 + j for j in range(len(case.widths))],
        "grad_loss": torch.tensor(0.37),
    }
    # Far enough from zero that no dtype takes the other sign.
    for x, target, weight, bias in zip(inputs["x"], inputs["target"], inputs["weight"], inputs["bias"]):
        image = x.double() @ weight.double().T + bias.double()
        near = (image - target.double()).abs() < 0.25
        target.copy_(torch.where(near, target.double() + torch.where(image > target.double(), -0.5, 0.5), target.double()))
    return inputs


def mapping_plain(inputs: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    names = ("x", "target", "weight", "bias")
    leaves = {name: [t.to(dtype).requires_grad_() for t in inputs[name]] for name in names}
    loss = attention_mapping_torch(*(leaves[name] for name in names), inputs["coefficient"])
    grads = torch.autograd.grad(loss, [t for name in names for t in leaves[name]], inputs["grad_loss"].to(dtype))
    return named_mapping(loss.detach(), grads, len(inputs["x"]))


def named_mapping(loss: Tensor, grads: Sequence[Tensor], m: int) -> dict[str, Tensor]:
    return {"loss": loss, **dict(zip([f"grad {n}[{j}]" for n in ("x", "target", "weight", "bias") for j in range(m)], grads,
                                     strict=True))}


def mapping_cuda(inputs: dict) -> dict[str, Tensor]:
    loss, *sign = attention_mapping.forward(*(inputs[n] for n in ("x", "target", "weight", "bias", "coefficient")))
    grads = attention_mapping.backward(inputs["grad_loss"], inputs["x"], sign, inputs["weight"], inputs["coefficient"])
    return named_mapping(loss, grads, len(inputs["x"]))


OPS: dict[str, tuple[dict, Callable, Callable, Callable]] = {
    "tensor_ring": (RINGS, ring_inputs, ring_plain, ring_cuda),
    "attention_mapping": (MAPPINGS, mapping_inputs, mapping_plain, mapping_cuda),
}


@functools.cache
def expected(op: str, case: str, mode: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, plain torch in the mode's dtype, plain torch in float64."""
    cases, make, plain, _ = OPS[op]
    inputs = make(cases[case], mode)
    return inputs, plain(inputs, PLAIN[mode]), plain(inputs, torch.float64)


@contextmanager
def kernels(mode: str):
    """Fresh memory holds NaN, and float32 products run in TF32 in that mode."""
    fill, precision = torch.utils.deterministic.fill_uninitialized_memory, torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_float32_matmul_precision(precision)


def to(inputs: dict, device: str) -> dict:
    """A copy on a device; what started off alignment still does."""
    def move(v):
        if isinstance(v, Tensor):
            moved = v.to(device)
            return off_alignment(moved) if v.numel() and v.data_ptr() % 16 and v.dtype != torch.int64 else moved
        return [move(e) for e in v] if isinstance(v, list) and v and isinstance(v[0], Tensor) else v
    return {name: move(v) for name, v in inputs.items()}


def check(op: str, case: str, mode: str, device: str = "cpu") -> dict[str, Tensor]:
    """Runs a case and judges every output and gradient; returns them."""
    inputs, plain, exact = expected(op, case, mode)
    with kernels(mode):
        result = OPS[op][3](inputs if device == "cpu" else to(inputs, device))
    for name, value in result.items():
        assert_close(f"{op}, {case}, {mode}: {name}", mode, value.cpu(), plain[name], exact[name])
    return result


@contextmanager
def shim(path: Path):
    """The backend calls the shim library at `path`; yields the function that sets the order of threads."""
    handle = cuda.load(path)
    handle.shim_configure.argtypes = [ctypes.c_int, ctypes.c_uint]
    before, cuda.library = cuda.library, lambda: handle
    try:
        yield lambda order, seed=0: handle.shim_configure(ORDERS[order], seed)
    finally:
        handle.shim_configure(0, 0)
        cuda.library = before


def main(path: str) -> None:
    with shim(Path(path)) as configure:
        for op, (cases, make, _, run) in OPS.items():
            for case in cases:
                for mode, order in (("float32", "ascending"), ("bfloat16", "shuffled")):
                    configure(order, 1)
                    with kernels(mode):
                        run(make(cases[case], mode))
                    print(op, case, mode, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
