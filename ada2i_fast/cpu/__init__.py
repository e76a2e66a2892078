"""The CPU backend: `lib/libada2i_cpu.so` (sources in csrc/cpu) through ctypes, one file per op.

The library knows nothing of torch. Every output is a fresh torch.empty; calls release the GIL; the number of threads is torch's.
Calls that follow one another can be handed over `together`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from array import array
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import profiler

from .. import backends

__all__ = ["address", "cast", "flush", "library", "set_tier", "tier", "tiers", "together", "why_not"]

ABI_VERSION = 8
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


class _Call(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("args", ctypes.c_void_p), ("size", ctypes.c_int64)]


class _Waiting(threading.local):
    calls: list[tuple] | None = None          # inside `together`: name, arguments, and what has to live until the call


_waiting = _Waiting()


@functools.cache
def address(name: str) -> int:
    return ctypes.cast(_function(name), ctypes.c_void_p).value


@contextlib.contextmanager
def together() -> Iterator[None]:
    """The library's calls inside happen at the end, or at `flush`, in their order, without Python in between: after each of them it finds
    the caches full of matrices, and then takes several times as long. Until then their results hold nothing: whoever reads one in another
    way flushes first. For this thread. They do not wait where somebody may look on: torch.profiler, a dispatch mode, hooks of saved tensors."""
    if _waiting.calls is not None or profiler._is_profiler_enabled or torch._C._len_torch_dispatch_stack() or \
            torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        yield
        return
    _waiting.calls = []
    try:
        yield
        flush()
    finally:
        _waiting.calls = None


def flush() -> None:
    """Makes the calls that wait, if any."""
    calls = _waiting.calls
    if not calls:
        return
    _waiting.calls = []
    program = (_Call * len(calls))(*[(address(name), ctypes.addressof(args), ctypes.sizeof(args)) for name, args, _ in calls])
    if result := _function("ada2i_cpu_run")(program, ctypes.c_int64(len(calls))):
        _check(calls[result // 4][0], result % 4)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in another dtype, also where it is the result of a call that waits."""
    if t.dtype == dtype:                                        # `to` alone takes ten times as long to find that out
        return t
    flush()
    return t.to(dtype)


def call(name: str, args: ctypes.Structure, *kept: object) -> None:
    """A function of the library. kept: all that `args` points to; without it the call does not wait. torch.profiler sees it under its name."""
    if _waiting.calls is not None:
        if kept:
            _waiting.calls.append((name, args, kept))
            return
        flush()
    if profiler._is_profiler_enabled:
        with profiler.record_function(name):
            status = _function(name)(ctypes.byref(args), ctypes.c_int64(ctypes.sizeof(args)))
    else:
        status = _function(name)(ctypes.byref(args), ctypes.c_int64(ctypes.sizeof(args)))
    if status:
        _check(name, status)


def _check(name: str, status: int) -> None:
    if status == 2:
        raise RuntimeError(f"{name}: {PATH.name} was built from other sources: build it again (pip install -e .)")
    raise MemoryError(f"{name}: no memory for scratch")
