"""Where a measurement was taken: names, versions, and the two rates that floors are made of."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from ada2i_fast import backends, cpu
from ada2i_fast import node

from .report import AVX2, ROOT


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return f"{found.group(1) if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@functools.cache
def facts(device: str) -> dict:
    """Machine, tier, threads, versions, commit; the load shows whether the machine was quiet."""
    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+dirty"], cwd=ROOT, capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"device": device_name(device), "cpu": device_name("cpu"), "cpu_tier": None if cpu.why_not() else cpu.tier(),
            "cpu_node": node.why_not() is None, "threads": torch.get_num_threads(), "load_at_start": round(os.getloadavg()[0], 1), "python": platform.python_version(),
            "torch": torch.__version__, "triton": version("triton"), "cuda": torch.version.cuda if device == "cuda" else None,
            "float32_matmul_precision": torch.get_float32_matmul_precision(), "commit": commit,
            "limits": {name: os.environ[name] for name in AVX2 if name in os.environ}}


def _best(call, device: str, seconds: float = 0.3) -> float:
    """Shortest of the calls that fit into `seconds`, at least three."""
    call()
    synchronize(device)
    best, calls, start = float("inf"), 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        call()
        synchronize(device)
        best, calls = min(best, time.perf_counter() - begin), calls + 1
    return best


@functools.cache
def matrix_rate(device: str, dtype: str) -> float:
    """Operations per second of the fastest matrix product at hand, this package's own among them, on the shape of an encoder's feed-forward (larger on a GPU)."""
    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (512, 1024, 2048)
    x = torch.randn(rows, inner, device=device, dtype=getattr(torch, dtype))
    w = torch.randn(columns, inner, device=device, dtype=getattr(torch, dtype))
    calls = [lambda: torch.nn.functional.linear(x, w)]
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    if device == "cpu" and dtype == "float32" and cpu.why_not() is None:
        calls.append(lambda: backends.module("linear", "cpu").forward(x, w, None))
    with torch.no_grad():
        return 2.0 * rows * inner * columns / min(_best(call, device) for call in calls)


@functools.cache
def bandwidth(device: str) -> float:
    """Bytes per second of a copy far larger than any cache, read and written bytes counted."""
    source = torch.zeros((512 if device == "cuda" else 64) << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _best(lambda: target.copy_(source), device)
