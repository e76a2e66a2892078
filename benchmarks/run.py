"""Measures and keeps the result: `python -m benchmarks.run [--name NAME] [--all | --avx2] [pytest arguments]`.

Runs `pytest benchmarks/ --benchmark-only` and writes `benchmarks/results/<device name>/<NAME>.json` (under --results, if given), then
renders the report. NAME is "default", or "avx2" with --avx2, which measures a part of the groups with both sides kept from AVX-512 and AMX.
--all does everything: default, scaling (the sweeps), avx2, memory (`benchmarks.memory`) and profile (`benchmarks.profile`), a process each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import report

# The same in every row of a session: kept once.
ENVIRONMENT = ("device", "cpu", "cpu_tier", "cpu_node", "threads", "load_at_start", "python", "torch", "triton", "cuda", "float32_matmul_precision",
               "commit", "limits")
# Float32, where the instruction set matters most; torch.compile is left out.
AVX2 = "float32 and not compiled and (test_model or test_afw_layer and iemocap and training)"


def slim(raw: dict) -> dict:
    """pytest-benchmark's JSON down to what the report needs, in its layout: common facts once, no samples."""
    rows = []
    for row in raw["benchmarks"]:
        extra = {key: value for key, value in row["extra_info"].items() if key not in ENVIRONMENT}
        rows.append({"group": row["group"], "name": row["name"], "extra_info": extra})
    first = raw["benchmarks"][0]["extra_info"] if raw["benchmarks"] else {}
    return {"datetime": raw["datetime"], "environment": {key: first[key] for key in ENVIRONMENT if key in first}, "benchmarks": rows}


def everything(results: Path, rest: list[str]) -> int:
    """Each in a process of its own, so that none finds the caches, threads and rates of another."""
    codes = []
    for name, arguments in (("run", rest), ("run", ["--name", "scaling", "-m", "scaling", *rest]), ("run", ["--avx2", *rest]), ("memory", []),
                            ("profile", [])):
        start = time.perf_counter()
        codes.append(subprocess.call([sys.executable, "-m", f"benchmarks.{name}", "--results", str(results), *arguments], cwd=report.ROOT))
        print(f"{name} {' '.join(arguments)}: {time.perf_counter() - start:.0f} s, exit status {codes[-1]}", flush=True)
    return max(codes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    options, rest = parser.parse_known_args(arguments)
    if options.all:
        return everything(options.results.resolve(), rest)
    environment = dict(os.environ)
    if options.avx2:
        environment |= report.AVX2
        rest = ["--device", "cpu", "-k", AVX2, *rest]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        # An interrupt is pytest's, which then ends its session and hands over the groups that are complete.
        usual = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            code = subprocess.call([sys.executable, "-m", "pytest", str(report.ROOT / "benchmarks"), "--benchmark-only", "--benchmark-quiet",
                                    "-rs", f"--benchmark-json={raw}", *rest], cwd=report.ROOT, env=environment)
        finally:
            signal.signal(signal.SIGINT, usual)
        if not raw.exists() or not raw.stat().st_size:
            print("nothing was measured", file=sys.stderr)
            return code or 1
        found = slim(json.loads(raw.read_text()))
    name = options.name or ("avx2" if options.avx2 else "default")
    report.write(options.results / report.slug(found["environment"]["device"]) / f"{name}.json", found, found.pop("benchmarks"))
    report.main(["--results", str(options.results)])
    return code                             # a row that failed its check is missing from the file, and the code says so


if __name__ == "__main__":
    sys.exit(main())
