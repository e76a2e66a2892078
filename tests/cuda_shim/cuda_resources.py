"""What the compiled CUDA kernels use, per architecture: registers, stack and static shared memory, from cuobjdump.

    python tests/cuda_shim/cuda_resources.py [LIBRARY]      writes tests/data/cuda_resources.json from a built library
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "data" / "cuda_resources.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [Path(home) / "bin" / "cuobjdump" for home in homes if home]
    if spec := importlib.util.find_spec("triton"):
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(p) for p in places if p.exists()), None) or shutil.which("cuobjdump")


def kernel_name(mangled: str) -> str:
    """_ZN5ada2i10map_kernelINS_7Float32EEEvNS_10TensorRingE -> map_kernel<Float32>."""
    def identifier(text: str) -> tuple[str, str]:
        digits = re.match(r"\d+", text).group()
        return text[len(digits):len(digits) + int(digits)], text[len(digits) + int(digits):]

    name, rest = identifier(mangled.removeprefix("_ZN5ada2i"))
    if not rest.startswith("I"):
        return name
    rest = rest[1:].removeprefix("NS_")
    return f"{name}<{'float' if rest.startswith('f') else identifier(rest)[0]}>"


def read(library: Path) -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {kernel: {"registers", "stack", "shared", "local"}}}; bytes, shared without what a launch adds."""
    text = subprocess.run([cuobjdump(), "-res-usage", str(library)], capture_output=True, text=True, check=True)
    found: dict[str, dict[str, dict[str, int]]] = {}
    architecture = kernel = None
    for line in (text.stdout + text.stderr).splitlines():
        if match := re.match(r"arch = (sm_\d+)", line.strip()):
            architecture = match.group(1)
        elif match := re.match(r"Function (_ZN5ada2i\w+):", line.strip()):
            kernel = kernel_name(match.group(1))
        elif kernel and (match := re.match(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line.strip())):
            numbers = dict(zip(("registers", "stack", "shared", "local"), map(int, match.groups())))
            found.setdefault(architecture, {})[kernel] = numbers
            kernel = None
    return found


def compiler(library: Path) -> str:
    """The toolkit's build that compiled the kernels, as they record it."""
    return min(re.findall(rb"Build (cuda_[\w.]+/compiler[\w.]+)", library.read_bytes()), default=b"unknown").decode()


if __name__ == "__main__":
    from ada2i_fast import cuda

    built = Path(sys.argv[1]) if len(sys.argv) > 1 else cuda.PATH
    table = {arch: kernels for arch, kernels in read(built).items() if arch in ARCHITECTURES}
    lines = [f'  "{arch}": {{\n' + ",\n".join(f'    "{k}": {json.dumps(table[arch][k])}' for k in sorted(table[arch])) + "\n  }"
             for arch in sorted(table, key=lambda a: int(a[3:]))]
    TABLE.write_text("{\n" + ",\n".join([f'  "compiler": {json.dumps(compiler(built))}', *lines]) + "\n}\n")
