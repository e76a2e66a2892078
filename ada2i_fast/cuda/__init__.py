"""The CUDA backend: `lib/libada2i_cuda.so` (sources in csrc/cuda) through ctypes, one file per op.

A C ABI over raw pointers, so one build serves every version of torch. Nothing synchronises: memory comes from torch's allocator,
work goes to the current stream, and the launchers only enqueue; so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

from .. import backends

__all__ = ["library", "load", "why_not"]

PATH = Path(__file__).parent.parent / "lib" / "libada2i_cuda.so"
ABI_VERSION = 2
MAX_MODALITIES = 8
MAX_RANK = 32
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TF32 = 3

CALLS = ("tensor_ring_forward", "tensor_ring_backward", "attention_mapping_forward", "attention_mapping_backward",
         "balanced_adam_measure", "balanced_adam_settings", "balanced_adam_update")

Pointers = ctypes.c_void_p * MAX_MODALITIES
Sizes = ctypes.c_int64 * MAX_MODALITIES
Ints = ctypes.c_int32 * MAX_MODALITIES


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`. Raises RuntimeError if it does not load, or was built from other sources."""
    handle = backends.load_library("cuda", path, ABI_VERSION)
    handle.ada2i_cuda_error_string.argtypes = [ctypes.c_int]
    handle.ada2i_cuda_error_string.restype = ctypes.c_char_p
    for name in CALLS:
        call = getattr(handle, f"ada2i_cuda_{name}")
        call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p], ctypes.c_int
        size = getattr(handle, f"ada2i_cuda_{name}_scratch")
        size.argtypes, size.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    return handle


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not PATH.exists():
        return backends.build_reason("cuda")
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    try:
        return load(PATH)
    except (RuntimeError, AttributeError) as error:
        return f"{PATH.name} does not load: {error}"


def why_not() -> str | None:
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def limits(modalities: int, rank: int = 1) -> str | None:
    """Why the kernels cannot take so many, or None."""
    if not 1 <= modalities <= MAX_MODALITIES:
        return f"the CUDA kernels take 1 to {MAX_MODALITIES} modalities, not {modalities}"
    if not 1 <= rank <= MAX_RANK:
        return f"the CUDA kernels take ranks 1 to {MAX_RANK}, not {rank}"
    return None


def dtype_code(dtype: torch.dtype) -> int:
    """The number of an element type in the C interface; float32 products run in TF32 where torch's own may."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: the CUDA kernels take float32, bfloat16 and float16")
    if dtype == torch.float32 and backends.tf32():
        return TF32
    return DTYPES[dtype]


def fill(args: ctypes.Structure, **fields: Sequence[Tensor | int]) -> None:
    """Writes tensors' addresses, or addresses, into arrays of pointers."""
    for name, tensors in fields.items():
        getattr(args, name)[:len(tensors)] = [t if type(t) is int else t.data_ptr() for t in tensors]


def prepare(name: str, tensors: Sequence[Tensor], like: Tensor, shapes: list[Sequence[int]],
            dtype: torch.dtype | None = None) -> list[Tensor]:
    """The tensors made contiguous. ValueError unless they have these shapes, tuples all: the kernels trust them."""
    dtype = dtype or like.dtype
    if [t.shape for t in tensors] != shapes or not backends.uniform(tensors, like.get_device(), dtype):
        if len(tensors) != len(shapes):
            raise ValueError(f"{name}: expected {len(shapes)} tensors, got {len(tensors)}")
        device = like.device
        for t, shape in zip(tensors, shapes):
            if t.shape != shape or t.dtype != dtype or t.device != device:
                raise ValueError(f"{name}: expected {dtype} {list(shape)} on {device}, got {t.dtype} {list(t.shape)} on {t.device}")
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def call(name: str, args: ctypes.Structure, like: Tensor) -> None:
    """Brings scratch memory and enqueues on the current stream of `like`'s device; RuntimeError on a CUDA error.

    The memory behind `args` may be released right after: torch's allocator gives it away again in stream order.
    """
    handle, name = library(), f"ada2i_cuda_{name}"
    address, size, index = ctypes.addressof(args), ctypes.sizeof(args), like.get_device()
    bytes_needed = getattr(handle, f"{name}_scratch")(address, size)
    if bytes_needed < 0:
        raise ValueError(f"{name.removeprefix('ada2i_cuda_')}: arguments out of the kernels' range")
    scratch = like.new_empty(bytes_needed, dtype=torch.uint8)
    args.scratch = scratch.data_ptr()
    if index < 0:
        error = getattr(handle, name)(address, size, None)
    elif index == torch.cuda.current_device():
        error = getattr(handle, name)(address, size, torch._C._cuda_getCurrentRawStream(index))
    else:
        with torch.cuda.device(index):
            error = getattr(handle, name)(address, size, torch._C._cuda_getCurrentRawStream(index))
    if error:
        raise RuntimeError(f"{name.removeprefix('ada2i_cuda_')}: {handle.ada2i_cuda_error_string(error).decode()}")
