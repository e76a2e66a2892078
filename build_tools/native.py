"""Compiles `ada2i_fast/lib/libada2i_*.so` with ninja: in parallel, and only what changed.

The libraries use neither torch nor Python headers, so a build serves every version of both. What cannot be built is skipped, with the
reason in `lib/build_info.json`, unless its environment variable is 1 (ADA2I_FAST_CPU, ADA2I_FAST_CUDA): then it is an error; 0 leaves
it out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CXX_FLAGS = ("-std=c++17 -O3 -fPIC -fopenmp -fno-exceptions -fno-rtti -fvisibility=hidden -fno-math-errno -fno-trapping-math "
             "-ffp-contract=fast -Wall -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized").split()
TIERS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}


class Unavailable(Exception):
    """A library cannot be built here; the message says why."""


def build(library_folder: Path, object_folder: Path) -> dict:
    """Builds what this machine can build into `library_folder` and returns the content of build_info.json."""
    library_folder.mkdir(parents=True, exist_ok=True)
    object_folder.mkdir(parents=True, exist_ok=True)
    info = {}
    for name, make in (("cpu", cpu_rules), ("cuda", cuda_rules)):
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
    x86 = platform.machine() in ("x86_64", "AMD64")
    tiers = TIERS if x86 else {"baseline": []}
    source = ROOT / "csrc" / "cpu"
    rules = [f"cxx = {compiler}", f"flags = {' '.join(CXX_FLAGS)}", *CXX_RULES]
    names = []
    for tier, flags in tiers.items():
        names.append(f"{tier}.o")
        rules += [f"build {names[-1]}: compile {escape(source / 'tier.cpp')}",
                  f"  extra = {' '.join(flags)} -DADA2I_TIER={tier}"]
    rules += [f"build dispatch.o: compile {escape(source / 'dispatch.cpp')}", f"  extra = {'-DADA2I_X86_TIERS' if x86 else ''}",
              f"build {escape(library)}: link {' '.join(names)} dispatch.o"]
    return "\n".join(rules) + "\n", {"compiler": version_line(compiler), "tiers": list(tiers)}


CXX_RULES = [
    "rule compile",
    "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
    "  depfile = $out.d",
    "  deps = gcc",
    "  description = $out",
    "rule link",
    "  command = $cxx -shared -fopenmp $in -o $out",
    "  description = $out",
]


def cuda_rules(library: Path, objects: Path) -> tuple[str, dict]:
    raise Unavailable("csrc/cuda holds no sources")


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


def version_line(compiler: str) -> str:
    return subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout.splitlines()[0]
