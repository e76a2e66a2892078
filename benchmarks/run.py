"""Measures and keeps the result: `python -m benchmarks.run [--name NAME] [--all] [pytest arguments]`.

Runs `pytest benchmarks/ --benchmark-only` and writes `benchmarks/results/<device name>/<NAME>.json` (under --results, if given), then
renders the report. --all adds the scaling sweeps. The default NAME is "all" with --all, else "default".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from . import machine, report

# The same in every row of a session: kept once.
ENVIRONMENT = ("device", "cpu", "cpu_tier", "threads", "load_at_start", "python", "torch", "triton", "cuda", "float32_matmul_precision",
               "commit")


def slim(raw: dict) -> dict:
    """pytest-benchmark's JSON down to what the report needs, in its layout: common facts once, no samples."""
    rows = []
    for row in raw["benchmarks"]:
        extra = {key: value for key, value in row["extra_info"].items() if key not in ENVIRONMENT}
        rows.append({"group": row["group"], "name": row["name"], "extra_info": extra})
    first = raw["benchmarks"][0]["extra_info"] if raw["benchmarks"] else {}
    return {"datetime": raw["datetime"], "environment": {key: first[key] for key in ENVIRONMENT if key in first}, "benchmarks": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    options, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        code = subprocess.call([sys.executable, "-m", "pytest", str(machine.ROOT / "benchmarks"), "--benchmark-only", "--benchmark-quiet", "-rs",
                                f"--benchmark-json={raw}", *(["-m", ""] if options.all else []), *rest], cwd=machine.ROOT)
        if not raw.exists() or not raw.stat().st_size:
            print("nothing was measured", file=sys.stderr)
            return code or 1
        found = slim(json.loads(raw.read_text()))
    target = options.results / machine.slug(found["environment"]["device"]) / f"{options.name or ('all' if options.all else 'default')}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    # A line per row: small, and a change shows as the rows that changed.
    rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in found.pop("benchmarks"))
    head = ",\n".join(f' {json.dumps(key)}: {json.dumps(value)}' for key, value in found.items())
    target.write_text(f'{{\n{head},\n "benchmarks": [\n{rows}\n ]\n}}\n')
    print(f"wrote {target}")
    report.main(["--results", str(options.results)])
    return code                             # a row that failed its check is missing from the file, and the code says so


if __name__ == "__main__":
    sys.exit(main())
