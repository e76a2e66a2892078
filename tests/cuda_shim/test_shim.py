"""The shim sees what it is there to see: kernels with one defect each."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import shim_build

pytestmark = pytest.mark.skipif(shim_build.compiler() is None, reason="no C++ compiler")

KERNELS = ["neighbour", "no barrier", "early exit", "divergent", "half a warp", "mixed", "beyond shared", "uninitialised", "shuffle",
           "beyond scratch"]


@pytest.fixture(scope="module")
def library():
    handle = ctypes.CDLL(str(shim_build.compile_library("self_test.cpp")))
    handle.self_test_error.restype = ctypes.c_char_p
    return handle


def run(library, kernel: str, order: int = 0) -> tuple[int, list[float]]:
    out = (ctypes.c_float * 128)()
    return library.self_test(KERNELS.index(kernel), order, out), list(out)


def test_barrier(library):
    expected = [(t + 1) % 128 for t in range(128)]
    assert all(run(library, "neighbour", order) == (0, expected) for order in range(3))
    assert any(run(library, "no barrier", order) != (0, expected) for order in range(3))


@pytest.mark.parametrize("kernel, words", [("early exit", b"has ended while others wait"), ("divergent", b"different places"),
                                           ("half a warp", b"has ended while others wait"), ("mixed", b"others in a warp")])
def test_threads_that_part(library, kernel, words):
    for order in range(3):
        error, _ = run(library, kernel, order)
        assert error != 0 and words in library.self_test_error()
    assert run(library, "neighbour")[0] == 0       # and the next launch is unharmed


def test_shared_memory_starts_as_nan(library):
    assert all(v != v for v in run(library, "uninitialised")[1])


def test_shuffle(library):
    for order in range(3):
        assert run(library, "shuffle", order) == (0, [float(t // 32 * 32 + (t % 32 ^ 16 ^ 1)) for t in range(128)])


@pytest.mark.parametrize("kernel, words", [("beyond shared", "heap-buffer-overflow"), ("beyond scratch", "use-after-poison"),
                                           ("neighbour", None)])
def test_address_sanitizer(kernel, words):
    runtime = shim_build.sanitizer_runtime()
    if runtime is None:
        pytest.skip("the compiler has no AddressSanitizer runtime")
    path = shim_build.compile_library("self_test.cpp", address_sanitizer=True)
    code = f"import ctypes; ctypes.CDLL({str(path)!r}).self_test({KERNELS.index(kernel)}, 0, (ctypes.c_float * 128)())"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True,
                            env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"})
    assert (result.returncode == 0) == (words is None), result.stderr[-2000:]
    assert words is None or words in result.stderr
