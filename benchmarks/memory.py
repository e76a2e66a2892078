"""Peak memory of a training step: `python -m benchmarks.memory` writes results/<device name>/memory.json and renders the pages.

A fresh process per row. What it measures is the operating system's account of the process, so whoever allocates is counted: torch, the
native ops' scratch (what they keep between calls too), MKL, oneDNN.

    before    anonymous resident memory with model, gradients, optimiser state and batch in place
    peak      the kernel's high-water mark of resident memory over two steps (reset before them), less pages of files
    counted   peak - before: activations and temporaries. Parameters, gradients, optimiser state and the batch are in both

So that gradients are in both, they are kept and added to (`zero_grad(set_to_none=False)`). A step in a thread of its own comes before: it
chooses among libraries, and oneDNN keeps the machine code that it generates, about half a MiB per shape of a product, which is neither
activation nor temporary. What a thread keeps between its calls goes with the thread, so that is counted. glibc is told to give every block of 64 KiB and more back to the system when it is freed, and huge pages
are off: memory that is free does not count. Linux only; the CPU only.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from . import implementations, machine, report
from .cases import IEMOCAP, MELD, Case

CASES = [Case("model", IEMOCAP), Case("model", IEMOCAP, dtype="bfloat16"), Case("model", IEMOCAP, preset="released"), Case("model", MELD)]
NAMES = ("textbook", "algebra", "cpu")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
PR_SET_THP_DISABLE = 41


def resident() -> dict[str, int]:
    """Bytes: VmHWM (the most since the last reset), RssAnon, RssFile, RssShmem."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) << 10 for line in lines if line and line[0].startswith(("VmHWM", "Rss"))}


def why_not() -> str | None:
    """Why it cannot be measured here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return None if "RssAnon" in resident() else "/proc/self/status has no RssAnon"
    except OSError as error:
        return f"the high-water mark cannot be reset: {error}"


def peak_of_a_step(case: Case, implementation: str) -> int:
    """Bytes of activations and temporaries at their most. For a process that has done nothing else, with ALLOCATOR in its environment."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    competitor = implementations.build(case, implementation, "cpu")
    model = competitor.model
    for p in model.parameters():
        p.grad = p.detach() * 0
    zero = model.zero_grad
    model.zero_grad = lambda set_to_none=True: zero(set_to_none=False)
    first = threading.Thread(target=competitor.run)
    first.start()
    first.join()
    gc.collect()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        competitor.run()
    after = resident()
    return after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before["RssAnon"]


def measure(case: Case, implementation: str, threads: int | None = None) -> int:
    """`peak_of_a_step` of one of CASES in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--row", str(CASES.index(case)), implementation]
    limits = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(command, cwd=report.ROOT, env={**os.environ, **ALLOCATOR, **limits}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--row", nargs=2, metavar=("CASE", "IMPLEMENTATION"), help="measure one row in this very process and print its bytes")
    options = parser.parse_args(arguments)
    if options.row:
        print(peak_of_a_step(CASES[int(options.row[0])], options.row[1]))
        return 0
    if reason := why_not():
        print(f"peak memory is not measured: {reason}", file=sys.stderr)
        return 1
    facts, rows = machine.facts("cpu"), []
    for case in CASES:
        found = {name: measure(case, name) for name in NAMES}
        rows += [dict(group=case.group, implementation=name, peak_bytes=bytes_, of_textbook=bytes_ / found["textbook"])
                 for name, bytes_ in found.items()]
    report.write(options.results / report.slug(facts["device"]) / "memory.json", {
        "kind": "memory", "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "environment": facts}, rows)
    return report.main(["--results", str(options.results)])


if __name__ == "__main__":
    sys.exit(main())
