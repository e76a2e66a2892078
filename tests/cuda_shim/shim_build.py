"""Compiles C++ for the tests into a temporary folder, once per content of the sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEVICE_CODE = ROOT / "csrc" / "cuda"
SANITIZER = ["-fsanitize=address", "-fno-omit-frame-pointer"]


def compiler() -> str | None:
    """A C++ compiler that knows _Float16 (gcc 12 and later)."""
    return shutil.which(os.environ.get("CXX", "g++"))


def compile_library(source: str = "driver.cpp", address_sanitizer: bool = False) -> Path:
    """The shared library of one source of this folder. RuntimeError with the compiler's words if it fails."""
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-DADA2I_SHIM", "-Wall", "-Werror", "-Wno-unknown-pragmas",
             f"-I{HERE}", f"-I{DEVICE_CODE}", *(SANITIZER if address_sanitizer else [])]
    command = compiler()
    content = hashlib.sha256(" ".join([command, *flags, source]).encode())
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *DEVICE_CODE.glob("*.cu*"), *DEVICE_CODE.parent.glob("common/*.h")]):
        content.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"ada2i_cuda_shim_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{content.hexdigest()[:24]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        result = subprocess.run([command, *flags, str(HERE / source), "-o", str(partial)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source} does not compile:\n{result.stderr[-4000:]}")
        partial.replace(library)
    return library


def sanitizer_runtime() -> str | None:
    """libasan.so of the compiler, which has to be loaded before everything else."""
    path = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None
