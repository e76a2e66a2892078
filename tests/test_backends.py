"""Which backend serves, why not the others, and that nothing falls back in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "ops"))

from afw_cases import assert_close  # noqa: E402

from ada2i_fast import backends, cpu  # noqa: E402
from ada2i_fast.ops import attention_mapping, tensor_ring  # noqa: E402

needs_cpu = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONWARNINGS": "ignore", **environment})


def mapping(backend: str = "auto", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    one = [torch.ones(2, 2, dtype=dtype)]
    return attention_mapping(one, one, one, [torch.ones(2, dtype=dtype)], backend=backend)


@needs_cpu
def test_cpu_serves_cpu_tensors():
    x = [torch.ones(3, 4)]
    assert backends.choose("tensor_ring", x) == "cpu"
    assert backends.choose("tensor_ring", x, "torch") == "torch"
    assert backends.choose("tensor_ring", x, rank=33) == "torch"
    assert backends.choose("tensor_ring", [torch.ones(3, 4, dtype=torch.complex64)]) == "torch"


@needs_cpu
def test_explain_names_all():
    text = backends.explain("tensor_ring", torch.ones(3, 4), rank=40)
    assert text.splitlines()[0] == "tensor_ring: torch"
    assert "not cpu: rank 40 is above 32" in text
    for name in ("cuda", "triton"):
        assert f"not {name}: the tensors are on cpu, it serves cuda" in text
    assert "tensor_ring: cpu" in backends.explain("tensor_ring", torch.ones(3, 4), rank=11)
    assert "not torch: it could, but another comes first" in backends.explain("tensor_ring", torch.ones(3, 4), rank=11)


def test_order_on_cuda(monkeypatch):
    """The CUDA kernels come first up to some number of rows, which depends on the products, and on whether the host waits for launches."""
    able = {"triton", "cuda", "torch"}
    monkeypatch.setattr(backends, "_why_not", lambda op, backend, *facts: None if backend in able else "not here")

    def chosen(dtype: torch.dtype, rows: int | None) -> str:
        backends._cached.cache_clear()
        return backends._decide("tensor_ring", "auto", "cuda", dtype, (300,) * 3, 11, rows)

    def up_to(limit: int, *dtypes: torch.dtype) -> None:
        for dtype in dtypes:
            assert [chosen(dtype, rows) for rows in (0, limit, limit + 1)] == [*["cuda" if limit else "triton"] * 2, "triton"]

    halves, before = (torch.bfloat16, torch.float16), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        up_to(40_000, torch.float32)
        up_to(20_000, *halves)
        with backends.for_a_graph():
            up_to(5_000, torch.float32)
            up_to(0, *halves)
            with ThreadPoolExecutor(1) as another:
                assert another.submit(chosen, torch.bfloat16, 1).result() == "cuda"
        assert chosen(torch.float32, None) == "cuda" and chosen(torch.bfloat16, None) == "triton"
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            up_to(20_000, torch.float32, *halves)
            with backends.for_a_graph():
                up_to(0, torch.float32, *halves)
            assert chosen(torch.float32, None) == "triton"
        torch.set_float32_matmul_precision("highest")
        able.remove("cuda")
        assert chosen(torch.float32, 1) == "triton"
    finally:
        torch.set_float32_matmul_precision(before)
        backends._cached.cache_clear()


def test_rows_are_looked_at(monkeypatch):
    """`choose` and `explain` say them to what decides; compiled code does not ask, for rows may be a symbol there."""
    found = []
    monkeypatch.setattr(backends, "_decide", lambda *facts: found.append(facts[-1]) or "torch")
    x = torch.empty(12_345, 1, device="meta")
    backends.choose("tensor_ring", [x])
    backends.explain("tensor_ring", x)
    assert found == [12_345, 12_345]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    backends.choose("tensor_ring", [x])
    assert found[-1] is None


@pytest.mark.gpu
def test_explain_on_cuda():
    """What `explain` says is what `choose` does, with the reason of every other."""
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                x = torch.ones(3, 4, dtype=dtype, device="cuda")
                text = backends.explain("tensor_ring", x, rank=2).splitlines()
                assert text[0] == f"tensor_ring: {backends.choose('tensor_ring', [x], rank=2)}" and len(text) == len(backends.BACKENDS)
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_and_unable_backends_raise():
    with pytest.raises(ValueError, match="backend: expected 'auto'"):
        mapping("gpu")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve this input: the tensors are on cpu"):
        mapping("cuda")


def test_environment_forces_without_falling_back(monkeypatch):
    monkeypatch.setenv("ADA2I_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot serve"):
        mapping()
    assert "cannot serve" in backends.explain("attention_mapping", torch.ones(2, 2))
    assert mapping("torch") == 2     # an argument goes before the environment
    monkeypatch.setenv("ADA2I_FAST_BACKEND", "torch")
    assert backends.choose("attention_mapping", [torch.ones(2, 2)]) == "torch"
    monkeypatch.setenv("ADA2I_FAST_BACKEND", "metal")
    with pytest.raises(ValueError, match="metal"):
        mapping()


def test_import_without_libraries(monkeypatch, tmp_path):
    """A missing or broken library is a reason, not an error; auto goes on with torch."""
    code = (f"import pathlib; from ada2i_fast import cpu, backends; cpu.PATH = pathlib.Path({str(tmp_path)!r}) / 'x.so';"
            "{prepare}; import torch; x = torch.ones(2, 3); print(backends.explain('tensor_ring', x)); print(backends.info())")
    missing = python(code.format(prepare="pass"))
    assert missing.returncode == 0, missing.stderr
    assert "tensor_ring: torch" in missing.stdout and "not cpu: not built" in missing.stdout
    broken = python(code.format(prepare="cpu.PATH.write_text('no library')"))
    assert broken.returncode == 0, broken.stderr
    assert "x.so does not load" in broken.stdout


def test_import_touches_no_driver():
    result = python("import torch, ada2i_fast, ada2i_fast.ops, ada2i_fast.backends as b; b.info();"
                    "assert not torch.cuda.is_initialized();"
                    "assert 'libcuda.so' not in open('/proc/self/maps').read()")
    assert result.returncode == 0, result.stderr


@needs_cpu
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_one_openmp_runtime():
    """The library uses the one that torch has loaded; two would fight for the cores."""
    result = python("import re, torch, ada2i_fast.cpu as c; c.library();"
                    "print(len(set(re.findall(r'\\S*lib[gi]?omp\\S*', open('/proc/self/maps').read()))))")
    assert result.stdout.strip() == "1", result.stdout + result.stderr


@needs_cpu
def test_tiers():
    assert cpu.tiers()[-1] == "baseline" and cpu.tier() in cpu.tiers()
    result = python("import ada2i_fast.cpu as c; print(c.tier())", ADA2I_FAST_CPU_TIER="baseline")
    assert result.stdout.strip() == "baseline"
    with pytest.raises(ValueError, match="tier: expected one of"):
        cpu.set_tier("sse9")


@needs_cpu
def test_info_tells_what_was_built():
    lines = backends.info()
    assert "available" in lines["backend cpu"] and "tiers" in lines["backend cpu"] and cpu.tier() in lines["backend cpu"]
    assert {"backend cpu", "backend cuda", "backend triton"} <= set(lines)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu),
                                     *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))])
def test_native_backends_obey_the_rule(backend):
    """Error against float64 at most twice that of plain torch in float32 plus a few roundings, outputs and gradients alike."""
    device = "cpu" if backend == "cpu" else "cuda"
    g = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=g).to(device)

    x = [drawn(9, d) for d in (5, 8)]
    parameters = [[drawn(*s) for s in shapes] for shapes in (((12, 5), (12, 8)), ((12,), (12,)), ((5, 9), (8, 9)), ((5,), (8,)))]
    offsets = torch.tensor([0, 4, 9], device=device)
    results = []
    for name, dtype in ((backend, torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        leaves = [[t.to(dtype).requires_grad_() for t in tensors] for tensors in (x, *parameters)]
        out, target = tensor_ring(leaves[0], offsets, *leaves[1:], ring=[[1], [0]], scale=0.1, backend=name)
        found = [*out, *target, *torch.autograd.grad(sum(t.sum() for t in out), sum(leaves, []))]
        results.append({str(i): t.detach().cpu() for i, t in enumerate(found)})
    assert_close(*results, torch.float32)


def test_what_a_transform_left_behind_is_not_eager():
    leaked = []
    torch.func.grad(lambda t: (leaked.append(t), t.sum())[1])(torch.ones(3))
    assert type(leaked[0]) is torch.Tensor and not backends.eager(leaked)
    assert backends.eager([torch.ones(3), torch.nn.Parameter(torch.ones(2))])
