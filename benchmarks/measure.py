"""How it is measured.

The implementations of a group run interleaved in one process: A B C, B C A, C A B, ... so that drift of the machine (clock, other
load, caches) meets all alike. pytest-benchmark by itself times one test after the other; so the first test of a group
measures the whole group here, and each test then hands its own samples to pytest-benchmark, whose clock for these tests
(`clock`) moves by exactly the sample that is being recorded. Its statistics and its JSON are therefore those of the
interleaved rounds, and nothing is measured twice. A sample is one call, for short calls the mean of an inner loop: of 2 ms, on a GPU of
20 ms, at whose end alone the host waits, as it does in training. There are at least 15 rounds, 7 for the whole model and the sweeps, 3 where
a call takes seconds; --rounds says otherwise.

Before it is timed an implementation must agree with the algebra in float64, dropout off, in every output and gradient:
error (L2, relative, the worst tensor) at most twice that of the eager textbook in the same dtype plus `FLOOR`; the textbook itself at most
`CEILING`. In training groups `compiled` is exempt: without dropout it would be compiled a second time; it is the textbook that
has been checked.
"""

from __future__ import annotations

import statistics
import time
from typing import Callable, Mapping, Sequence

import torch
from torch import Tensor

from . import machine

# TF32: factors of 11 bits, so 2^-11 of a product; of the L1 loss's signs some hundredths change, each with its whole share of a gradient.
FLOOR = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
CEILING = {"float32": 1e-2, "tf32": 0.1, "bfloat16": 0.5}


class ReplayClock:
    """Stands still but for the samples fed to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


clock = ReplayClock()


class WrongResult(AssertionError):
    """An implementation disagrees with float64, so its time means nothing."""


def error(result: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative L2 error over all tensors, and the name of that tensor."""
    if set(result) != set(exact):
        raise WrongResult(f"expected the tensors {sorted(exact)}, got {sorted(result)}")
    worst, where = 0.0, ""
    for name, want in exact.items():
        got = result[name].detach().double()
        if got.shape != want.shape:
            raise WrongResult(f"{name}: expected shape {list(want.shape)}, got {list(got.shape)}")
        relative = ((got - want).norm() / want.norm().clamp_min(1e-300)).item()
        if worst == worst and not relative <= worst:            # NaN is worst, and stays
            worst, where = relative, name
    return worst, where


def assert_correct(implementation: str, found: float, where: str, textbook: float, dtype: str) -> None:
    """dtype: one of `FLOOR`."""
    limit = CEILING[dtype] if implementation in ("textbook", "compiled") else 2 * textbook + FLOOR[dtype]
    if not found <= limit:
        raise WrongResult(f"{implementation}: {where} is off by {found:.2e} from float64, allowed are {limit:.2e}")


def interleaved(calls: Mapping[str, Callable[[], object]], device: str = "cpu", *, rounds: int | None = None, seconds: float = 2.5,
                minimum: int = 15, maximum: int = 60) -> dict[str, list[float]]:
    """Seconds per call, a list per name. rounds: how many; by default as many as fit into `seconds`, within the bounds."""
    loops = {}
    for name, call in calls.items():
        for _ in range(2):                  # the first call warms up (and compiles), the second tells how long one takes
            machine.synchronize(device)
            start = time.perf_counter()
            call()
            machine.synchronize(device)
            duration = time.perf_counter() - start
        loops[name] = max(1, min(100, int((2e-2 if device == "cuda" else 2e-3) / max(duration, 1e-7)))), duration
    if rounds is None:
        rounds = max(minimum, min(maximum, int(seconds / sum(n * t for n, t in loops.values()))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            call, loop = calls[name], loops[name][0]
            machine.synchronize(device)
            start = time.perf_counter()
            for _ in range(loop):
                call()
            machine.synchronize(device)
            samples[name].append((time.perf_counter() - start) / loop)
    return samples


def saved_bytes(forward: Callable[[], object], excluded: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for backward: distinct storages, without those of `excluded` (inputs, parameters)."""
    known = {t.untyped_storage().data_ptr() for t in excluded}
    kept: dict[int, Tensor] = {}            # the tensors stay alive, so no address is counted for two storages

    def pack(t: Tensor) -> Tensor:
        # As it is, it would hold the graph that holds it. Such a graph never ends, and its nodes, bound to the stream of this pass, would keep
        # the parameters' next pass out of a CUDA graph.
        t = t.detach()
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known)
    del result
    return total


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(samples) < 2:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low
