"""y = x W^T + b through the fastest matrix product of the device, forward and backward.

    forward   y = x W^T + b
    backward  g_x = g W,   g_W = g^T x,   g_b = sum_n g

On a CPU torch sends float32 products to MKL, and has oneDNN too; this package has its own (csrc/cpu/linear.inl). Which is fastest depends on
the processor, so each product (forward, g_x and g_W) is timed once per process, shape and number of threads, with the tensors at hand, and
the winner kept. ADA2I_FAST_LINEAR = "mkl" | "onednn" | "native" | "auto" decides by name. oneDNN's entry in torch is private: where it is
missing or fails, "auto" goes without. The package's own float32 products come into question where the tier multiplies floats in AMX tiles,
as sums of three bf16 with all of a float's bits (csrc/cpu/gemm.inl); numbers below 1e-38 count as 0 there, and infinities give NaN. They take ReLU
and dropout along, and write large g_W past the caches: the optimiser reads it much later.

Under autocast to bfloat16 or float16 the products run in that dtype; g_W and g_b come out in the parameters' dtype, g_x in that of x. torch
has oneDNN for them: x and W are rounded once per call and the rounded ones kept for backward, so a weight is cast once per step, and g_W
is rounded to the 16 bits and widened again. This package's own products round a float32 W where they pack it, in either direction
(bfloat16, where the tier multiplies it), and write g_W in float32, with g_b from the same pass, as summed in float32. "auto" times the two
as above, y and g_x together with the cast; "native" takes its own, with any other name torch has them all.

On CUDA the library is cuBLAS. Under autocast the gradients of float32 tensors leave it in float32, as summed, without a rounding and a cast
between; g_b is a product with a row of ones, which takes a fraction of what a sum over rows takes. Everything else (other dtypes and devices,
tracing) is `F.linear`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends, cpu

__all__ = ["KEPT", "Branches", "branch", "here", "linear", "planned", "product_backward", "product_dtype", "product_forward"]

# oneDNN compiles a primitive for every shape and keeps 1,024 of them. A step has some 80 products, and packed batches have a number of
# rows each: beyond a dozen different ones every product would be compiled anew. oneDNN reads the variable at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

LIBRARIES = ("mkl", "onednn", "native", "auto")
_SMALL = 1 << 19                 # multiply-adds below which the choice does not matter

_chosen: dict[tuple, Any] = {}   # (product, rows as a power of two, inputs, outputs, threads, ..) -> library; ("planned", ..) -> their codes


@functools.cache
def why_no_onednn() -> str | None:
    """Why torch's oneDNN product cannot be used."""
    if not torch.backends.mkldnn.is_available():
        return "torch is built without oneDNN"
    try:
        x = torch.arange(6.0).reshape(2, 3)
        for a, w in ((x, x), (x.t(), x.t())):
            torch.testing.assert_close(_onednn(a, w, None, True), a @ w.t())
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        return f"torch's oneDNN product does not work: {error}"
    return None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    cpu.flush()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")


def _mkl(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    cpu.flush()
    return _relu(F.linear(x, weight, bias), relu)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *dropout) -> Tensor:
    return backends.module("linear", "cpu").forward(x, weight, bias, relu, *dropout)


def _relu(y: Tensor, relu: bool) -> Tensor:
    if not relu:
        return y
    cpu.flush()
    return y.relu_()


def _native_input(x: Tensor, weight: Tensor, bias: None, relu: bool) -> Tensor:
    return backends.module("linear", "cpu").input_gradient(x, weight.t())


_LIBRARIES: dict[str, Callable[..., Tensor]] = {"mkl": _mkl, "onednn": _onednn}
# By the kind of product; g_W of the package's own comes with g_b, in `_parameters`.
_RUN = {"forward": {**_LIBRARIES, "native": _native}, "input": {**_LIBRARIES, "native": _native_input}, "weight": _LIBRARIES}


def _backward(grad_out: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    """g_W, float32 [L, K], and with `bias` g_b, float32 [L]. grad_out: [N, L]; x: [N, K] in the same dtype, at most 32 bits."""
    return backends.module("linear", "cpu").backward(grad_out, x, bias)


def _library() -> str:
    name = os.environ.get("ADA2I_FAST_LINEAR") or "auto"
    if name not in LIBRARIES:
        raise ValueError(f"ADA2I_FAST_LINEAR: expected one of {', '.join(LIBRARIES)}, got {name!r}")
    if name == "onednn" and (reason := why_no_onednn()):
        raise RuntimeError(f"ADA2I_FAST_LINEAR=onednn: {reason}")
    if name == "native" and (reason := cpu.why_not()):
        raise RuntimeError(f"ADA2I_FAST_LINEAR=native: {reason}")
    return name


def _gradient(kind: str, grad: Tensor, other: Tensor, into: Tensor | None = None) -> Tensor:
    """g W of kind "input", with W for other, or g^T x of kind "weight"; added to `into`, if there is one."""
    if grad.dtype != torch.float32 or grad.numel() * other.shape[1] < _SMALL and _library() not in ("onednn", "native"):
        # As `_product` has it in the end, without the transposes that it begins with: they take as long as a small product.
        cpu.flush()
        found = grad.mm(other) if kind == "input" else grad.t().mm(other)
    else:
        x, weight = grad if kind == "input" else grad.t(), other.t()
        library = _choose(kind, x, weight)
        if library == "native" and into is not None and into.dtype == grad.dtype and into.is_contiguous():
            return backends.module("linear", "cpu").input_gradient(grad, other, into)
        found = _product(kind, library, x, weight)
    return _add(into, found)


def _add(into: Tensor | None, found: Tensor) -> Tensor:
    if into is None:
        return found
    cpu.flush()
    return into.add_(found)


def _product(kind: str, library: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x W^T (+ bias, ReLU) by a library, the one that `_choose` finds fastest for this kind of product at this size."""
    if library == "onednn":
        x, weight = (t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous() for t in (x, weight))
    return _RUN[kind][library](x, weight, bias, relu)


def _choose(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> str:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if kind == "weight":
        rows, inputs = inputs, rows
    library, key = _known(kind, x.dtype, rows, inputs, outputs)
    if library is None:
        runs = {name: run for name, run in _RUN[kind].items()
                if name == "mkl" or name == "onednn" and not why_no_onednn() or name == "native" and _own_is_fast(x.dtype)}
        library = _chosen[key] = _measure(runs, x, weight, bias, relu) if len(runs) > 1 else "mkl"
    return library


def _known(kind: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> tuple[str | None, tuple | None]:
    """The library, or None with the key in `_chosen` of one that has still to be measured. rows: the batch, the dimension that changes from step
    to step; in g_W it is the one summed over."""
    library, key = _library() if dtype == torch.float32 else "mkl", None
    if library == "native" and kind == "weight":                # `_parameters` has taken the package's own, or must not
        library = "auto"
    if library == "auto":
        if rows * inputs * outputs < _SMALL:
            library = "mkl"
        else:
            key = (kind, rows.bit_length(), inputs, outputs, torch.get_num_threads())
            library = _chosen.get(key)
    if library == "native" and not _may_take_own(dtype):        # ADA2I_FAST_BACKEND has the last word
        library = "mkl"
    return library, key


def _may_take_own(dtype: torch.dtype) -> str | None:
    """"auto" or "native" where this package's own products come into question."""
    library = _library()
    return library if library in ("auto", "native") and backends.best("linear", "cpu", dtype, 1) == "cpu" else None


def _own_is_fast(dtype: torch.dtype) -> bool:
    """Whether "auto" times them: without instructions for the dtype the tier is not worth the measurement."""
    tiers = {torch.float32: cpu.FLOAT32_TIERS, torch.bfloat16: cpu.BF16_TIERS}
    return dtype in tiers and _may_take_own(dtype) is not None and cpu.tier() in tiers[dtype]


def _measure(runs: dict[str, Callable], *arguments, other: Tensor | None = None) -> str:
    """The faster one, by the best of three alternating runs, each with `other`, if there is one, in the caches."""
    cpu.flush()
    best = {}
    for turn in range(4):
        for name, run in runs.items():
            if other is not None:
                other.add_(1)
            start = time.perf_counter()
            run(*arguments)
            cpu.flush()
            if turn:                                            # the first run sets up the library
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    return min(best, key=best.__getitem__)


def _parameters_torch(grad: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    found = [cpu.cast(_gradient("weight", grad, x), torch.float32)]
    cpu.flush()
    return found + [grad.sum(0, dtype=torch.float32)] if bias else found


_PARAMETERS: dict[str, Callable[..., list[Tensor]]] = {"torch": _parameters_torch, "native": _backward}


def _parameters(grad: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    """g_W and, with `bias`, g_b, in float32, by the faster way at this size, as `_product`."""
    (rows, inputs), outputs = x.shape, grad.shape[1]
    name, key = _parameters_known(x.dtype, rows, inputs, outputs, bias)
    if name is None:
        name = _chosen[key] = _measure(_PARAMETERS, grad, x, bias)
    return _PARAMETERS[name](grad, x, bias)


def _parameters_known(dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool) -> tuple[str | None, tuple | None]:
    """As `_known`."""
    library = _may_take_own(dtype)
    if library != "auto":
        return library or "torch", None
    if rows * inputs * outputs < _SMALL:
        return "torch" if dtype == torch.float32 else "native", None
    key = ("parameters", rows.bit_length(), inputs, outputs, torch.get_num_threads(), dtype, bias)
    if key not in _chosen and dtype == torch.float32 and not _own_is_fast(dtype):
        _chosen[key] = "torch"
    return _chosen.get(key), key


def _rounding_torch(x: Tensor, weight: Tensor) -> Tensor:
    cpu.flush()
    rounded = weight.to(x.dtype)
    return F.linear(x, rounded) @ rounded


def _rounding_native(x: Tensor, weight: Tensor) -> Tensor:
    module = backends.module("linear", "cpu")
    return module.input_gradient(module.forward(x, weight, None), weight)


# y, and g_x for a g of that shape, from a weight in float32.
_ROUNDING: dict[str, Callable[..., Tensor]] = {"torch": _rounding_torch, "native": _rounding_native}


def _packs_itself(x: Tensor, weight: Tensor) -> bool:
    """Whether the products of bf16 x with a float32 weight, which round it, are this package's own."""
    if x.is_cuda or weight.dtype != torch.float32:
        return False
    name, key = _rounding_known(x.dtype, *x.shape, weight.shape[0])
    if name is None:
        # A step finds the weight in memory; of two runs in a row the second one would not, and a cast would seem to cost little.
        name = _chosen[key] = _measure(_ROUNDING, x, weight, other=torch.zeros(1 << 23))
    return name == "native"


def _rounding_known(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> tuple[str | None, tuple | None]:
    """As `_known`."""
    library = _may_take_own(dtype) if dtype == torch.bfloat16 else None
    if library != "auto":
        return library or "torch", None
    if rows * inputs * outputs < _SMALL:
        return "torch", None
    key = ("rounding", rows.bit_length(), inputs, outputs, torch.get_num_threads())
    if key not in _chosen and not _own_is_fast(dtype):
        _chosen[key] = "torch"
    return _chosen.get(key), key


_CODES = {"mkl": 0, "torch": 0, "onednn": 1, "native": 2}      # as csrc/torch/encoder_layers.cpp has them
_ROUNDS = 3


def planned(dtype: torch.dtype, rows: int, shapes: Sequence[tuple[int, int, bool]], gradients: bool) -> tuple[int, ...] | None:
    """Whose the products in `dtype` with float32 weights are that `product_forward` and `product_backward` would take: for each of shapes (inputs,
    outputs, whether g_b is wanted) a code for y, g_x and g_W; None where one has still to be measured. gradients: whether the last two count."""
    key = ("planned", dtype, rows, shapes, gradients, torch.get_num_threads(), os.environ.get("ADA2I_FAST_LINEAR"),
           os.environ.get("ADA2I_FAST_BACKEND"))
    if key not in _chosen:
        found = [code for shape in shapes for code in _codes(dtype, rows, *shape, gradients)]
        if None in found:
            return None
        _chosen[key] = tuple(found)
    return _chosen[key]


def _codes(dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool, gradients: bool) -> Sequence[int | None]:
    rounds = _rounding_known(dtype, rows, inputs, outputs)[0]

    def code(kind: str, inputs: int, outputs: int) -> int | None:
        if rounds == "torch":
            return _CODES.get(_known(kind, dtype, rows, inputs, outputs)[0])
        return _ROUNDS if rounds else None

    if not gradients:
        return code("forward", inputs, outputs), 0, 0
    weight = _parameters_known(dtype, rows, inputs, outputs, bias)[0]
    if weight == "torch":
        weight = _known("weight", dtype, rows, outputs, inputs)[0]
    return code("forward", inputs, outputs), code("input", outputs, inputs), _CODES.get(weight)


KEPT = 5                         # what `product_forward` keeps, as flat as autograd saves tensors


def product_forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, dtype: torch.dtype,
                    rounded: Sequence[Tensor | None] = (None, None, None),
                    dropout: tuple[float, Tensor | None, int, str] | None = None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """`linear` where a library serves, computed in `dtype`: y, and KEPT tensors (or None) for `product_backward` alone to read. rounded: x,
    weight and bias in `dtype`, where somebody has them already. dropout: p, seed, stream and backend of `dropout.relu_dropout`, which then y is of
    x W^T and the bias, without `relu`: in one pass where the product is this package's own, and the same numbers, but for 16 bits, to which
    elsewhere the sum is rounded without its bias."""
    rounded_x, rounded_weight, rounded_bias = rounded
    rounded_x = cpu.cast(x, dtype) if rounded_x is None else rounded_x
    if itself := _packs_itself(rounded_x, weight):
        library, rounded_weight = "native", None
    else:
        rounded_weight = cpu.cast(weight, dtype) if rounded_weight is None else rounded_weight
        if rounded_bias is None and bias is not None and dropout is None:
            rounded_bias = cpu.cast(bias, dtype)
        library = None if x.is_cuda else _choose("forward", rounded_x, rounded_weight, rounded_bias, relu)
    if library == "native":
        y = _native(rounded_x, weight if itself else rounded_weight, None if bias is None else cpu.cast(bias, torch.float32),
                    relu or dropout is not None, *(dropout or ())[:3])
    else:
        if library is None:
            y = _relu(F.linear(rounded_x, rounded_weight, rounded_bias), relu)
        else:
            y = _product("forward", library, rounded_x, rounded_weight, rounded_bias, relu)
        if dropout is not None:
            *settings, backend = dropout
            y = backends.module("dropout", backend).relu_forward(y, bias, *settings)
    return y, (x, weight, rounded_x, rounded_weight, y if relu else None)


Branch = Callable[..., Any]             # calls its first argument with the others, which are tensors


def product_backward(grad: Tensor, kept: Sequence[Tensor | None], needs_x: bool, needs_weight: bool, needs_bias: bool,
                     bias_dtype: torch.dtype | None, into: Tensor | None = None,
                     beside: Branch | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias in their dtypes, None for those not needed. into: a gradient that x has from elsewhere, which this one is
    added to. beside: from `branch`, for the gradients of the parameters. Called without autocast; in grad mode (create_graph=True) they are
    expressions with derivatives of their own."""
    x, weight, rounded_x, rounded_weight, y = kept
    if y is not None:
        cpu.flush()
        grad = grad * (y > 0)
    if torch.is_grad_enabled():
        cpu.flush()
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if needs_x else None
        grad_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, grad.sum(0, dtype=bias_dtype) if needs_bias else None
    if grad.is_cuda:
        beside = beside or here
        grad_weight = beside(lambda g, t: _multiplied(g.t(), t, weight.dtype), grad, rounded_x) if needs_weight else None
        grad_bias = beside(lambda g: _multiplied(g.new_ones(1, g.shape[0]), g, bias_dtype)[0], grad) if needs_bias else None
        return _multiplied(grad, rounded_weight, x.dtype, into) if needs_x else None, grad_weight, grad_bias
    grad_x = None
    if needs_x:
        if rounded_weight is None:
            grad_x = _add(into, cpu.cast(backends.module("linear", "cpu").input_gradient(grad, weight), x.dtype))
        elif x.dtype == grad.dtype:
            grad_x = _gradient("input", grad, rounded_weight, into)
        else:
            grad_x = _add(into, cpu.cast(_gradient("input", grad, rounded_weight), x.dtype))
    if not needs_weight:
        cpu.flush()
        return grad_x, None, grad.sum(0, dtype=bias_dtype) if needs_bias else None
    grad_weight, *grad_bias = _parameters(grad, rounded_x, needs_bias)
    return grad_x, cpu.cast(grad_weight, weight.dtype), cpu.cast(grad_bias[0], bias_dtype) if needs_bias else None


# ------------------------------------------------------------------------------------------------------------------- on CUDA


def _multiplied(a: Tensor, b: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """a b in `dtype`, one that both have or float32; added to `into`, of that dtype too, if there is one."""
    if dtype == a.dtype:
        return a.mm(b) if into is None else into.addmm_(a, b)
    return torch.mm(a, b, out_dtype=dtype) if into is None else torch.addmm(into, a, b, out_dtype=dtype, out=into)


def here(call: Callable[..., Any], *tensors: Tensor) -> Any:
    """The `Branch` that is none."""
    return call(*tensors)


@functools.cache
def _side(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The one beside a stream, given by its address: of low priority, so that what is waited for goes first."""
    return torch.cuda.Stream(device, priority=0)


class Branches:
    """`with Branches.joined(device) as branches`: each `branch` begun inside ends where this context does, instead of its own.

    For a backward pass whose gradients nobody reads before. Autograd hands a gradient on to its parameter without a launch, unless it has to
    add to one, or calls a hook, or the parameter is made from others: `all_in` says afterwards whether all went the short way.
    """

    _open: Branches | None = None           # one capture at a time; backward runs on another thread

    def __init__(self) -> None:
        self._sides: set[torch.cuda.Stream] = set()
        self._kept: list[tuple[Tensor, ...]] = []
        self._made: list[int] = []

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: torch.device) -> Iterator[Branches]:
        branches = cls._open = cls()
        try:
            yield branches
        finally:
            cls._open = None
        main = torch.cuda.current_stream(device)
        for side in branches._sides:
            main.wait_stream(side)
        branches._kept.clear()

    def all_in(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether everything that was made beside lies in these."""
        made = set(self._made)                                  # smaller where memory was given away again
        return len(made) == len(self._made) and made <= {_address(t) for t in gradients if t is not None}

    def _take(self, side: torch.cuda.Stream, kept: list[tuple[Tensor, ...]], made: list[int]) -> None:
        self._sides.add(side)
        self._kept += kept
        self._made += made


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class branch:
    """`with branch(device) as beside`: for what the rest does not wait for, such as gradients of parameters in backward.

    Where a CUDA graph is captured, what `beside` is given to call becomes a branch of its own, which ends where the context does, or where
    `Branches.joined` around it does. Elsewhere it is `here`, which calls at once: more streams would only take the host longer. Calls make the
    tensors that they return, and take all others as arguments.
    """

    __slots__ = ("_device", "_main", "_side", "_kept", "_made")

    def __init__(self, device: torch.device) -> None:
        self._device, self._kept = device, None

    def __enter__(self) -> Branch:
        if self._device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
            return here
        self._main = torch.cuda.current_stream(self._device)
        self._side = _side(self._device, self._main.cuda_stream)
        self._kept: list[tuple[Tensor, ...]] = []
        self._made: list[int] = []
        return self._beside

    def _beside(self, call: Callable[..., Any], *tensors: Tensor) -> Any:
        self._kept.append(tensors)                              # or their memory could be given away on `main` before `side` has read them
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            found = call(*tensors)
        # Addresses: autograd copies a gradient that anybody else holds.
        self._made += [_address(t) for t in ([found] if isinstance(found, Tensor) else found)]
        return found

    def __exit__(self, *_) -> None:
        if self._kept:
            if Branches._open is None:
                self._main.wait_stream(self._side)
            else:
                Branches._open._take(self._side, self._kept, self._made)


class _Linear(torch.autograd.Function):
    """dtype: that of the products."""

    @staticmethod
    def forward(ctx, x, weight, bias, relu, dtype, rounded):
        y, kept = product_forward(x, weight, bias, relu, dtype, rounded)
        ctx.save_for_backward(*kept)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False), branch(grad.device) as beside:
            return *product_backward(grad, ctx.saved_tensors, *ctx.needs_input_grad[:3], ctx.bias_dtype, beside=beside), None, None, None


def product_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """That of the products of `linear`; None where plain `F.linear` serves."""
    device = x.device.type
    if not backends.eager((x, weight)) or x.dim() != 2 or x.numel() == 0 or weight.numel() == 0 or \
            not (device == "cpu" or device == "cuda" and torch.version.cuda):
        return None
    if torch.is_autocast_enabled(device):
        eligible = all(t is None or (t.is_floating_point() and t.dtype != torch.float64) for t in (x, weight, bias))
        return torch.get_autocast_dtype(device) if eligible else None
    return torch.float32 if x.dtype == weight.dtype == torch.float32 else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False, backend: str = "auto",
           rounded: Sequence[Tensor | None] = (None, None, None)) -> Tensor:
    """x: [N, K]; weight: [L, K]; bias: [L] or None; relu: max(0, .) of the result. Returns [N, L].

    rounded: x, weight and bias in autocast's dtype, where somebody has them already.  backend: "torch" is plain `F.linear`; "auto" and the others take the fastest library of the tensors' device. Under autocast
    the result has autocast's dtype.
    """
    dtype = None if backend == "torch" else product_dtype(x, weight, bias)
    if dtype is None:
        if not torch.compiler.is_compiling():
            cpu.flush()
        y = F.linear(x, weight, bias)
        return F.relu(y) if relu else y
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias, relu, dtype, rounded)
    return product_forward(x, weight, bias, relu, dtype, rounded)[0]
