"""Runs triton_cases.py in processes of its own: under the interpreter, or on a GPU."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

QUICK, SLOW = ("--cases", "quick"), ("--cases", "slow")
EARLY = "_ada2i_cases"           # where pytest's config holds `Run`s that began before its tests did, by their options
CORES = min(16, os.cpu_count() or 1)
SCRIPT = Path(__file__).with_name("triton_cases.py")
NICE = ["nice"] if shutil.which("nice") else []      # behind the other tests, which take longer in their one process


def keys(table: str) -> list[str]:
    """Names in a table of the script, which must not be imported by tests: it switches Triton to its interpreter."""
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == table:
            return [key.value for key in node.value.keys if key is not None]
    raise KeyError(table)


class Run:
    """The cases, shared by processes of one thread each."""

    def __init__(self, *options: str, processes: int = CORES) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._options, self._processes = options, []
        self.fill(processes)

    def fill(self, processes: int = CORES) -> None:
        """So many of them from now on; what has begun goes on."""
        folder = Path(self._folder.name)
        for i in range(len(self._processes), processes):
            with open(folder / f"out.{i}", "w") as out, open(folder / f"err.{i}", "w") as err:
                self._processes.append(subprocess.Popen([*NICE, sys.executable, SCRIPT, *self._options, "--claims", folder / "claims"], stdout=out, stderr=err))

    def results(self) -> dict[str, list]:
        """The cases' checks."""
        found, folder = {}, Path(self._folder.name)
        for i, process in enumerate(self._processes):
            assert process.wait() == 0, (folder / f"err.{i}").read_text()[-4000:]
            found |= {line["case"]: line["checks"] for line in map(json.loads, (folder / f"out.{i}").read_text().splitlines())}
        return found

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()


def results(*options: str, begun: Run | None = None) -> dict[str, list]:
    run = begun or Run(*options)
    try:
        run.fill()
        return run.results()
    finally:
        run.stop()


def beyond(checks: list) -> list:
    return [check for check in checks if not check[1] <= check[2]]
