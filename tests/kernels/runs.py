"""Runs triton_cases.py in processes of its own: under the interpreter, or on a GPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPT = Path(__file__).with_name("triton_cases.py")


def keys(table: str) -> list[str]:
    """Names in a table of the script, which must not be imported by tests: it switches Triton to its interpreter."""
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == table:
            return [key.value for key in node.value.keys if key is not None]
    raise KeyError(table)


def results(*options: str) -> dict[str, list]:
    """The cases' checks; each runs on one thread, so a process per core shares them."""
    processes = min(16, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as claims, ThreadPoolExecutor(processes) as pool:
        runs = list(pool.map(lambda _: subprocess.run([sys.executable, SCRIPT, *options, "--claims", claims], capture_output=True, text=True),
                             range(processes)))
    for run in runs:
        assert run.returncode == 0, run.stderr[-4000:]
    return {line["case"]: line["checks"] for run in runs for line in map(json.loads, run.stdout.splitlines())}


def beyond(checks: list) -> list:
    return [check for check in checks if not check[1] <= check[2]]
