"""Compiles `ada2i_fast/lib/libada2i_*.so` with ninja: in parallel, and only what changed.

The libraries use neither torch nor Python headers, so a build serves every version of both; but for `libada2i_torch`, nodes of autograd's
graph in C++, which are for the torch that is installed when this runs. What cannot be built is skipped, with the reason in
`lib/build_info.json`, unless its environment variable is 1 (ADA2I_FAST_CPU, ADA2I_FAST_CUDA, ADA2I_FAST_TORCH): then it is an error; 0
leaves it out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_path("purelib"))      # of the target environment, in an isolated build too

CXX_FLAGS = ("-std=c++17 -O3 -fPIC -fopenmp -fno-exceptions -fno-rtti -fvisibility=hidden -fno-math-errno -fno-trapping-math "
             "-ffp-contract=fast -Wall -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized").split()
TIERS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "amx_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
COMPLETED_BY = {"avx512_bf16": "avx512", "amx_bf16": "avx512"}      # tiers that hold only what differs there, and what the rest is


class Unavailable(Exception):
    """A library cannot be built here; the message says why."""


def build(library_folder: Path, object_folder: Path) -> dict:
    """Builds what this machine can build into `library_folder` and returns the content of build_info.json."""
    library_folder.mkdir(parents=True, exist_ok=True)
    object_folder.mkdir(parents=True, exist_ok=True)
    info = {}
    for name, make in (("cpu", cpu_rules), ("torch", torch_rules), ("cuda", cuda_rules)):
        wanted = os.environ.get(f"ADA2I_FAST_{name.upper()}", "")
        library = library_folder / f"libada2i_{name}.so"
        try:
            if wanted == "0":
                raise Unavailable(f"left out by ADA2I_FAST_{name.upper()}=0")
            rules, facts = make(library, object_folder / name)
            run_ninja(rules, object_folder / name)
            info[name] = {"library": library.name, **facts}
        except Unavailable as reason:
            if wanted == "1":
                raise SystemExit(f"ada2i_fast: ADA2I_FAST_{name.upper()}=1, but {reason}") from None
            library.unlink(missing_ok=True)
            info[name] = {"library": None, "reason": str(reason)}
            print(f"ada2i_fast: {name} library skipped: {reason}", file=sys.stderr)
    (library_folder / "build_info.json").write_text(json.dumps(info, indent=1) + "\n")
    return info


def cpu_rules(library: Path, objects: Path) -> tuple[str, dict]:
    compiler = find_cxx()
    tiers = wanted_tiers()
    source = ROOT / "csrc" / "cpu"
    rules = [f"cxx = {compiler}", f"flags = {' '.join(CXX_FLAGS)} {os.environ.get('CXXFLAGS', '')}".rstrip(), *CXX_RULES]
    names = []
    for tier, flags in tiers.items():
        names.append(f"{tier}.o")
        rules += [f"build {names[-1]}: compile {escape(source / 'tier.cpp')}",
                  f"  extra = {' '.join(flags)} -DADA2I_TIER={tier}"]
    rules += [f"build dispatch.o: compile {escape(source / 'dispatch.cpp')}",
              f"  extra = {' '.join(f'-DADA2I_HAS_{tier.upper()}' for tier in tiers)}",
              f"build {escape(library)}: link {' '.join(names)} dispatch.o"]
    return "\n".join(rules) + "\n", {"compiler": version_line(compiler), "tiers": list(tiers)}


def wanted_tiers() -> dict[str, list[str]]:
    """Tiers and their flags: those of the processor's kind, or of ADA2I_FAST_CPU_TIERS and what completes them; always baseline."""
    known = TIERS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    names = (os.environ.get("ADA2I_FAST_CPU_TIERS") or " ".join(known)).replace(",", " ").split()
    if unknown := [name for name in names if name not in known]:
        raise Unavailable(f"ADA2I_FAST_CPU_TIERS: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    names = {"baseline", *names, *(COMPLETED_BY[name] for name in names if name in COMPLETED_BY)}
    return {name: flags for name, flags in known.items() if name in names}


CXX_RULES = [
    "rule compile",
    "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
    "  depfile = $out.d",
    "  deps = gcc",
    "  description = $out",
    "rule link",
    "  command = $cxx -shared -fopenmp $in -o $out $libraries",
    "  description = $out",
]


def cuda_rules(library: Path, objects: Path) -> tuple[str, dict]:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    nvcc = find_nvcc()
    known = set(subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split())
    wanted = architectures()
    usable = [(number, ptx) for number, ptx in wanted if f"compute_{number}" in known]
    if not usable:
        raise Unavailable(f"{version_line(nvcc, -2)} knows none of the architectures {[number for number, _ in wanted]}")
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number, _ in usable]
    codes += [f"-gencode=arch=compute_{number},code=compute_{number}" for number, ptx in usable if ptx]
    host = ["-ccbin", find_cxx().split()[0]]
    # nvcc compiles the architectures of one file side by side; ninja the files.
    threads = min(len(codes), int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    rules = [f"nvcc = {nvcc.replace(' ', '$ ')}", f"flags = {' '.join([*NVCC_FLAGS, *host, *codes])} --threads {threads}",
             f"host = {' '.join(host)}", *NVCC_RULES]
    names = [f"{source.stem}.o" for source in sources]
    rules += [f"build {name}: compile {escape(source)}" for name, source in zip(names, sources)]
    rules += [f"build {escape(library)}: link {' '.join(names)}"]
    facts = {"compiler": version_line(nvcc, -2), "architectures": [f"sm_{number}" + "+PTX" * ptx for number, ptx in usable]}
    left_out = [f"sm_{number}" for number, _ in wanted if f"compute_{number}" not in known]
    return "\n".join(rules) + "\n", facts | ({"unknown to this compiler": left_out} if left_out else {})


NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden".split()
NVCC_RULES = [
    "rule compile",
    "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
    "  depfile = $out.d",
    "  deps = gcc",
    "  description = $out",
    "rule link",
    "  command = $nvcc -shared -cudart static $host $in -o $out",
    "  description = $out",
]


def torch_rules(library: Path, objects: Path) -> tuple[str, dict]:
    torch = find_torch()
    compiler = find_cxx()
    found = re.search(r"^__version__ = ['\"](.+)['\"]", (torch / "version.py").read_text(), re.M)
    include = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include", Path(sysconfig.get_path("include"))]
    if not (include[-1] / "Python.h").exists():
        raise Unavailable(f"no Python.h in {include[-1]}")
    sources = sorted((ROOT / "csrc" / "torch").glob("*.cpp"))
    flags = [*TORCH_FLAGS, *(f"-isystem {escape(path)}" for path in include), os.environ.get("CXXFLAGS", "")]
    rules = [f"cxx = {compiler}", f"flags = {' '.join(flags)}".rstrip(), *CXX_RULES,
             *(f"build {source.stem}.o: compile {escape(source)}" for source in sources),
             f"build {escape(library)}: link {' '.join(f'{source.stem}.o' for source in sources)}",
             # Found by name among what `import torch` has loaded.
             f"  libraries = -L{escape(torch / 'lib')} -lc10 -ltorch_cpu -ltorch_python"]
    return "\n".join(rules) + "\n", {"compiler": version_line(compiler), "torch": found.group(1) if found else "unknown",
                                     "python": "%d.%d" % sys.version_info[:2]}


TORCH_FLAGS = "-std=c++20 -O2 -fPIC -fvisibility=hidden -Wall".split()


def find_torch() -> Path:
    """Where torch is installed: in the target environment if this is an isolated build, else wherever this Python finds it."""
    spec = importlib.util.find_spec("torch")
    folders = [SITE / "torch", *([Path(spec.origin).parent] if spec and spec.origin else [])]
    for folder in folders:
        if (folder / "include" / "torch" / "csrc" / "autograd" / "function.h").exists():
            return folder
    raise Unavailable("torch was not installed when this package was; install it again (pip install -e .)")


def find_nvcc() -> str:
    """CUDA_HOME, CUDA_PATH, /usr/local/cuda*, PyPI's toolkit packages, then PATH, where it may be a wrapper."""
    folders = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    folders += [*sorted(SITE.glob("nvidia/cu[0-9]*"), reverse=True), SITE / "nvidia" / "cuda_nvcc"]
    for folder in folders:
        if os.access(folder / "bin" / "nvcc", os.X_OK):
            return str(folder / "bin" / "nvcc")
    if path := shutil.which("nvcc"):
        return path
    raise Unavailable("nvcc not found (looked at CUDA_HOME, CUDA_PATH, /usr/local/cuda*, site-packages/nvidia, PATH)")


def architectures() -> list[tuple[str, bool]]:
    """(number, whether its PTX goes in too), from TORCH_CUDA_ARCH_LIST or Ampere to Blackwell."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    found = []
    for entry in text.replace(";", " ").replace(",", " ").split():
        number, ptx = entry.removesuffix("+PTX"), entry.endswith("+PTX")
        digits = number.replace(".", "")
        if not digits.rstrip("af").isdigit() or len(digits) < 2:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 12.0+PTX, got {entry!r}")
        if int(digits.rstrip("af")) >= 80:
            found.append((digits, ptx))
    if not found:
        raise Unavailable(f"TORCH_CUDA_ARCH_LIST={text} holds nothing from 8.0 on, which the kernels need")
    return found


def find_cxx() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if path := shutil.which(name.split()[0]):
            return " ".join([path, *name.split()[1:]])
    raise Unavailable("no C++ compiler found (looked at CXX, g++, clang++, c++)")


def run_ninja(rules: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != rules:
        file.write_text(rules)
    jobs = os.environ.get("MAX_JOBS")
    command = [*find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, file=sys.stderr)
    if result.returncode:
        lines = [line for line in result.stdout.splitlines() if "error" in line or "FAILED" in line]
        raise Unavailable(f"compilation failed: {' | '.join(lines[:3]) or result.stdout[-300:]}")


def find_ninja() -> list[str]:
    if path := shutil.which("ninja"):
        return [path]
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    raise Unavailable("ninja not found (pip install ninja)")


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def version_line(compiler: str, line: int = 0) -> str:
    return subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout.splitlines()[line]
