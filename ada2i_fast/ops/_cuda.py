"""Calls into libada2i_cuda.so, the CUDA backend: a C ABI over raw pointers, so one build serves every version of torch.

Nothing here synchronises: memory comes from torch's allocator, work goes to the current stream, and the launchers only
enqueue. So every call can be captured in a CUDA graph. Arguments are checked by the callers in `tensor_ring.py` and
`attention_mapping.py`; what is checked here is what would read out of bounds.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from .dropout import threshold

__all__ = ["attention_mapping_backward", "attention_mapping_forward", "library_status", "tensor_ring_backward",
           "tensor_ring_forward", "why_not"]

LIBRARY = Path(__file__).resolve().parents[1] / "lib" / "libada2i_cuda.so"
ABI_VERSION = 1
MAX_MODALITIES = 8
MAX_RANK = 32
MIN_CAPABILITY = (8, 0)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TF32 = 3

_Pointers = ctypes.c_void_p * MAX_MODALITIES
_Sizes = ctypes.c_int64 * MAX_MODALITIES
_Ints = ctypes.c_int32 * MAX_MODALITIES


class _TensorRing(ctypes.Structure):
    """struct TensorRing of csrc/cuda/tensor_ring.cuh, field by field."""

    _fields_ = [
        ("dtype", ctypes.c_int32), ("count", ctypes.c_int32), ("rank", ctypes.c_int32), ("gated_target", ctypes.c_int32),
        ("rows", ctypes.c_int64), ("dialogues", ctypes.c_int64),
        ("scale", ctypes.c_float), ("beta", ctypes.c_float), ("keep_scale", ctypes.c_float), ("threshold", ctypes.c_uint32),
        ("offsets", ctypes.c_void_p), ("seed", ctypes.c_void_p), ("ring", _Ints * MAX_MODALITIES), ("width", _Sizes),
        ("x", _Pointers), ("proj_weight", _Pointers), ("proj_bias", _Pointers), ("map_weight", _Pointers),
        ("map_bias", _Pointers), ("proj", _Pointers), ("average", _Pointers), ("attention", _Pointers), ("out", _Pointers),
        ("target", _Pointers), ("grad_out", _Pointers), ("grad_target", _Pointers), ("grad_x", _Pointers),
        ("grad_proj_weight", _Pointers), ("grad_proj_bias", _Pointers), ("grad_map_weight", _Pointers),
        ("grad_map_bias", _Pointers), ("scratch", ctypes.c_void_p),
        ("vector", _Ints), ("map_vector", _Ints), ("splits", ctypes.c_int32), ("segment", _Pointers), ("cores", _Pointers),
        ("grad_cores", _Pointers), ("grad_average", _Pointers), ("grad_attention", _Pointers), ("grad_proj", _Pointers),
        ("piece", _Pointers),
    ]


class _AttentionMapping(ctypes.Structure):
    """struct AttentionMapping of csrc/cuda/attention_mapping.cuh, field by field."""

    _fields_ = [
        ("dtype", ctypes.c_int32), ("count", ctypes.c_int32), ("rows", ctypes.c_int64),
        ("coefficient", ctypes.c_float * MAX_MODALITIES), ("width", _Sizes),
        ("x", _Pointers), ("target", _Pointers), ("weight", _Pointers), ("bias", _Pointers), ("sign", _Pointers),
        ("loss", ctypes.c_void_p), ("grad_loss", ctypes.c_void_p), ("grad_x", _Pointers), ("grad_target", _Pointers),
        ("grad_weight", _Pointers), ("grad_bias", _Pointers), ("scratch", ctypes.c_void_p),
        ("vector", _Ints), ("splits", ctypes.c_int32), ("input_blocks", ctypes.c_int64), ("blocks", ctypes.c_int64),
        ("partial", ctypes.c_void_p), ("piece", _Pointers),
    ]


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its signatures declared. Raises OSError, or RuntimeError if it was built from other sources."""
    library = ctypes.CDLL(str(path))
    version = library.ada2i_cuda_abi_version()
    if version != ABI_VERSION:
        raise RuntimeError(f"{path} speaks version {version} of the interface, this package {ABI_VERSION}: build it again")
    library.ada2i_cuda_error_string.argtypes = [ctypes.c_int]
    library.ada2i_cuda_error_string.restype = ctypes.c_char_p
    for op, struct in (("tensor_ring", _TensorRing), ("attention_mapping", _AttentionMapping)):
        for direction in ("forward", "backward"):
            call = getattr(library, f"ada2i_cuda_{op}_{direction}")
            call.argtypes = [ctypes.POINTER(struct), ctypes.c_int64, ctypes.c_void_p]
            call.restype = ctypes.c_int
            size = getattr(library, f"ada2i_cuda_{op}_{direction}_scratch")
            size.argtypes = [ctypes.POINTER(struct), ctypes.c_int64]
            size.restype = ctypes.c_int64
    return library


@functools.cache
def _load_once() -> tuple[ctypes.CDLL | None, str | None]:
    if not LIBRARY.exists():
        return None, f"the CUDA library was not built: {LIBRARY} does not exist"
    if torch.version.cuda is None:
        return None, "this torch was built without CUDA"
    try:
        return load(LIBRARY), None
    except (OSError, RuntimeError, AttributeError) as error:
        return None, f"the CUDA library does not load: {error}"


def library_status() -> str | None:
    """None where the library is loaded, else why it is not."""
    return _load_once()[1]


def _library() -> ctypes.CDLL:
    library, reason = _load_once()
    if library is None:
        raise RuntimeError(reason)
    return library


def why_not(tensors: Sequence[Tensor], rank: int = 1, modalities: int = 1) -> str | None:
    """None if this backend serves tensors like these, else the reason."""
    reason = library_status()
    if reason is not None:
        return reason
    if modalities > MAX_MODALITIES:
        return f"{modalities} modalities: the CUDA kernels take at most {MAX_MODALITIES}"
    if not 1 <= rank <= MAX_RANK:
        return f"rank {rank}: the CUDA kernels take 1 to {MAX_RANK}"
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"a tensor is on {tensor.device}, not on a CUDA device"
        if tensor.dtype not in _DTYPES:
            return f"dtype {tensor.dtype}: the CUDA kernels take float32, bfloat16 and float16"
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
            return "the tensors differ in dtype or device"
    if tensors and torch.cuda.get_device_capability(tensors[0].device) < MIN_CAPABILITY:
        return f"the device is older than compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def _dtype(dtype: torch.dtype) -> int:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _TF32
    return _DTYPES[dtype]


def _set(pointers: ctypes.Array, tensors: Sequence[Tensor]) -> None:
    for j, tensor in enumerate(tensors):
        pointers[j] = tensor.data_ptr()


def _prepare(tensors: Sequence[Tensor], like: Tensor, shapes: Sequence[tuple[int, ...]], name: str) -> list[Tensor]:
    """Contiguous, in the dtype and on the device of `like`. The kernels trust these shapes."""
    if len(tensors) != len(shapes):
        raise ValueError(f"{name}: expected {len(shapes)} tensors, got {len(tensors)}")
    for tensor, shape in zip(tensors, shapes):
        if tuple(tensor.shape) != shape or tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(f"{name}: expected {like.dtype} {list(shape)} on {like.device}, got {tensor.dtype} "
                             f"{list(tensor.shape)} on {tensor.device}")
    return [tensor.contiguous() for tensor in tensors]


def _call(name: str, args: ctypes.Structure, like: Tensor) -> None:
    """Brings scratch memory, enqueues on the current stream of `like`'s device, raises RuntimeError on a CUDA error."""
    library = _library()
    call: Callable = getattr(library, f"ada2i_cuda_{name}")
    size = getattr(library, f"ada2i_cuda_{name}_scratch")(args, ctypes.sizeof(args))
    if size < 0:
        raise ValueError(f"{name}: arguments out of the kernels' range")
    scratch = torch.empty(size, dtype=torch.uint8, device=like.device)
    args.scratch = scratch.data_ptr()
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else None
        error = call(args, ctypes.sizeof(args), stream)
    if error:
        raise RuntimeError(f"{name}: {library.ada2i_cuda_error_string(error).decode()}")


def _ring_args(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
               map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float,
               dropout: float, seed: Tensor | None, gated_target: bool) -> tuple[_TensorRing, list[Tensor]]:
    """The arguments that both directions share, and the tensors that must outlive the call."""
    count, (rows, _), rank = len(x), x[0].shape, proj_weight[0].shape[0] // 4
    if not 1 <= count <= MAX_MODALITIES or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the CUDA kernels take 1 to {MAX_MODALITIES} modalities and ranks 1 to {MAX_RANK}, "
                         f"got {count} and {rank}")
    if x[0].dtype not in _DTYPES:
        raise ValueError(f"dtype {x[0].dtype}: the CUDA kernels take float32, bfloat16 and float16")
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.device != x[0].device:
        raise ValueError("offsets: expected int64 [B + 1] on the device of x")
    if len(ring) != count * (count - 1):
        raise ValueError(f"ring: expected {count * (count - 1)} modalities, got {len(ring)}")
    if dropout > 0.0 and (seed is None or seed.dtype != torch.int64 or seed.device != x[0].device):
        raise ValueError("dropout needs a seed: int64 [1] on the device of x")
    widths = [t.shape[1] for t in x]
    like = x[0]
    inputs = {
        "x": _prepare(x, like, [(rows, d) for d in widths], "x"),
        "proj_weight": _prepare(proj_weight, like, [(4 * rank, d) for d in widths], "proj_weight"),
        "proj_bias": _prepare(proj_bias, like, [(4 * rank,)] * count, "proj_bias"),
        "map_weight": _prepare(map_weight, like, [(d, rank * rank) for d in widths], "map_weight"),
        "map_bias": _prepare(map_bias, like, [(d,) for d in widths], "map_bias"),
    }
    offsets = offsets.contiguous()
    alive = [offsets, *(t for tensors in inputs.values() for t in tensors)]
    args = _TensorRing(dtype=_dtype(like.dtype), count=count, rank=rank, gated_target=gated_target, rows=rows,
                       dialogues=offsets.numel() - 1, scale=scale, beta=beta, keep_scale=1.0)
    args.offsets = offsets.data_ptr()
    if dropout > 0.0:
        args.seed, args.threshold = seed.data_ptr(), threshold(dropout)
        args.keep_scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    for j in range(count):
        args.width[j] = widths[j]
        for l in range(count - 1):
            args.ring[j][l] = ring[j * (count - 1) + l]
    for name, tensors in inputs.items():
        _set(getattr(args, name), tensors)
    return args, alive


def tensor_ring_forward(x: Sequence[Tensor], offsets: Tensor, proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor],
                        map_weight: Sequence[Tensor], map_bias: Sequence[Tensor], ring: Sequence[int], scale: float,
                        beta: float, dropout: float, seed: Tensor | None, gated_target: bool,
                        with_target: bool) -> list[Tensor]:
    """Shapes as in `tensor_ring`; ring flattened to M * (M - 1) numbers. Three launches.

    Returns M outputs [N, D_j]; M targets [N, D_j] if `with_target`; then what backward needs: M projections [N, 4R], M
    averages float32 [B, R, R], M attentions [N, D_j] (the same tensors as the targets where the target is the attention).
    """
    args, alive = _ring_args(x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed,
                             gated_target)
    like, rows, rank, dialogues = x[0], args.rows, args.rank, args.dialogues
    out = [t.new_empty(t.shape) for t in x]
    attention = [t.new_empty(t.shape) for t in x]
    proj = [t.new_empty(rows, 4 * rank) for t in x]
    average = [t.new_empty(dialogues, rank, rank, dtype=torch.float32) for t in x]
    target: list[Tensor] = []
    if with_target:
        target = [t.new_empty(t.shape) for t in x] if gated_target else attention
        if gated_target:
            _set(args.target, target)
    for name, tensors in (("out", out), ("attention", attention), ("proj", proj), ("average", average)):
        _set(getattr(args, name), tensors)
    _call("tensor_ring_forward", args, like)
    del alive
    return [*out, *target, *proj, *average, *attention]


def tensor_ring_backward(grad_out: Sequence[Tensor], grad_target: Sequence[Tensor], x: Sequence[Tensor], offsets: Tensor,
                         proj_weight: Sequence[Tensor], proj_bias: Sequence[Tensor], map_weight: Sequence[Tensor],
                         map_bias: Sequence[Tensor], saved: Sequence[Tensor], ring: Sequence[int], scale: float, beta: float,
                         dropout: float, seed: Tensor | None, gated_target: bool) -> list[Tensor]:
    """grad_target may be empty; saved: as `tensor_ring_forward` returns it. Five launches, four for one modality.

    Returns the gradients of x, proj_weight, proj_bias, map_weight, map_bias, M tensors each.
    """
    args, alive = _ring_args(x, offsets, proj_weight, proj_bias, map_weight, map_bias, ring, scale, beta, dropout, seed,
                             gated_target)
    count, like, rank = args.count, x[0], args.rank
    shapes = [tuple(t.shape) for t in x]
    if len(saved) != 3 * count:
        raise ValueError(f"saved: expected {3 * count} tensors, got {len(saved)}")
    average = list(saved[count:2 * count])
    for tensor in average:
        if tuple(tensor.shape) != (args.dialogues, rank, rank) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"saved: expected averages float32 {[args.dialogues, rank, rank]}")
    inputs = {
        "grad_out": _prepare(grad_out, like, shapes, "grad_out"),
        "grad_target": _prepare(grad_target, like, shapes, "grad_target") if grad_target else [],
        "proj": _prepare(saved[:count], like, [(args.rows, 4 * rank)] * count, "saved"),
        "average": average,
        "attention": _prepare(saved[2 * count:], like, shapes, "saved"),
    }
    grads = {
        "grad_x": [torch.empty_like(t, memory_format=torch.contiguous_format) for t in x],
        "grad_proj_weight": [torch.empty_like(t, memory_format=torch.contiguous_format) for t in proj_weight],
        "grad_proj_bias": [torch.empty_like(t, memory_format=torch.contiguous_format) for t in proj_bias],
        "grad_map_weight": [torch.empty_like(t, memory_format=torch.contiguous_format) for t in map_weight],
        "grad_map_bias": [torch.empty_like(t, memory_format=torch.contiguous_format) for t in map_bias],
    }
    for name, tensors in (*inputs.items(), *grads.items()):
        _set(getattr(args, name), tensors)
    _call("tensor_ring_backward", args, like)
    del alive
    return [t for tensors in grads.values() for t in tensors]


def _mapping_args(x: Sequence[Tensor], weight: Sequence[Tensor],
                  coefficient: Sequence[float]) -> tuple[_AttentionMapping, list[Tensor]]:
    count, rows = len(x), x[0].shape[0]
    if not 1 <= count <= MAX_MODALITIES:
        raise ValueError(f"the CUDA kernels take 1 to {MAX_MODALITIES} modalities, got {count}")
    if x[0].dtype not in _DTYPES:
        raise ValueError(f"dtype {x[0].dtype}: the CUDA kernels take float32, bfloat16 and float16")
    widths = [t.shape[1] for t in x]
    inputs = _prepare(x, x[0], [(rows, d) for d in widths], "x")
    weights = _prepare(weight, x[0], [(d, d) for d in widths], "weight")
    args = _AttentionMapping(dtype=_dtype(x[0].dtype), count=count, rows=rows)
    for j, (width, c) in enumerate(zip(widths, coefficient, strict=True)):
        args.width[j], args.coefficient[j] = width, c
    _set(args.x, inputs)
    _set(args.weight, weights)
    return args, inputs + weights


def attention_mapping_forward(x: Sequence[Tensor], target: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor],
                              coefficient: Sequence[float]) -> list[Tensor]:
    """Returns the loss, float32 [], and M signs of the difference, int8 [N, D_j]. Two launches."""
    args, alive = _mapping_args(x, weight, coefficient)
    shapes = [tuple(t.shape) for t in x]
    targets = _prepare(target, x[0], shapes, "target")
    biases = _prepare(bias, x[0], [shape[1:] for shape in shapes], "bias")
    loss = x[0].new_empty((), dtype=torch.float32)
    sign = [t.new_empty(t.shape, dtype=torch.int8) for t in x]
    for name, tensors in (("target", targets), ("bias", biases), ("sign", sign)):
        _set(getattr(args, name), tensors)
    args.loss = loss.data_ptr()
    _call("attention_mapping_forward", args, x[0])
    del alive
    return [loss, *sign]


def attention_mapping_backward(grad_loss: Tensor, x: Sequence[Tensor], sign: Sequence[Tensor], weight: Sequence[Tensor],
                               coefficient: Sequence[float]) -> list[Tensor]:
    """Returns the gradients of x, target, weight, bias, M tensors each. Two launches."""
    args, alive = _mapping_args(x, weight, coefficient)
    for s, t in zip(sign, x, strict=True):
        if s.shape != t.shape or s.dtype != torch.int8 or s.device != t.device:
            raise ValueError(f"sign: expected int8 {list(t.shape)} on {t.device}")
    signs = [s.contiguous() for s in sign]
    grad_loss = grad_loss.to(torch.float32)
    grads = {
        "grad_x": [torch.empty_like(t, memory_format=torch.contiguous_format) for t in x],
        "grad_target": [torch.empty_like(t, memory_format=torch.contiguous_format) for t in x],
        "grad_weight": [torch.empty_like(t, memory_format=torch.contiguous_format) for t in weight],
        "grad_bias": [t.new_empty(t.shape[1]) for t in x],
    }
    for name, tensors in (("sign", signs), *grads.items()):
        _set(getattr(args, name), tensors)
    args.grad_loss = grad_loss.data_ptr()
    _call("attention_mapping_backward", args, x[0])
    del alive
    return [t for tensors in grads.values() for t in tensors]
