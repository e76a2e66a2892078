"""The CPU backend: `lib/libada2i_cpu.so` (sources in csrc/cpu) through ctypes, one file per op.

The library knows nothing of torch. Every output is a fresh torch.empty; calls release the GIL; the number of threads is torch's.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from pathlib import Path
from typing import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import profiler

from .. import backends

__all__ = ["library", "set_tier", "tier", "tiers", "why_not"]

ABI_VERSION = 6
PATH = Path(__file__).parent.parent / "lib" / "libada2i_cpu.so"
BF16_TIERS = ("amx_bf16", "avx512_bf16")       # those that multiply bf16 as it stands
FLOAT32_TIERS = ("amx_bf16",)                  # those that multiply float32 faster than by vectors
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none. torch is imported before, so its OpenMP runtime serves both."""
    if not PATH.exists():
        return backends.build_reason("cpu")
    try:
        handle = backends.load_library("cpu", PATH, ABI_VERSION)
    except RuntimeError as error:
        return f"{PATH.name} does not load: {error}"
    handle.ada2i_cpu_tier.restype = handle.ada2i_cpu_tier_name.restype = ctypes.c_char_p
    return handle


def why_not() -> str | None:
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def tier() -> str:
    """The instruction set in use."""
    return library().ada2i_cpu_tier().decode()


def tiers() -> list[str]:
    """Those that this processor can run, best first."""
    names = []
    while name := library().ada2i_cpu_tier_name(len(names)):
        names.append(name.decode())
    return names


def set_tier(name: str) -> None:
    """Takes another one from here on, in the whole process; for tests and measurements."""
    if library().ada2i_cpu_set_tier(name.encode()):
        raise ValueError(f"tier: expected one of {tiers()}, got {name!r}")


def pointers(*lists: Sequence[Tensor | int | None]) -> ctypes.Array:
    """Addresses of tensors, list after list; None becomes null, and an address stays one."""
    flat = array("Q", [t if type(t) is int else 0 if t is None else t.data_ptr() for tensors in lists for t in tensors])
    return (ctypes.c_void_p * len(flat)).from_buffer_copy(flat)        # half the time of passing them one by one


def int64s(numbers: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * max(len(numbers), 1))(*numbers)


def contiguous(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[t if t.is_contiguous() else t.contiguous() for t in tensors] for tensors in lists]


def float32_only(device: str, dtype: torch.dtype, widths: tuple[int, ...], rank: int) -> str | None:
    return None if dtype == torch.float32 else "it serves float32 only"


def up_to_float32(device: str, dtype: torch.dtype, widths: tuple[int, ...], rank: int) -> str | None:
    return "it computes in float32, not float64" if dtype == torch.float64 else None


@functools.cache
def _function(name: str) -> Callable[..., int]:
    return getattr(library(), name)


def call(name: str, args: ctypes.Structure) -> None:
    """A function of the library; torch.profiler sees it under its name."""
    if profiler._is_profiler_enabled:
        with profiler.record_function(name):
            status = _function(name)(ctypes.byref(args), ctypes.c_int64(ctypes.sizeof(args)))
    else:
        status = _function(name)(ctypes.byref(args), ctypes.c_int64(ctypes.sizeof(args)))
    if status == 2:
        raise RuntimeError(f"{name}: {PATH.name} was built from other sources: build it again (pip install -e .)")
    if status:
        raise MemoryError(f"{name}: no memory for scratch")
