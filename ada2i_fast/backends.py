"""Which backend serves an op for these tensors, and why not the others.

| backend | package | serves |
|---|---|---|
| `triton` | `ada2i_fast.kernels` | CUDA tensors |
| `cuda` | `ada2i_fast.cuda` over `lib/libada2i_cuda.so` | CUDA tensors |
| `cpu` | `ada2i_fast.cpu` over `lib/libada2i_cpu.so` | CPU tensors |
| `torch` | the op's own file | everything |

A backend's package has a module per op that it brings, with `forward` and `backward`. Their arguments are those of the registered
op without `backend`; `ring` comes flattened. They return flat lists:

    tensor_ring.forward         M out, M target, M projections [N, 4R], M means A [B, R, R], M attentions [N, D_j]
    tensor_ring.backward        gradients of x, proj_weight, proj_bias, map_weight, map_bias, M each
    attention_mapping.forward   loss (float32, or float64 for float64 inputs), M signs int8 [N, D_j]
    attention_mapping.backward  gradients of x, target, weight, bias, M each
    cosine_fusion.forward       joint logits, log-probabilities, norms [M, N]; with labels scores and ratio
    cosine_fusion.backward      gradients of hidden, M of them, of weight and, with one, of bias
    head_losses.forward         log-probabilities; with labels loss and number of rows that have one
    head_losses.backward        gradients of the joint logits and, with one, of the head's four parameters

`dropout` (relu_forward, relu_backward, norm_forward, norm_backward), `dialogue_attention` and `balanced_adam` (measure, update, on CUDA
settings, on the CPU modulate), `afw_layer` (both of the above in one call), and on the CPU alone `linear`, are called as their op files say.

The target may be the attention itself, where that is what the loss compares with. Without `with_target`, the last argument of
tensor_ring.forward, nobody reads anything but the outputs, and a backend may return them alone. A module may have `why_not(device, dtype, widths,
rank) -> str | None` for limits of its own.

`auto` takes the first of the table that can serve, but `cuda` before `triton` for so many rows as `CUDA_FIRST` says (all on an H200):
eager, where the host counts, for it has fewer launches (500 rows: 1.5 ms with TF32 and 2.15 in bf16 instead of 2.4 and 3.3; 50,000 in bf16: 9.2
instead of 6.0); in a CUDA graph, where kernels do, for float32 whose products may not run in TF32, which takes Triton two thirds longer for 500
rows, and half as long for 50,000. Compiled code, where rows are a symbol, does the latter for any number. `backend=` of an op, or
ADA2I_FAST_BACKEND for all ops, names one; what cannot serve then raises. Nothing here touches a driver before a tensor lives on its device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import operator
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["BACKENDS", "MAX_RANK", "apply", "best", "check_shapes", "choose", "explain", "info", "module", "uniform"]

BACKENDS = ("triton", "cuda", "cpu", "torch")
MAX_RANK = 32
# Rows up to which the CUDA kernels come first, by what serves: eager code, a CUDA graph, compiled code; of float32 without TF32, and else.
CUDA_FIRST = {"eager": (40_000, 20_000), "graph": (5_000, 0), "compiled": (sys.maxsize, 0)}
LIBRARY_FOLDER = Path(__file__).parent / "lib"

_DTYPE, _SHAPE = map(operator.attrgetter, ("dtype", "shape"))
_PLAIN = {Tensor, torch.nn.Parameter}
_PACKAGES = {"triton": "kernels", "cuda": "cuda", "cpu": "cpu"}
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}


@functools.cache
def module(op: str, backend: str) -> ModuleType:
    """The module with `forward` and `backward` of an op; ImportError where the backend does not bring it."""
    return importlib.import_module(f".{_PACKAGES[backend]}.{op}", __package__)


@functools.cache
def _installed(op: str, backend: str) -> str | None:
    """Why a backend cannot serve this op on any tensor."""
    package = _PACKAGES[backend]
    if importlib.util.find_spec(f"{__package__}.{package}") is None or \
            importlib.util.find_spec(f"{__package__}.{package}.{op}") is None:
        return f"it does not bring {op}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend in ("cpu", "cuda"):
        return importlib.import_module(f".{package}", __package__).why_not()
    return None


def _why_not(op: str, backend: str, device: str, dtype: torch.dtype, widths: tuple[int, ...], rank: int) -> str | None:
    if backend == "torch":
        return None
    needed = "cpu" if backend == "cpu" else "cuda"
    if device != needed and not (backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the tensors are on {device}, it serves {needed}"
    if reason := _installed(op, backend):
        return reason
    if dtype not in _DTYPES[backend]:
        return f"it does not know {str(dtype).removeprefix('torch.')}"
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    own = getattr(module(op, backend), "why_not", None)
    return own(device, dtype, widths, rank) if own else None


@torch.compiler.assume_constant_result
def _decide(op: str, backend: str, device: str, dtype: torch.dtype, widths: tuple[int, ...], rank: int, rows: int | None = None) -> str:
    """rows: None in compiled code."""
    cuda_first = device == "cuda" and _comes_cuda_first(dtype, rows)
    return _cached(op, backend, os.environ.get("ADA2I_FAST_BACKEND") or "", device, dtype, widths, rank, cuda_first)


def _comes_cuda_first(dtype: torch.dtype, rows: int | None) -> bool:
    limits = CUDA_FIRST["compiled" if rows is None else "graph" if _graphs.wanted else "eager"]
    return (rows or 0) <= limits[dtype != torch.float32 or tf32()] > 0


class _Graphs(threading.local):
    wanted = False


_graphs = _Graphs()


@contextlib.contextmanager
def for_a_graph() -> Iterator[None]:
    """What this thread calls inside is, or will be, in a CUDA graph."""
    before, _graphs.wanted = _graphs.wanted, True
    try:
        yield
    finally:
        _graphs.wanted = before


@functools.lru_cache(maxsize=1024)
def _cached(op: str, backend: str, forced: str, device: str, dtype: torch.dtype, widths: tuple[int, ...], rank: int,
            cuda_first: bool = False) -> str:
    for name in (backend, forced):
        if name not in ("", "auto", *BACKENDS):
            raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {name!r}")
    wanted = backend if backend != "auto" else forced if forced not in ("", "auto") else None
    if wanted:
        if reason := _why_not(op, wanted, device, dtype, widths, rank):
            raise RuntimeError(f"{op}: backend {wanted!r} cannot serve this input: {reason}")
        return wanted
    return next(name for name in (("cuda", "triton", "cpu", "torch") if cuda_first else BACKENDS)
                if not (name == "triton" and device == "cpu") and _why_not(op, name, device, dtype, widths, rank) is None)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over elements of a dtype are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def tf32() -> bool:
    """Whether float32 products on CUDA may run in TF32, as torch's own may; whichever of its settings says so."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def eager(tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain tensors that nobody traces, compiles or transforms, so that calls past torch's dispatcher are right."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None and \
        {*map(type, tensors)} <= _PLAIN and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


def apply(function: type[torch.autograd.Function], *args: object) -> object:
    """`function.apply` where all tensors are `eager`: past its search in Python for what functorch has wrapped, a fifth of its time."""
    return super(torch.autograd.Function, function).apply(*args)


def uniform(tensors: Sequence[Tensor], index: int, dtype: torch.dtype | None = None) -> bool:
    """Whether all are on the device of this number, -1 for the CPU, and of this dtype. Through `map`, for there may be hundreds."""
    return {*map(Tensor.get_device, tensors)} <= {index} and (dtype is None or {*map(_DTYPE, tensors)} <= {dtype})


def check_shapes(like: Tensor, **arguments: tuple[Tensor | Sequence[Tensor], Sequence]) -> None:
    """ValueError unless these tensors, or sequences of them, have their shapes and lie where `like` does: the libraries trust them."""
    for name, (tensors, shapes) in arguments.items():
        one = isinstance(tensors, Tensor)
        if one:
            tensors, shapes = [tensors], [shapes]
        elif not torch.compiler.is_compiling() and [*map(_SHAPE, tensors)] == shapes and \
                uniform(tensors, like.get_device()):
            continue                                            # an optimiser has hundreds
        if len(tensors) != len(shapes):
            raise ValueError(f"{name}: expected {len(shapes)} tensors, got {len(tensors)}")
        for j, (t, shape) in enumerate(zip(tensors, shapes)):
            if t.shape != shape or t.device != like.device:
                raise ValueError(f"{name if one else f'{name}[{j}]'}: expected {list(shape)} on {like.device}, got {list(t.shape)} on {t.device}")


def choose(op: str, x: Sequence[Tensor], backend: str = "auto", rank: int = 1) -> str:
    """The backend that serves `op` for the M tensors x [N, D_j].

    backend: "auto" or a name; RuntimeError with the reason where the named one cannot serve.
    """
    return _decide(op, backend, x[0].device.type, x[0].dtype, tuple([_fixed(x_j.shape[1]) for x_j in x]), _fixed(rank),
                   None if torch.compiler.is_compiling() else x[0].shape[0])


def _fixed(size: int) -> int:
    """The number behind a size that torch.compile may hold as a symbol: widths and rank are fixed in compiled code."""
    return len(range(size))


@torch.compiler.assume_constant_result
def best(op: str, device: str, dtype: torch.dtype, *widths: int) -> str:
    """The backend that serves `op` best, for ops whose caller does not name one; only ADA2I_FAST_BACKEND=torch has a say."""
    forced = "torch" if os.environ.get("ADA2I_FAST_BACKEND") == "torch" else ""
    return _cached(op, "auto", forced, device, dtype, widths, 1)


def explain(op: str, *tensors: Tensor, rank: int = 1) -> str:
    """Which backend serves `op` for these tensors [N, D_j], and for each of the others why it does not; a line each."""
    facts = (tensors[0].device.type, tensors[0].dtype, tuple([t.shape[1] for t in tensors]), rank)
    try:
        served = _decide(op, "auto", *facts, tensors[0].shape[0])
        lines = [f"{op}: {served}" + (" (ADA2I_FAST_BACKEND)" if os.environ.get("ADA2I_FAST_BACKEND") else "")]
    except RuntimeError as error:
        served, lines = None, [str(error)]
    for name in BACKENDS:
        if name != served:
            lines.append(f"  not {name}: {_why_not(op, name, *facts) or 'it could, but another comes first'}")
    return "\n".join(lines)


def build_facts(library: str) -> dict[str, str | list[str]]:
    """What the build notes about a native library: file, compiler, what for; or the reason why it was left out."""
    path = LIBRARY_FOLDER / "build_info.json"
    return json.loads(path.read_text()).get(library, {}) if path.exists() else {}


def build_reason(library: str) -> str:
    """Why the build left a native library out."""
    reason = build_facts(library).get("reason")
    return f"not built: {reason}" if reason else "not built: install the package (pip install -e .)"


def load_library(name: str, path: Path, version: int) -> ctypes.CDLL:
    """The native library at `path`. Raises RuntimeError if it does not load, or was built from other sources."""
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{error}; build it again (pip install -e .)") from None
    number = getattr(handle, f"ada2i_{name}_abi_version", None)
    check_version(number() if number else None, version)
    return handle


def check_version(found: int | None, version: int) -> None:
    """RuntimeError unless what was built has this version of the interface."""
    if found != version:
        raise RuntimeError(f"it speaks version {found} of the interface, this package {version}: build it again (pip install -e .)")


def info() -> dict[str, str]:
    """What was built, for what, with what, and why not the rest: a line per backend."""
    lines = {}
    for line, name, package in (("backend cpu", "cpu", ".cpu"), ("layers in one call", "torch", ".node"), ("backend cuda", "cuda", ".cuda")):
        reason = importlib.import_module(package, __package__).why_not()
        described = ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in build_facts(name).items()
                              if key not in ("library", "reason"))
        lines[line] = "; ".join(filter(None, [f"unavailable: {reason}" if reason else "available", described]))
    if not importlib.import_module(".cpu", __package__).why_not():
        lines["backend cpu"] += f"; runs {importlib.import_module('.cpu', __package__).tier()} here"
    if importlib.util.find_spec("triton") is None:
        lines["backend triton"] = "unavailable: triton is not installed"
    else:
        lines["backend triton"] = f"triton {importlib.metadata.version('triton')}; compiles for the device at hand"
    return lines
