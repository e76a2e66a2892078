"""The build: skipped with a reason, an error where it was asked for, incremental."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

native = pytest.importorskip("build_tools.native")


@pytest.fixture
def fake_compilers(monkeypatch, tmp_path):
    """A compiler and an nvcc that write an empty output and note that they ran."""
    tools = tmp_path / "cuda" / "bin"
    tools.mkdir(parents=True)
    script = f"""#!{sys.executable}
import os, sys
from pathlib import Path
a = sys.argv[1:]
if '--version' in a: print('Fake compiler 1.0\\nrelease 1.0\\nbuild 1')
elif '--list-gpu-arch' in a: print('compute_80 compute_90')
else:
    Path(a[a.index('-o') + 1]).write_text(' '.join(a))
    if '-MF' in a: Path(a[a.index('-MF') + 1]).write_text(a[a.index('-o') + 1] + ': ' + a[a.index('-c') + 1] + '\\n')
    open({str(tmp_path / 'log')!r}, 'a').write(Path(a[a.index('-o') + 1]).name + '\\n')
"""
    for name in ("nvcc", "fakecxx"):
        (tools / name).write_text(script)
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(tools / "fakecxx"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("ADA2I_FAST_CPU", "ADA2I_FAST_CPU_TIERS", "ADA2I_FAST_CUDA", "ADA2I_FAST_TORCH", "CXXFLAGS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def ran(folder: Path) -> list[str]:
    log = folder / "log"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(lines)


def build(folder: Path) -> dict:
    return native.build(folder / "lib", folder / "objects")


def test_builds_both_and_then_nothing(fake_compilers):
    info = build(fake_compilers)
    assert info["cpu"]["library"] == "libada2i_cpu.so" and info["cuda"]["architectures"] == ["sm_80", "sm_90"]
    assert info["cuda"]["unknown to this compiler"] == ["sm_86", "sm_89", "sm_100", "sm_120"]
    assert json.loads((fake_compilers / "lib" / "build_info.json").read_text()) == info
    assert {"baseline.o", "dispatch.o", "libada2i_cpu.so", "tensor_ring.o", "libada2i_cuda.so"} <= set(ran(fake_compilers))
    build(fake_compilers)
    assert ran(fake_compilers) == []
    source = native.ROOT / "csrc" / "cuda" / "attention_mapping.cu"
    before = source.stat()
    try:
        os.utime(source)
        build(fake_compilers)
        assert ran(fake_compilers) == ["attention_mapping.o", "libada2i_cuda.so"]
    finally:
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_flags_tie_the_build_to_no_machine(fake_compilers):
    build(fake_compilers)
    for name in ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16", "dispatch"):
        path = fake_compilers / "objects" / "cpu" / f"{name}.o"
        if path.exists():
            text = path.read_text()
            assert "-march=native" not in text and "-ffast-math" not in text
            assert ("-march=" in text) == name.startswith(("avx", "amx"))


def test_flags_of_the_user_come_last(fake_compilers, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-O1 -g")
    build(fake_compilers)
    text = (fake_compilers / "objects" / "cpu" / "dispatch.o").read_text()
    assert text.index("-O3") < text.index("-O1 -g")


def test_tiers_by_name(fake_compilers, monkeypatch):
    everything = native.wanted_tiers()
    last = [*everything][-1]
    expected = [*dict.fromkeys(("baseline", native.COMPLETED_BY.get(last, "baseline"), last))]
    monkeypatch.setenv("ADA2I_FAST_CPU_TIERS", last)
    assert [*native.wanted_tiers()] == expected
    assert build(fake_compilers)["cpu"]["tiers"] == expected
    text = (fake_compilers / "objects" / "cpu" / "dispatch.o").read_text()
    assert f"-DADA2I_HAS_{last.upper()}" in text and text.count("-DADA2I_HAS_") == len(expected)
    monkeypatch.setenv("ADA2I_FAST_CPU_TIERS", "avx3")
    assert "expected some of baseline" in build(fake_compilers)["cpu"]["reason"]


def test_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0;9.0a,12.0+PTX")
    assert native.architectures() == [("80", False), ("90a", False), ("120", True)]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(native.Unavailable, match="Hopper"):
        native.architectures()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(native.Unavailable, match="8.0"):
        native.architectures()


def test_missing_tools_are_a_reason_or_an_error(fake_compilers, monkeypatch):
    def nothing(*_):
        raise native.Unavailable("nvcc not found")

    monkeypatch.setattr(native, "find_nvcc", nothing)
    info = build(fake_compilers)
    assert info["cuda"] == {"library": None, "reason": "nvcc not found"} and info["cpu"]["library"]
    monkeypatch.setenv("ADA2I_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="ADA2I_FAST_CUDA=1, but nvcc not found"):
        build(fake_compilers)
    monkeypatch.setenv("ADA2I_FAST_CUDA", "0")
    monkeypatch.setenv("ADA2I_FAST_CPU", "0")
    monkeypatch.setenv("ADA2I_FAST_TORCH", "0")
    assert {name: facts["library"] for name, facts in build(fake_compilers).items()} == {"cpu": None, "torch": None, "cuda": None}
    assert not (fake_compilers / "lib" / "libada2i_cpu.so").exists()


def test_the_node_is_for_the_torch_that_is_there(fake_compilers, monkeypatch):
    """In the target environment, which an isolated build does not import from, or wherever this Python finds it."""
    here = torch.__version__
    assert build(fake_compilers)["torch"] == {"library": "libada2i_torch.so", "compiler": "Fake compiler 1.0", "torch": here,
                                              "python": "%d.%d" % sys.version_info[:2]}
    assert "-lc10 -ltorch_cpu -ltorch_python" in (fake_compilers / "objects" / "torch" / "build.ninja").read_text()
    site = fake_compilers / "site"
    header = site / "torch" / "include" / "torch" / "csrc" / "autograd" / "function.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (site / "torch" / "version.py").write_text("__version__ = '9.8.7+cpu'\ndebug = False\n")
    monkeypatch.setattr(native, "SITE", site)
    assert build(fake_compilers)["torch"]["torch"] == "9.8.7+cpu"
    header.unlink()
    assert build(fake_compilers)["torch"]["torch"] == here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "torch was not installed when this package was" in build(fake_compilers)["torch"]["reason"]
    assert not (fake_compilers / "lib" / "libada2i_torch.so").exists()


def test_a_failing_compiler_is_a_reason(fake_compilers, monkeypatch):
    broken = fake_compilers / "broken"
    broken.write_text(f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv: print('Broken 1')\nelse: sys.exit('error: no')\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("ADA2I_FAST_CUDA", "0")
    info = build(fake_compilers)
    assert "compilation failed" in info["cpu"]["reason"] and "compilation failed" in info["torch"]["reason"]


def test_a_library_of_another_build_is_refused(tmp_path, monkeypatch):
    """One without the version, one of another version, and arguments of another size: never a call with wrong arguments."""
    from ada2i_fast import cpu

    if cpu.why_not():
        pytest.skip(cpu.why_not())
    with pytest.raises(RuntimeError, match="ada2i_balanced_adam_measure: libada2i_cpu.so was built from other sources: build it again"):
        cpu.call("ada2i_balanced_adam_measure", (ctypes.c_int64 * 3)())
    monkeypatch.setattr(cpu, "ABI_VERSION", cpu.ABI_VERSION + 1)
    assert "speaks version" in cpu._load.__wrapped__()
    monkeypatch.setattr(cpu, "PATH", Path(ctypes.util.find_library("m") or "libm.so.6"))
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert "does not load" in cpu._load.__wrapped__() and "build it again" in cpu._load.__wrapped__()
